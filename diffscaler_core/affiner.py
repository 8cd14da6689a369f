"""One layer's affiner: the method's formula as pure functions, and one class that owns parameters.

Knows no model. Method: DiffScaler (arXiv:2404.09976), in the form

    y' = y + a ⊙ (y − b̂) + b + s · U · act(D x),    y = W x + b̂ the frozen layer's own output,

which needs x and y only, never W, so that a quantised or offloaded W makes no difference.

Letters, used in this file alone: a `scale`, b `shift`, D `down`, U `up`, s `gain`, b̂ the layer's
own bias. Shapes: B batch, K tasks on one layer, R rank, C_in and C_out the layer's channels, k its
kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DiffScalerError, unknown
from .windows import NoiseLevel, UnitWindows

PARTS = ("scale", "shift", "subspace")
TENSORS = ("scale", "shift", "down", "up")
#: The smallest value an activation lets through: act(z) = max(z, floor).
ACTIVATIONS: dict[str, float] = {"relu": 0.0, "identity": -math.inf}

_LARGEST_HALF = 65504.0  # of float16
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvGeometry(NamedTuple):
    """How a convolution walks over its input; a Linear has none.

    Attributes:
        stride: One step per spatial dimension.
        padding: One width per spatial dimension, or torch's "same" or "valid".
        dilation: One spacing per spatial dimension.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        border: Widths for `F.pad`, last dimension first; used unless `padding_mode` is "zeros".
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    border: tuple[int, ...] = ()


