"""Several tasks on one layer in a form that is ready to run. Pure tensors; knows no model.

What a layer needs of its tasks at inference, laid out so that nothing is cast, concatenated or
scaled while the model runs, and that new strengths and another routing are new values in the same
tensors. With strengths w (see `affiner.py` for the other letters),

    y' = (1 + Σ w a) ⊙ y + Σ (w b − w a ⊙ b̂) + Σ w s U act(D x).

Shapes: B rows of the batch, K tasks, M tasks that one row runs at most, R hidden units (of one task
where tasks are told apart, else of all), C_in and C_out the layer's channels, k its kernel, N what
one row has of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import (
    ACTIVATIONS,
    Affiner,
    ConvGeometry,
    activated,
    corrected,
    project_down,
    project_up,
)

WIDE = (torch.float32, torch.float64)


class Form(NamedTuple):
    """K tasks on one layer.

    Attributes:
        gain: 1 + Σ w a in 32 or 64 bits, where it is exact enough, Σ w a in 16; (C_out,), with rows
            (B, C_out); None if nothing scales.
        offset: Σ (w b − w a ⊙ b̂), the same shape; None if nothing scales or shifts.
        down: D of all tasks one below the other, (R, C_in, *k); gathered (K, R, C_in); or None.
        up: s·U of all tasks side by side, (C_out, R); gathered, the other way round, (K, R, C_out).
        mask: What each hidden unit is multiplied with, (R,), with rows (B, R), gathered (B, M·R).
        floor: The smallest value each hidden unit lets through, (R,), gathered (K, R); None: relu
            for all.
        linear: True: no hidden unit has an activation, so `floor` need not be asked.
        chosen: Gathered: which task each place of each row runs, (B·M,). None: every row's own D
            and U lie there already, (B, M·R, C), or nothing is gathered.
        rows: B; 0: the whole batch alike.
    """

    gain: Tensor | None
    offset: Tensor | None
    down: Tensor | None
    up: Tensor | None
    mask: Tensor | None
    floor: Tensor | None
    linear: bool
    chosen: Tensor | None
    rows: int

    @property
    def is_by_row(self) -> bool:
        """Says whether a Linear's rows have a D and U of their own."""
        return self.rows > 0 and self.down is not None

    def tensors(self) -> list[Tensor]:
        """Returns the tensors there are."""
        return [t for t in self if isinstance(t, Tensor)]


class Factors(NamedTuple):
    """The subspaces of K tasks on one layer; see `Form` for the attributes."""

    down: Tensor
    up: Tensor
    floor: Tensor | None
    linear: bool

    def to(self, device: torch.device, dtype: torch.dtype) -> Factors:
        """Returns the same on another device and in another dtype."""
        floor = None if self.floor is None else self.floor.to(device, dtype)
        return Factors(self.down.to(device, dtype), self.up.to(device, dtype), floor, self.linear)


def joined(affiners: Sequence[Affiner]) -> Factors | None:
    """Returns K subspaces as one whose ranks add up; None if no affiner has one.

    One alone, of gain 1, shares its tensors.
    """
    own = [(a, a.down, a.up) for a in affiners]
    there = [(a, d.detach(), _gained(a, u)) for a, d, u in own if d is not None and u is not None]
    if not there:
        return None
    if len(there) == 1:
        affiner, down, up = there[0]
        return Factors(down, up, None, affiner.activation == "identity")
    home = there[0][1].device  # a host may have moved one task and not another
    floors = [torch.full((len(d),), ACTIVATIONS[a.activation], device=home) for a, d, _ in there]
    kinds = {a.activation for a, d, _ in there if len(d)}
    return Factors(
        torch.cat([down.to(home) for _, down, _ in there]),
        torch.cat([up.to(home) for _, _, up in there], dim=1),
        torch.cat(floors) if len(kinds) > 1 else None,
        kinds == {"identity"},
    )


