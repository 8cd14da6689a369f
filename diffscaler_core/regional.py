"""Several tasks on one layer, each with its own factor on every token. Pure tensors.

    y' = y + Σₖ gₖ Δₖ(x, y),   Δₖ = wₖ aₖ ⊙ (y − b̂) + wₖ′ bₖ + wₖ″ sₖ Uₖ act(Dₖ x)

with gₖ a number per token (or place in a feature map) and task. All tasks become one wide subspace:
beside the hidden units of every Dₖ there are units that are always 1, whose columns of U are bₖ and
−aₖ ⊙ b̂. Then one factor per token and hidden unit does all of it but the scale, whose Σₖ gₖ wₖ aₖ
is a product of its own, (tokens, K) by (K, C_out).

Letters as in `affiner.py`; H hidden units, S tasks that scale, n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import (
    ACTIVATIONS,
    PARTS,
    Affiner,
    ConvGeometry,
    activated,
    project_down,
    project_up,
)

_SCALE, _SHIFT, _SUBSPACE = range(len(PARTS))
_WIDE = (torch.float32, torch.float64)


class RegionalFold(NamedTuple):
    """K affiners on one layer as one wide subspace and a table of scales.

    Attributes:
        down: D of all tasks, for all units but the constant ones, which come last, (≤ H, C_in, *k);
            None: all units are constant.
        up: The columns of s·U, then those of the constant units, (C_out, H); None: no unit at all.
        floor: Smallest value each unit of `down` lets through; None: relu for all.
        linear: True: no hidden unit has an activation, so `floor` need not be asked.
        scale: a of each task that scales, (S, C_out), or None.
        units: Per unit its task's index, and the part whose strength it has, two of (H,).
        scales: Per row of `scale` its task's index, (S,).
    """

    down: Tensor | None
    up: Tensor | None
    floor: Tensor | None
    linear: bool
    scale: Tensor | None
    units: tuple[Tensor, Tensor]
    scales: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> RegionalFold:
        """Returns the same on another device and in another dtype."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, dtype)

        return RegionalFold(
            down=moved(self.down),
            up=moved(self.up),
            floor=moved(self.floor),
            linear=self.linear,
            scale=moved(self.scale),
            units=(self.units[0].to(device), self.units[1].to(device)),
            scales=self.scales.to(device),
        )


class Factors(NamedTuple):
    """Strengths times gates, per token; to be broadcast to the layer's tokens or places.

    Attributes:
        units: What each hidden unit is multiplied with, (1 or R, n or 1, H), or for a convolution
            (1 or R, H, *size); None: there are no units.
        scales: What each row of `RegionalFold.scale` is multiplied with, alike with S; or None.
    """

    units: Tensor | None
    scales: Tensor | None


@torch.no_grad()
def fold_regional(
    affiners: Sequence[Affiner], bias: Tensor | None, slots: Sequence[int] | None = None
) -> RegionalFold:
    """Returns affiners of one layer in the form that `apply_factors` runs, in float32.

    Args:
        affiners: One per task that has this layer.
        bias: b̂ of the frozen layer, (C_out,), or None.
        slots: Each affiner's index among the K tasks of strengths and gates; None: their order.
    """
    slots = range(len(affiners)) if slots is None else slots
    device = next((t.device for a in affiners for t in a.tensors().values()), torch.device("cpu"))
    bias = None if bias is None else bias.to(device, torch.float32)
    downs: list[Tensor] = []
    columns: list[Tensor] = []
    constants: list[Tensor] = []
    floors: list[float] = []
    units: list[tuple[int, int]] = []
    constant_units: list[tuple[int, int]] = []
    scales: list[tuple[int, Tensor]] = []
    for slot, affiner in zip(slots, affiners, strict=True):
        own = {name: t.detach().to(device, torch.float32) for name, t in affiner.tensors().items()}
        if "down" in own:
            downs.append(own["down"])
            columns.append(own["up"] * affiner.gain)
            floors += [ACTIVATIONS[affiner.activation]] * affiner.rank
            units += [(slot, _SUBSPACE)] * affiner.rank
        if "shift" in own:
            constants.append(own["shift"])
            constant_units.append((slot, _SHIFT))
        if "scale" in own:
            scales.append((slot, own["scale"]))
            if bias is not None and not affiner.scale_includes_bias:
                constants.append(-own["scale"] * bias)
                constant_units.append((slot, _SCALE))
    ups = [*columns, *(column.unsqueeze(1) for column in constants)]
    kinds = set(floors)
    slot_of, part_of = zip(*(units + constant_units), strict=True) if ups else ((), ())
    return RegionalFold(
        down=torch.cat(downs) if downs else None,
        up=torch.cat(ups, dim=1) if ups else None,
        floor=torch.tensor(floors, device=device) if len(kinds) > 1 else None,
        linear=kinds == {ACTIVATIONS["identity"]},
        scale=torch.stack([scale for _, scale in scales]) if scales else None,
        units=(_indices(slot_of, device), _indices(part_of, device)),
        scales=_indices([slot for slot, _ in scales], device),
    )