class Affiner(nn.Module):
    """One layer's parameters for one task; any part may be absent.

    Args:
        scale: a, (C_out,), or None.
        shift: b, (C_out,), or None.
        down: D, (R, C_in) for a Linear, (R, C_in, *k) for a convolution, or None.
        up: U, (C_out, R), or None. `down` and `up` come together.
        activation: A name in ACTIVATIONS; "relu" is the paper's.
        gain: s, a stored constant.
        scale_includes_bias: True: the scale multiplies the frozen bias too (DiffFit's γ).
        windows: When the hidden units act (see `windows.py`); None: at every noise level.

    Raises:
        UnknownNameError: No such activation.
        DiffScalerError: `down` without `up`, or `up` without `down`.
    """

    scale: Tensor | None
    shift: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(
        self,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        *,
        activation: str = "relu",
        gain: float = 1.0,
        scale_includes_bias: bool = False,
        windows: UnitWindows | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if (down is None) != (up is None):
            raise DiffScalerError("an affiner's down and up come together; one is missing")
        for name, tensor in zip(TENSORS, (scale, shift, down, up), strict=True):
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)
        self.activation = activation
        self.gain = float(gain)
        self.scale_includes_bias = scale_includes_bias
        self.windows = windows

    @property
    def rank(self) -> int:
        """R, or 0 without a subspace."""
        return 0 if self.down is None else self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters that are present, by their names in the file."""
        present = ((name, getattr(self, name)) for name in TENSORS)
        return {name: tensor for name, tensor in present if tensor is not None}

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        *,
        bias: Tensor | None = None,
        geometry: ConvGeometry | None = None,
        strength: float = 1.0,
        log_snr: Tensor | None = None,
    ) -> Tensor:
        """Returns the frozen layer's output, corrected for this task.

        Args:
            x: The layer's input, (..., C_in), or (B, C_in, *size) for a convolution.
            y: The layer's output with its bias, (..., C_out) or (B, C_out, *size).
            bias: b̂, (C_out,), or None for a layer without.
            geometry: The convolution's geometry, None for a Linear.
            strength: Dimensionless; 0 gives y itself, 1 the trained task.
            log_snr: λ of the call, (), for an affiner with windows.

        Returns:
            A tensor like y. y is not modified.
        """
        if strength == 0:
            return y
        weights = torch.full((1, len(PARTS)), strength, dtype=_wide(y).dtype, device=y.device)
        folded = fold([self], weights, bias)
        if self.windows is not None:
            level = NoiseLevel()
            level.put(log_snr)
            folded = windowed(folded, level.window(self.windows).to(y.device))
        return apply_folded(x, y, folded.to(y.device, y.dtype), geometry)


class Folded(NamedTuple):
    """K affiners on one layer with their strengths, folded into one.

    Attributes:
        gain: Σ w a, (C_out,) or, with rows, (B, C_out); None if nothing scales.
        offset: Σ (w b − w a b̂), same shape; None if nothing scales or shifts.
        down: The Ds one below the other, (ΣR, C_in, *k), or None.
        up: The w·s·U side by side, (C_out, ΣR); with rows s·U, as w is then in `mask`.
        floor: (ΣR,) smallest value each hidden unit lets through; None: relu for all.
        linear: True: no hidden unit has an activation, so `floor` need not be asked.
        mask: With rows, (B, ΣR): what each row multiplies each hidden unit with.
    """

    gain: Tensor | None
    offset: Tensor | None
    down: Tensor | None
    up: Tensor | None
    floor: Tensor | None
    linear: bool
    mask: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Folded:
        """Returns the same on another device and in another dtype."""
        return self.map(lambda t: t.to(device, dtype))

    def map(self, change: Callable[[Tensor], Tensor]) -> Folded:
        """Returns the same with every tensor changed."""
        return Folded(
            gain=None if self.gain is None else change(self.gain),
            offset=None if self.offset is None else change(self.offset),
            down=None if self.down is None else change(self.down),
            up=None if self.up is None else change(self.up),
            floor=None if self.floor is None else change(self.floor),
            linear=self.linear,
            mask=None if self.mask is None else change(self.mask),
        )

    def tensors(self) -> list[Tensor]:
        """Returns the tensors there are."""
        return [t for t in self if isinstance(t, Tensor)]


def fold(affiners: Sequence[Affiner], weights: Tensor, bias: Tensor | None) -> Folded:
    """Returns K affiners of one layer as one, in float32 (or float64) and differentiable.

    The sum is parallel, y + Σ wₖ Δₖ(x, y), so the order of the affiners never matters. The bias is
    folded into the offset once, so that the hot path never reads it (it may live elsewhere).

    Args:
        affiners: K affiners of the same layer.
        weights: Strengths per task and part (PARTS order), (K, 3), or (B, K, 3) for rows.
        bias: b̂ of the frozen layer, (C_out,), or None.
    """
    rows = weights.ndim == 3
    weights = _wide(weights)

    def at_home(tensor: Tensor) -> Tensor:  # a host may have moved one task and not another
        return _wide(tensor).to(weights.device)

    gain: Tensor | None = None
    offset: Tensor | None = None
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    masks: list[Tensor] = []
    floors: list[Tensor] = []
    kinds: set[str] = set()
    for k, affiner in enumerate(affiners):
        w_scale, w_shift, w_subspace = weights[..., k, :, None].unbind(-2)  # (1,) or (B, 1)
        # each once: an affiner may compute its tensors whenever they are read
        scale, shift, down, up = affiner.scale, affiner.shift, affiner.down, affiner.up
        if scale is not None:
            scaled = w_scale * at_home(scale)
            gain = scaled if gain is None else gain + scaled
            if bias is not None and not affiner.scale_includes_bias:
                unbiased = scaled * at_home(bias)
                offset = -unbiased if offset is None else offset - unbiased
        if shift is not None:
            shifted = w_shift * at_home(shift)
            offset = shifted if offset is None else offset + shifted
        if down is not None and up is not None:
            rank = down.shape[0]
            downs.append(at_home(down))
            up = at_home(up) * affiner.gain
            ups.append(up if rows else up * w_subspace)
            masks += [w_subspace.expand(-1, rank)] if rows else []
            floor = ACTIVATIONS[affiner.activation]
            floors.append(torch.full((rank,), floor, device=weights.device))
            kinds |= {affiner.activation} if rank else set()
    return Folded(
        gain=gain,
        offset=offset,
        down=torch.cat(downs) if downs else None,
        up=torch.cat(ups, dim=1) if ups else None,
        floor=torch.cat(floors) if len(kinds) > 1 else None,
        linear=kinds == {"identity"},
        mask=torch.cat(masks, dim=1) if rows and masks else None,
    )


def fold_alone(affiner: Affiner, bias: Tensor | None, device: torch.device) -> Folded:
    """Returns what `fold` does for one affiner at strength 1, in fewer steps: for training."""
    scale, shift, down, up = (
        None if t is None else _wide(t).to(device)
        for t in (affiner.scale, affiner.shift, affiner.down, affiner.up)
    )
    if scale is not None and bias is not None and not affiner.scale_includes_bias:
        bias = _wide(bias).to(device)
        base = torch.zeros_like(bias) if shift is None else shift
        shift = torch.addcmul(base, scale, bias, value=-1)
    if up is not None and affiner.gain != 1:
        up = up * affiner.gain
    linear = affiner.activation == "identity"
    return Folded(scale, shift, down, up, floor=None, linear=linear, mask=None)


def windowed(folded: Folded, window: Tensor | None) -> Folded:
    """Returns folded affiners of which the hidden units in a window act.

    Args:
        folded: From `fold` or `fold_alone`.
        window: Factor of each hidden unit, (ΣR,) or (B, ΣR) by row; None: all act.
    """
    if window is None or folded.up is None:
        return folded
    if window.ndim == 1 and folded.mask is None:
        return folded._replace(up=folded.up * window)
    mask = window if folded.mask is None else folded.mask * window

    def by_row(vector: Tensor | None) -> Tensor | None:
        if vector is None or vector.ndim > 1:
            return vector
        return vector.expand(len(mask), -1)

    return folded._replace(mask=mask, gain=by_row(folded.gain), offset=by_row(folded.offset))


def apply_folded(
    x: Tensor,
    y: Tensor,
    folded: Folded,
    geometry: ConvGeometry | None = None,
    row_repeats: int = 1,
) -> Tensor:
    """Returns y + Σ wₖ Δₖ(x, y) from folded affiners, in y's dtype.

    Args:
        x: The layer's input, (..., C_in) or (B, C_in, *size).
        y: The layer's output, (..., C_out) or (B, C_out, *size); not modified.
        folded: From `fold`, on y's device and in y's dtype.
        geometry: The convolution's geometry, None for a Linear.
        row_repeats: With rows: how many consecutive leading entries of y belong to one row.
    """
    return corrected(y, *_terms(x, y, folded, geometry, row_repeats))


def delta_folded(
    x: Tensor,
    y: Tensor,
    folded: Folded,
    geometry: ConvGeometry | None = None,
    row_repeats: int = 1,
) -> Tensor:
    """Returns Σ wₖ Δₖ(x, y) alone; arguments as in `apply_folded`."""
    gain, correction = _terms(x, y, folded, geometry, row_repeats)
    if gain is None:
        return torch.zeros_like(y) if correction is None else correction.expand_as(y)
    return y * gain if correction is None else torch.addcmul(correction, y, gain)


def _terms(
    x: Tensor, y: Tensor, folded: Folded, geometry: ConvGeometry | None, row_repeats: int
) -> tuple[Tensor | None, Tensor | None]:
    """Returns (gain, correction) of Δ = gain ⊙ y + correction, both to be broadcast to y."""
    rows = folded.mask is not None or (folded.offset is not None and folded.offset.ndim == 2)
    rows = rows or (folded.gain is not None and folded.gain.ndim == 2)
    correction = _correction(x, y, folded, geometry, row_repeats if rows else 0)
    gain = folded.gain
    if gain is not None:
        gain = _spread(gain, y, geometry, row_repeats if rows else 0)
    return gain, correction


def corrected(y: Tensor, gain: Tensor | None, correction: Tensor | None) -> Tensor:
    """Returns y + gain ⊙ y + correction, rounded once more than y at most; all broadcast to y."""
    if gain is None:
        return y if correction is None else y + correction
    if y.dtype in (torch.float32, torch.float64):
        if correction is None:
            return y * (1 + gain)
        return torch.addcmul(correction, y, 1 + gain)
    # In 16 bits 1 + a would round |a| < 2⁻⁹ (bf16) away for every token alike. So Δ first, by
    # itself; what then rounds is the output alone.
    if correction is None:
        return torch.addcmul(y, y, gain)
    return y + torch.addcmul(correction, y, gain)


def _correction(
    x: Tensor, y: Tensor, folded: Folded, geometry: ConvGeometry | None, row_repeats: int
) -> Tensor | None:
    """Returns what does not depend on y: the offset and the subspace; None if there is neither."""
    offset = folded.offset
    if folded.down is None or folded.up is None:
        return None if offset is None else _spread(offset, y, geometry, row_repeats)
    hidden = project_down(x.to(y.device, y.dtype), folded.down, geometry)
    floor = None if folded.floor is None else _spread(folded.floor, hidden, geometry, 0)
    hidden = activated(hidden, floor, folded.linear)
    if not row_repeats:
        return project_up(hidden, folded.up, offset, geometry)
    if folded.mask is not None:
        hidden = hidden * _spread(folded.mask, hidden, geometry, row_repeats)
    correction = project_up(hidden, folded.up, None, geometry)
    return correction if offset is None else correction + _spread(offset, y, geometry, row_repeats)


def activated(hidden: Tensor, floor: Tensor | None, linear: bool) -> Tensor:
    """Returns act(hidden): at least `floor`, or relu for None unless there is no activation."""
    if floor is not None:
        hidden = torch.maximum(hidden, floor)
    elif not linear:
        hidden = F.relu(hidden)
    if hidden.dtype == torch.float16:  # overflow stays finite, or strength 0 would be 0 · inf = NaN
        hidden = hidden.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return hidden


def project_down(x: Tensor, down: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
    """Returns D x: (..., R), or (B, R, *size) by a convolution of the layer's own geometry."""
    if geometry is None:
        return F.linear(x, down)
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        x = F.pad(x, geometry.border, mode=geometry.padding_mode)
        padding = (0,) * len(geometry.stride)
    convolve = _CONVOLUTIONS[down.ndim - 2]
    return convolve(x, down, None, geometry.stride, padding, geometry.dilation)