def stacked(
    affiners: Sequence[Affiner | None], room_for: Iterable[Affiner] | None = None
) -> Factors | None:
    """Returns the subspaces of K tasks side by side, ready to be told apart.

    Smaller ranks are padded with zeros, which is exact for every activation there is: act(0) = 0.

    Args:
        affiners: One per task; None for a task that does not have this layer.
        room_for: Affiners whose ranks and activations must fit in too; None: nobody else's.

    Returns:
        down (K, R, C_in, *k), up (K, R, C_out), floor (K, R); None if no affiner has a subspace.
    """
    others = [a for a in affiners if a is not None] if room_for is None else list(room_for)
    there = [a for a in others if a.down is not None and a.up is not None]
    if not there:
        return None
    rank = max(affiner.rank for affiner in there)
    down, up = cast(Tensor, there[0].down), cast(Tensor, there[0].up)
    no_down, no_up = down.new_zeros(rank, *down.shape[1:]), down.new_zeros(rank, up.shape[0])
    downs, ups, floors = [], [], []
    for affiner in affiners:
        own = None if affiner is None or affiner.down is None or affiner.up is None else affiner
        downs.append(no_down if own is None else _filled(cast(Tensor, own.down), no_down))
        ups.append(no_up if own is None else _filled(_gained(own, cast(Tensor, own.up)).T, no_up))
        floors.append(ACTIVATIONS["relu" if own is None else own.activation])
    kinds = {affiner.activation for affiner in there if affiner.rank}
    floor = torch.tensor(floors, device=down.device)[:, None].repeat(1, rank)
    return Factors(
        torch.stack(downs),
        torch.stack(ups),
        floor if len(kinds) > 1 else None,
        kinds == {"identity"},
    )


def flattened(factors: Factors) -> Factors:
    """Returns stacked subspaces as one whose ranks add up, as `joined` has them; a copy."""
    floor = None if factors.floor is None else factors.floor.flatten()
    up = factors.up.flatten(0, 1).T.contiguous()
    return Factors(factors.down.flatten(0, 1), up, floor, factors.linear)


def _filled(own: Tensor, zeros: Tensor) -> Tensor:
    """Returns a tensor with zeros below, up to a shape."""
    own = own.detach().to(zeros.device)
    return own if own.shape == zeros.shape else torch.cat([own, zeros[len(own) :].to(own)])


def _gained(affiner: Affiner, up: Tensor) -> Tensor:
    up = up.detach()
    return up if affiner.gain == 1 else up * affiner.gain


def apply_form(
    x: Tensor,
    y: Tensor,
    form: Form,
    geometry: ConvGeometry | None = None,
    row_repeats: int = 1,
    masked: bool = True,
    hidden: Tensor | None = None,
    owned: bool = False,
) -> Tensor:
    """Returns y + Σ wₖ Δₖ(x, y), in y's dtype and shape; y itself is modified only if `owned`.

    Args:
        x: The layer's input, (…, C_in) or (B, C_in, *size); with rows, each row's entries together.
        y: The layer's output, (…, C_out) or (B, C_out, *size).
        form: On y's device and in y's dtype.
        geometry: The convolution's geometry, None for a Linear.
        row_repeats: For a convolution with rows: how many leading entries of y belong to one row.
        masked: False: every strength of a hidden unit is 1, so that none need be multiplied.
        hidden: Of a Linear, act(D x), should it be known (`kin.py`); it may be changed.
        owned: Nobody else holds y, so that it may hold the result: a large tensor less to allocate,
            which costs more than the sum itself.
    """
    if geometry is not None:
        return _apply_convolution(x, y, form, geometry, row_repeats, masked)
    own, gain, offset = y, form.gain, form.offset
    if form.rows:
        own = y.reshape(form.rows, -1, y.shape[-1])
        gain = None if gain is None else gain.unsqueeze(1)
        offset = None if offset is None else offset.unsqueeze(1)
    if form.down is None or form.up is None:
        return _sum(own, gain, offset, fresh=False).reshape(y.shape)
    if hidden is None:
        hidden = _hidden(x.to(y.device, y.dtype), form)
    mask = form.mask if masked else None
    mask = mask.unsqueeze(1) if mask is not None and form.is_by_row else mask
    hidden = _masked(hidden, mask)
    owned = owned and _may_change(y) and (torch.is_inference_mode_enabled() or not y.is_inference())
    return _plus_subspace(own, gain, offset, hidden, form, owned).reshape(y.shape)