def factors_for(
    y: Tensor,
    folded: RegionalFold,
    weights: Tensor,
    gates: Tensor,
    geometry: ConvGeometry | None = None,
    row_repeats: int = 1,
    window: Tensor | None = None,
) -> Factors:
    """Returns what the units and scales are multiplied with; the same as long as its inputs are.

    Args:
        y: The layer's output; only its shape, device and dtype are used.
        folded: From `fold_regional`, on y's device.
        weights: Strengths per task and part (PARTS order), (K, 3), or (B, K, 3) for rows.
        gates: From `Regions.gates`: (1 or R, n or 1, K), or (1 or R, K, *size) for a convolution.
        geometry: The convolution's geometry, None for a Linear.
        row_repeats: With rows of strengths: how many consecutive leading entries of y belong to one
            row (or of its tokens, where all rows make one run of tokens).
        window: What each hidden unit is multiplied with beside, (1 or B, H); None: 1.
    """
    weights = weights.to(y.device, torch.float32)
    if weights.ndim == 2:
        weights = weights.unsqueeze(0)
    elif row_repeats > 1:
        weights = weights.repeat_interleave(row_repeats, dim=0)
    if window is not None:
        window = window.to(y.device)
        if row_repeats > 1 and len(window) > 1:
            window = window.repeat_interleave(row_repeats, dim=0)
    one_run = geometry is None and y.ndim > 2 and y.shape[0] == 1 < len(weights)

    def spread(slots: Tensor, parts: Tensor | int, window: Tensor | None = None) -> Tensor:
        own = weights[:, slots, parts]
        own = own if window is None else own * window
        if geometry is not None:
            return own.view(*own.shape, *(1,) * len(geometry.stride)) * gates.index_select(1, slots)
        if y.ndim == 2:
            own = own * gates.index_select(-1, slots).squeeze(1)
        elif one_run:
            own = own.unsqueeze(0) * gates.index_select(-1, slots)
        else:
            middle = (1,) * (y.ndim - 2)
            own = own.view(len(own), *middle, -1) * gates.index_select(-1, slots)
        return own

    return Factors(
        units=None if folded.up is None else spread(*folded.units, window).to(y.dtype),
        scales=None if folded.scale is None else spread(folded.scales, _SCALE).to(y.dtype),
    )


def apply_factors(
    x: Tensor,
    y: Tensor,
    folded: RegionalFold,
    factors: Factors,
    geometry: ConvGeometry | None = None,
    owned: bool = False,
) -> Tensor:
    """Returns y + Σ gₖ wₖ Δₖ(x, y), in y's dtype; where all factors are 0 it is y bit for bit.

    Args:
        x: The layer's input, (..., C_in), or (B, C_in, *size) for a convolution.
        y: The layer's output, (..., C_out) or (B, C_out, *size); not modified unless `owned`.
        folded: From `fold_regional`, on y's device and in y's dtype.
        factors: From `factors_for`.
        geometry: The convolution's geometry, None for a Linear.
        owned: Nobody else holds y, so that it may hold the result.
    """
    hidden = _hidden(x, y, folded, factors.units, geometry)
    if folded.scale is None or factors.scales is None:
        return y if hidden is None else y + project_up(hidden, _up(folded), None, geometry)
    # In 16 bits 1 + a would round small scales away for every token alike (see `corrected`).
    wide = y.dtype in _WIDE
    one = torch.ones_like(folded.scale[0]) if wide else None
    gain = project_up(factors.scales, folded.scale.T, one, geometry)
    if hidden is None:
        return y * gain if wide else torch.addcmul(y, y, gain)
    # On a CPU a large tensor more to allocate costs more than the sum itself, so sums are made in
    # tensors made here, unless somebody asks for gradients or compiles.
    may_change = not (torch.compiler.is_compiling() or _needs_grad(hidden, y, gain))
    if may_change and wide and geometry is None and hidden.dtype == y.dtype:
        may_hold = owned and (torch.is_inference_mode_enabled() or not y.is_inference())
        room = y if may_hold else gain if gain.shape == y.shape else None
        total = torch.mul(y, gain, out=room)
        rows = hidden.expand(*y.shape[:-1], -1).flatten(0, -2)
        return total.reshape(-1, y.shape[-1]).addmm_(rows, _up(folded).T).view(y.shape)
    correction = project_up(hidden, _up(folded), None, geometry)
    if may_change and correction.shape == y.shape:
        correction = correction.addcmul_(y, gain)
        return correction if wide else correction.add_(y)
    correction = torch.addcmul(correction, y, gain)
    return correction if wide else y + correction


def apply_regional(
    x: Tensor,
    y: Tensor,
    folded: RegionalFold,
    weights: Tensor,
    gates: Tensor,
    geometry: ConvGeometry | None = None,
    row_repeats: int = 1,
) -> Tensor:
    """Returns `apply_factors` with `factors_for` the same arguments."""
    factors = factors_for(y, folded, weights, gates, geometry, row_repeats)
    return apply_factors(x, y, folded, factors, geometry)


def _hidden(
    x: Tensor,
    y: Tensor,
    folded: RegionalFold,
    factors: Tensor | None,
    geometry: ConvGeometry | None,
) -> Tensor | None:
    """Returns the hidden units times their factors, to be broadcast to y; None: there are none."""
    if factors is None or folded.down is None:
        return factors
    dimensions = 0 if geometry is None else len(geometry.stride)
    floor = folded.floor
    if floor is not None and dimensions:
        floor = floor.view(-1, *(1,) * dimensions)
    hidden = project_down(x.to(y.device, y.dtype), folded.down, geometry)
    hidden = activated(hidden, floor, folded.linear)
    constant = _up(folded).shape[1] - folded.down.shape[0]
    if constant:
        hidden = F.pad(hidden, (0, 0) * dimensions + (0, constant), value=1.0)
    return hidden * factors


def _up(folded: RegionalFold) -> Tensor:
    assert folded.up is not None  # there are units
    return folded.up


def _needs_grad(*tensors: Tensor) -> bool:
    return any(t.requires_grad for t in tensors)


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