def project_up(
    hidden: Tensor, up: Tensor, offset: Tensor | None, geometry: ConvGeometry | None = None
) -> Tensor:
    """Returns U z + offset: (..., C_out), or (B, C_out, *size) by a 1×1 convolution."""
    if geometry is None:
        return F.linear(hidden, up, offset)
    ones = (1,) * len(geometry.stride)
    return _CONVOLUTIONS[len(ones)](hidden, up.view(*up.shape, *ones), offset)


def init_affiner(
    parts: Sequence[str],
    out_features: int,
    in_features: int,
    kernel: Sequence[int],
    rank: int,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Returns the tensors of a fresh affiner, which changes nothing: a = b = U = 0, D random.

    They are float32 on the CPU, whatever torch's defaults are at the moment. D is Kaiming-uniform
    like torch's own layers. (D = 0 with U random would never train, as the derivative of relu at 0
    is 0.)

    Args:
        parts: Names among PARTS.
        out_features: C_out.
        in_features: C_in, of all groups together.
        kernel: The convolution's kernel size, empty for a Linear.
        rank: R of the subspace.
        generator: Random source of D.
    """
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    tensors: dict[str, Tensor] = {}
    if "scale" in parts:
        tensors["scale"] = torch.zeros(out_features, **plain)
    if "shift" in parts:
        tensors["shift"] = torch.zeros(out_features, **plain)
    if "subspace" in parts:
        bound = 1 / math.sqrt(in_features * math.prod(kernel))
        down = torch.empty(rank, in_features, *kernel, **plain)
        tensors["down"] = down.uniform_(-bound, bound, generator=generator)
        tensors["up"] = torch.zeros(out_features, rank, **plain)
    return tensors


def affiner_from(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], windows: UnitWindows | None = None
) -> Affiner:
    """Returns an affiner that shares these tensors, with a task's facts (activation, gain…).

    Args:
        tensors: By their names in the file.
        facts: The task's.
        windows: When its hidden units act; None: always.
    """
    return Affiner(
        *(tensors.get(name) for name in TENSORS),
        activation=str(facts.get("activation", "relu")),
        gain=float(facts.get("gain", 1.0)),
        scale_includes_bias=bool(facts.get("scale_includes_bias", False)),
        windows=windows if "down" in tensors else None,
    )


def _wide(t: Tensor) -> Tensor:
    """Returns the tensor in float32, or as it is in float64."""
    return t if t.dtype == torch.float64 else t.float()


def _spread(v: Tensor, y: Tensor, geometry: ConvGeometry | None, row_repeats: int) -> Tensor:
    """Returns channel values (C,), or (B, C) with rows, shaped to broadcast against y."""
    size = 0 if geometry is None else len(geometry.stride)
    if not row_repeats:
        return v.view(-1, *(1,) * size)
    if row_repeats > 1:
        v = v.repeat_interleave(row_repeats, dim=0)
    if geometry is not None:
        return v.view(*v.shape, *(1,) * size)
    if y.shape[0] == 1 < v.shape[0]:  # one flat run of tokens, row after row
        return v.unsqueeze(0)
    return v.view(v.shape[0], *(1,) * (y.ndim - 2), v.shape[1])
