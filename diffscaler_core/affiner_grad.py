"""The affiner of a Linear in training: the same formula, with less kept for the backward.

Plain autograd keeps the frozen layer's output y for the gradient of the scale. With

    y' = (1 + g) ⊙ y + o + U z,    z = act(D x),

y' says the same, and y' is what the next operation mostly keeps anyway (attention, GELU):

    Σ dy' ⊙ y = (Σ dy' ⊙ y' − o ⊙ Σ dy' − rowsum(dU ⊙ U)) / (1 + g),

sums over tokens, per channel; dU is needed in any case. This is our choice, not the paper's. It
holds where 1 + g is not near 0 (see `scales.py`); elsewhere plain autograd serves.

In 16 bits y' is kept as it is returned, as y would have been, and the sums are float32. No second
derivatives: torch says so if they are asked for.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .affiner import Folded, activated
from .errors import DiffScalerError
from .pointwise import recipe_of
from .siblings import Shared

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """What an affiner's tensors do not say.

    Attributes:
        layer: The layer's name, for messages.
        groups: K equal parts of the batch, tensors with a leading dimension K; 0: none, without.
        floor: As in `Folded`.
        linear: As in `Folded`.
        window: Factor of each hidden unit by row of the batch, (B, R), or (1, R); None: all act.
    """

    layer: str
    groups: int
    floor: Tensor | None
    linear: bool
    window: Tensor | None = None

    def matrix(self, t: Tensor) -> Tensor:
        """Returns (…, C) as (N, C), or (K, N, C) with groups."""
        return t.reshape(*((self.groups,) if self.groups else ()), -1, t.shape[-1])

    def in_window(self, hidden: Tensor) -> Tensor:
        """Returns hidden units, (N, R) or (K, N, R), times their window; rows lie together."""
        if self.window is None:
            return hidden
        rows = hidden.reshape(len(self.window), -1, hidden.shape[-1])
        return (rows * self.window.to(hidden.dtype).unsqueeze(1)).view(hidden.shape)


def is_plain(y: Tensor) -> bool:
    """Says whether a layer's output is an ordinary tensor, outside tracing and transforms."""
    return (
        type(y) is Tensor
        and y.dtype in _DTYPES
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def affine(
    x: Tensor,
    y: Tensor,
    folded: Folded,
    layer: str = "",
    groups: int = 0,
    shared: Shared | None = None,
    window: Tensor | None = None,
) -> Tensor:
    """Returns what `apply_folded` (or `apply_stacked`) does for a Linear; keeps less.

    Args:
        x: The layer's input, (…, C_in).
        y: The layer's output, (…, C_out); not modified.
        folded: Without rows, in float32 (or float64); gradients come back in that.
        layer: The layer's name, for messages.
        groups: K, if `folded` is from `stack_groups`; 0 otherwise.
        shared: act(D x) if it is known already.
        window: As in `Shape`.
    """
    floor = None if folded.floor is None else folded.floor.to(y.dtype)
    shape = Shape(layer, groups, floor, folded.linear, window)
    tensors = (folded.gain, folded.offset, folded.down, folded.up)
    own_x = None if folded.down is None else x
    return _Affine.apply(own_x, y, *tensors, shared, shape)  # type: ignore[no-any-return]


def hidden_of(x: Tensor, down: Tensor, shape: Shape) -> Tensor:
    """Returns act(D x), (N, R) or (K, N, R); D may be in another dtype than x."""
    down = down.to(x.dtype).transpose(-2, -1)
    return activated(torch.matmul(shape.matrix(x), down), shape.floor, shape.linear)


class _Affine(torch.autograd.Function):
    """See the module's docstring. Saves x (or its recipe), z, y' and the affiner's own tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        y: Tensor,
        gain: Tensor | None,
        offset: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        shared: Shared | None,
        shape: Shape,
    ) -> Tensor:
        hidden = recipe = None
        with _no_autocast(y.device.type):
            if x is not None and down is not None:
                x = x.to(y.dtype) if shared is None or shared.x is None else shared.x
                hidden = hidden_of(x, down, shape) if shared is None else shared.hidden
                hidden = shape.in_window(shape.matrix(hidden))
            mixed = _mix(shape.matrix(y), gain, offset, hidden, up).contiguous()
            # no view for autograd: the model may change what it was given in place
            out: Tensor = torch.ops.aten._unsafe_view(mixed, y.shape)
        if not ctx.needs_input_grad[4]:
            x = None
        elif x is not None:
            recipe = recipe_of(x)
        ctx.shape, ctx.recipe = shape, recipe
        kept_out = out if ctx.needs_input_grad[2] else None
        kept_x = x if recipe is None else None
        ctx.save_for_backward(kept_x, hidden, gain, offset, down, up, kept_out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast(grad.device.type):
            return (*_gradients(ctx, grad), None, None, None)


def _mix(
    y: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    hidden: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    """Returns (1 + gain) ⊙ y + offset + U z for matrices, in as few passes as there can be."""
    half = y.dtype in _HALVES
    gain, offset, up = (None if t is None else t.to(y.dtype) for t in (gain, offset, up))
    if half and gain is not None:  # as in `corrected`: Δ first, or 1 + gain would round it away
        return _delta(y, gain, offset, hidden, up).add_(y)
    if gain is None:
        out = y.clone() if offset is None else y + offset
    else:
        out = y * (1 + gain) if offset is None else torch.addcmul(offset, y, 1 + gain)
    if hidden is not None and up is not None:
        _accumulate(out, hidden, up)
    return out


def _delta(
    y: Tensor, gain: Tensor, offset: Tensor | None, hidden: Tensor | None, up: Tensor | None
) -> Tensor:
    if hidden is None or up is None:
        return y * gain if offset is None else torch.addcmul(offset, y, gain)
    product = torch.matmul(hidden, up.transpose(-2, -1))
    return (product if offset is None else product.add_(offset)).addcmul_(y, gain)


def _accumulate(out: Tensor, hidden: Tensor, up: Tensor) -> None:
    """Adds U z to `out` in place."""
    if out.ndim == 2:
        out.addmm_(hidden, up.t())
    else:
        out.baddbmm_(hidden, up.transpose(1, 2))


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, y, gain, offset, down and up."""
    shape: Shape = ctx.shape
    x, hidden, gain, offset, down, up, out = _saved(ctx)
    of_x, of_y, of_gain, of_offset, of_down, of_up = ctx.needs_input_grad[:6]
    rows = shape.matrix(grad)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = d_up = d_gain = d_down = d_x = None
    if of_offset or (of_gain and offset is not None):
        total = rows.sum(-2, dtype=wide, keepdim=bool(shape.groups))
    if hidden is not None and up is not None and (of_up or of_gain):
        # (R, C_out), as this order reads the large factor along its rows
        d_up = torch.matmul(hidden.transpose(-2, -1), rows).to(wide).transpose(-2, -1)
    if of_gain:
        d_gain = _gain_gradient(rows, shape.matrix(out), gain, offset, up, total, d_up)
    if hidden is not None and down is not None and (of_down or of_x):
        d_hidden = _hidden_gradient(torch.matmul(rows, up.to(rows.dtype)), hidden, shape)
        if of_down:
            x = ctx.recipe() if x is None else x
            d_down = torch.matmul(d_hidden.transpose(-2, -1), shape.matrix(x)).to(wide)
        if of_x:
            d_x = torch.matmul(d_hidden, down.to(rows.dtype)).reshape(*grad.shape[:-1], -1)
    d_y = None
    if of_y:
        d_y = grad if gain is None else _scaled(rows, gain.to(rows.dtype)).reshape(grad.shape)
    return d_x, d_y, d_gain, total if of_offset else None, d_down, d_up if of_up else None


def _gain_gradient(
    rows: Tensor,
    out: Tensor,
    gain: Tensor,
    offset: Tensor | None,
    up: Tensor | None,
    total: Tensor | None,
    d_up: Tensor | None,
) -> Tensor:
    """Returns Σ dy' ⊙ y per channel, from y'; see the module's docstring."""
    # a float16 product may overflow where its terms do not
    product = rows.float().mul_(out) if rows.dtype == torch.float16 else rows * out
    sums = product.sum(-2, dtype=gain.dtype, keepdim=gain.ndim > 1)
    if offset is not None and total is not None:
        sums -= offset * total
    if up is not None and d_up is not None:
        sums -= (d_up * up).sum(-1).view(sums.shape)
    return sums.div_(1 + gain)


def _hidden_gradient(d_hidden: Tensor, hidden: Tensor, shape: Shape) -> Tensor:
    """Returns the gradient before the activation; also where float16 was cut off there is none."""
    d_hidden = shape.in_window(d_hidden)
    if shape.floor is not None:
        d_hidden = d_hidden.masked_fill_(hidden <= shape.floor, 0)
    elif not shape.linear:
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)
    if hidden.dtype == torch.float16:
        d_hidden = d_hidden.masked_fill_(hidden.abs() >= torch.finfo(torch.float16).max, 0)
    return d_hidden


def _scaled(rows: Tensor, gain: Tensor) -> Tensor:
    """Returns (1 + gain) ⊙ rows, without rounding 1 + gain to 16 bits."""
    if rows.dtype in _HALVES:
        return torch.addcmul(rows, rows, gain)
    return rows * (1 + gain)


def _saved(ctx: Any) -> tuple[Any, ...]:
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise DiffScalerError(
            f"the model changed the output of {ctx.shape.layer!r} in place after the layer "
            f"returned it, so its gradient cannot be known; leave this layer out of the task"
        ) from error


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Keeps autocast out: dtypes are settled before, and in-place sums must not meet two."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