def _plus_subspace(
    y: Tensor,
    gain: Tensor | None,
    offset: Tensor | None,
    hidden: Tensor,
    form: Form,
    owned: bool,
) -> Tensor:
    """Returns a Linear's output with scale, shift and U times the hidden units.

    U's product is added to what scale and shift made of y: a pass over the output less than adding
    them to it, and torch would write the offset out in full to add a product to it.

    Args:
        y: (…, C_out), or (B, N, C_out) where gathered.
        gain: As in `Form`, to be broadcast.
        offset: As in `Form`, to be broadcast.
        hidden: w act(D x), (…, R), or (B, N, M·R).
        form: The form.
        owned: y may hold the result.
    """
    assert form.up is not None
    # in 16 bits the gain is not 1 + a, as that would round a small a away: Δ comes first, by itself
    is_delta = gain is not None and y.dtype not in WIDE
    start, room = y, y if owned and not is_delta else None
    if gain is not None:
        if offset is None:
            start = torch.mul(y, gain, out=room)
        else:
            start = torch.addcmul(offset, y, gain, out=room)
    elif offset is not None:
        start = torch.add(y, offset, out=room)
    shape, dtype = start.shape, start.dtype
    is_own = owned or (start is not y and _may_change(start))
    if form.is_by_row:
        up, hidden = gathered(form.up, form), hidden.to(dtype)
        total = start.baddbmm_(hidden, up) if is_own else torch.baddbmm(start, hidden, up)
    else:
        up = form.up.T
        start, hidden = start.reshape(-1, shape[-1]), hidden.reshape(-1, up.shape[0]).to(dtype)
        total = start.addmm_(hidden, up) if is_own else torch.addmm(start, hidden, up)
    total = total.to(dtype).view(shape)
    if not is_delta:
        return total
    return total.add_(y) if is_own else total + y


def product_of(x: Tensor, form: Form) -> Tensor:
    """Returns D x of a Linear, (…, R), gathered (B, N, M·R)."""
    assert form.down is not None
    if not form.is_by_row:
        return F.linear(x, form.down)
    x = x.reshape(form.rows, -1, x.shape[-1])
    return torch.bmm(x, gathered(form.down, form).transpose(1, 2))


def _hidden(x: Tensor, form: Form) -> Tensor:
    """Returns act(D x) of a Linear."""
    floor = form.floor
    if floor is not None and form.is_by_row:
        floor = gathered(floor[..., None], form).mT
    return activated(product_of(x, form), floor, form.linear)


def _apply_convolution(
    x: Tensor, y: Tensor, form: Form, geometry: ConvGeometry, row_repeats: int, masked: bool
) -> Tensor:
    ones = (1,) * len(geometry.stride)

    def spread(v: Tensor | None) -> Tensor | None:
        if v is not None and v.ndim == 2 and row_repeats > 1:
            v = v.repeat_interleave(row_repeats, dim=0)
        return None if v is None else v.view(*v.shape, *ones)

    gain, offset = spread(form.gain), spread(form.offset)
    if form.down is None or form.up is None:
        return _sum(y, gain, offset, fresh=False)
    hidden = project_down(x.to(y.device, y.dtype), form.down, geometry)
    hidden = activated(hidden, spread(form.floor), form.linear)
    # with rows, the units of tasks that a row does not run are here too: nothing is gathered
    hidden = _masked(hidden, spread(form.mask) if masked or form.rows else None)
    if form.rows or form.offset is None:
        correction = project_up(hidden, form.up, None, geometry)
        correction = correction if offset is None else correction + offset
    else:
        correction = project_up(hidden, form.up, form.offset, geometry)
    return _sum(y, gain, correction, fresh=True)


def gathered(bank: Tensor, form: Form) -> Tensor:
    """Returns each row's own part of a bank, (B, M·R, C)."""
    if form.chosen is None:
        return bank
    return bank.index_select(0, form.chosen).view(form.rows, -1, bank.shape[-1])


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden
    return hidden.mul_(mask) if _may_change(hidden) else hidden * mask


def _sum(y: Tensor, gain: Tensor | None, correction: Tensor | None, fresh: bool) -> Tensor:
    """Returns y corrected.

    Args:
        y: The layer's output.
        gain: As in `Form`, to be broadcast.
        correction: What does not depend on y, to be broadcast unless it is fresh.
        fresh: The correction was made just now, in y's shape: it may hold the result.
    """
    wide = y.dtype in WIDE
    if correction is not None and fresh and correction.dtype == y.dtype:
        if _may_change(correction) and not y.requires_grad:
            # a large tensor less to allocate, which on a CPU costs more than the sum itself
            if gain is None:
                return correction.add_(y)
            correction = correction.addcmul_(y, gain)
            return correction if wide else correction.add_(y)
    if gain is None:
        return y if correction is None else y + correction
    if not wide:
        return corrected(y, gain, correction)
    return y * gain if correction is None else torch.addcmul(correction, y, gain)


def _may_change(own: Tensor) -> bool:
    """Says whether a tensor made here may be changed in place: nobody will ask for gradients."""
    return not own.requires_grad and not torch.compiler.is_compiling()
