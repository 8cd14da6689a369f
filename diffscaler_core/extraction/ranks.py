"""Which rank each layer of an extraction gets, and what other ranks would keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..auto_rank import Spectrum, allocate, budget_of
from ..targets import Target

_AFFINE = ("scale", "shift")
_EPS = 1e-12  # of a layer's change: less than that is as good as all


class Curve(NamedTuple):
    """How much of a layer's change stays undone at each rank.

    Attributes:
        whole: ‖Δ‖².
        left: What of it is left at rank 0, 1, …, as far as was looked.
    """

    whole: float
    left: Tensor


def ranks_by_energy(curves: Mapping[str, Curve], energy: float) -> Iterator[tuple[str, int]]:
    """Yields the smallest rank of each layer that keeps the share; the largest if none does."""
    for name, (whole, left) in curves.items():
        enough = (left <= (1 - energy) * whole + _EPS * whole).nonzero()
        yield name, int(enough[0]) if len(enough) else len(left) - 1


def ranks_by_budget(
    curves: Mapping[str, Curve],
    targets: Sequence[Target],
    budget: int | str,
    parts: Sequence[str],
    base: int,
) -> dict[str, int]:
    """Returns the ranks that keep most within a budget, as training with rank "auto" spends one.

    Args:
        curves: What stays undone, by layer.
        targets: The layers.
        budget: As `auto_rank.budget_of` reads it: 8, "0.4%", "1.5M".
        parts: Of the task; scales and shifts are paid for first.
        base: How many numbers the base has.

    Raises:
        DiffScalerError: No budget, or one that leaves nothing for subspaces.
    """
    own = {target.name: target for target in targets}
    costs = {name: own[name].out_features + columns_of(own[name]) for name in curves}
    fixed = sum(
        own[name].out_features * (("scale" in parts) + ("shift" in parts and own[name].has_bias))
        for name in curves
    )
    limits = {name: min(own[name].out_features, columns_of(own[name])) for name in curves}
    room = budget_of(budget, units=costs, limits=limits, fixed=fixed, base=base)
    gains = {name: (left[:-1] - left[1:]).clamp_min(0) for name, (_, left) in curves.items()}
    return allocate(
        {name: Spectrum(tuple(gain.tolist()), costs[name]) for name, gain in gains.items()}, room
    )


def columns_of(target: Target) -> int:
    """Returns how many inputs one output of a layer has: C_in times the kernel."""
    return math.prod(target.shape[1:])


def kept_at_ranks(
    curves: Mapping[str, Curve],
    targets: Sequence[Target],
    layers: Mapping[str, Mapping[str, Tensor]],
    component: str,
) -> tuple[dict[int, float], dict[int, int]]:
    """Returns what ranks 1, 2, 4, … keep, as far as every layer's curve tells, and their size."""
    curves = {name: curve for name, curve in curves.items() if len(curve.left) > 1}
    own = {target.name: target for target in targets}
    columns = {name: columns_of(own[name]) for name in curves}
    known = [
        len(left) - 1
        for name, (_, left) in curves.items()
        # a layer whose singular values are all known says what any rank does
        if len(left) <= min(own[name].out_features, columns[name])
    ]
    most = min(known) if known else max((len(c.left) - 1 for c in curves.values()), default=0)
    affine = sum(
        t.numel() for tensors in layers.values() for p, t in tensors.items() if p in _AFFINE
    )
    whole = sum(curve.whole for curve in curves.values())
    kept: dict[int, float] = {}
    sizes: dict[int, int] = {}
    rank = 1
    while rank <= most and kept.get(rank // 2, 0.0) < 0.9999:
        left = sum(float(left[min(rank, len(left) - 1)]) for _, left in curves.values())
        kept[rank] = max(0.0, 1 - left / whole)
        sizes[rank] = affine + sum(
            min(rank, len(left) - 1) * (own[name].out_features + columns[name])
            for name, (_, left) in curves.items()
        )
        rank *= 2
    return kept, sizes
