"""Windows: which hidden units of a task act at which noise level. Pure; knows no model and no file.

With the letters of `affiner.py`, and m the window at log-SNR λ = 2 ln(α/σ) (see
`training/objective.py`),

    h = s · U (m(λ) ⊙ act(D x)),    m(λ) in {0, 1}^R.

Noise levels are cut into ranges. Range 0 is the cleanest; range i holds λ from its edge on
downwards to, but not with, the next: eᵢ ≥ λ > eᵢ₊₁, half-open, so each λ lies in exactly one. In λ,
not in steps, a range survives another scheduler, another number of steps, and another kind of base.
Scale and shift are shared by all ranges.

- Experts (after PPAP, arXiv:2212.05973, which trains one adapter a range [iT/N, (i+1)T/N) of a
  guidance network): N windows that share no unit. One adapter's rank shared out, for generation, is
  ours.
- Sliding (Denoising Task Routing, arXiv:2310.07138): n = ⌊βR⌋ units from off(i) on,
  off(i) = round((i/(T−1))^α (R − n)), with T the number of ranges. The paper masks a network's
  channels; to mask a subspace's units, with the gain 1/β, is ours, as a frozen base has no channels
  to spare.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import DiffScalerError, shown

#: (first, end, count): so many units, one after the other, that act in the ranges first … end − 1.
Run = tuple[int, int, int]
Runs = tuple[Run, ...]

#: Ranges of a sliding window, the paper's alpha and beta.
SLIDING_RANGES, ALPHA, BETA = 16, 4.0, 0.8
#: More ranges than these no task has.
MOST_RANGES = 256
#: A λ comes from float32, by another way in each host, and must not miss its edge by a last digit.
_NEAR = 1e-4
#: In the facts: the runs of layers that are not named.
_DEFAULT = "default"


@dataclass(frozen=True)
class UnitWindows:
    """When the hidden units of one layer act.

    Attributes:
        edges: Between the ranges, in λ, falling; one less than ranges.
        runs: The layer's units, in order.
    """

    edges: tuple[float, ...]
    runs: Runs

    @property
    def rank(self) -> int:
        """R."""
        return sum(count for _, _, count in self.runs)

    @cached_property
    def table(self) -> Tensor:
        """1 where a unit acts in a range, else 0, (ranges, R), float32 on the CPU."""
        with torch.inference_mode(False):
            table = torch.zeros(len(self.edges) + 1, self.rank, dtype=torch.float32, device="cpu")
            start = 0
            for first, end, count in self.runs:
                table[first:end, start : start + count] = 1
                start += count
        return table

    def at(self, log_snr: Tensor) -> Tensor:
        """Returns m(λ), (R,) for λ of shape (), (B, R) for (B,), where λ lies."""
        return self.table.to(log_snr.device)[ranges_of(self.edges, log_snr)]


class NoiseLevel:
    """The noise level of a model's next calls, as far as tasks ask for it."""

    def __init__(self) -> None:
        self.log_snr: Tensor | None = None
        self._windows: dict[UnitWindows, Tensor] = {}

    def put(self, log_snr: Tensor | None) -> None:
        """Takes another level: λ, () for the whole batch or (B,) by row; None: nobody knows."""
        self.log_snr = log_snr
        self._windows.clear()

    def window(self, own: UnitWindows) -> Tensor:
        """Returns m(λ), (R,) or (B, R), where λ lies.

        Raises:
            DiffScalerError: Nobody knows λ.
        """
        if self.log_snr is None:
            raise DiffScalerError(
                "a task here has hidden units that act at some noise levels alone, and nobody said "
                "which level this call is at: set_time(log_snr) first (pipelines of diffusers with "
                "load_diffscaler, and ComfyUI, do it themselves)"
            )
        if own not in self._windows:
            self._windows[own] = own.at(self.log_snr)
        return self._windows[own]


def check_rows(rows: int, levels: int) -> None:
    """Raises unless there is a noise level for each row of the batch."""
    if rows != levels:
        raise DiffScalerError(
            f"{levels} noise levels are set for {rows} rows: set_time takes one for all, or one "
            f"for each row of the batch"
        )


def ranges_of(edges: Sequence[float], log_snr: Tensor) -> Tensor:
    """Returns which range each λ lies in, shaped like λ; an edge belongs to its noisier range."""
    known = torch.tensor(edges, dtype=torch.float64).to(log_snr.device, torch.float32) + _NEAR
    return (log_snr.float().unsqueeze(-1) <= known).sum(-1)


def joined(parts: Sequence[UnitWindows | None], ranks: Sequence[int]) -> UnitWindows | None:
    """Returns the windows of units of several layers or tasks, one after the other.

    Args:
        parts: Of each; None: its units act in every range. Their edges may differ.
        ranks: How many units each has.
    """
    there = [own for own in parts if own is not None]
    if not there:
        return None
    edges = united(*(own.edges for own in there))
    runs = [
        run
        for own, rank in zip(parts, ranks, strict=True)
        for run in on(edges, own or UnitWindows((), ((0, 1, rank),)))
    ]
    return UnitWindows(edges, _shortened(runs))


def limited(own: UnitWindows | None, rank: int, above: float, below: float) -> UnitWindows:
    """Returns windows whose units act at above < λ <= below alone, of those they acted at.

    Args:
        own: The windows they have; None: they act in every range.
        rank: How many units there are.
        above: A log-SNR, or −∞.
        below: A log-SNR, or +∞.

    Raises:
        DiffScalerError: Nothing lies between.
    """
    if not above < below:
        raise DiffScalerError(
            f"a range of noise levels is a lower and a higher log-SNR, got {above:g} and {below:g}"
        )
    own = own or UnitWindows((), ((0, 1, rank),))
    edges = united(own.edges, [edge for edge in (below, above) if math.isfinite(edge)])
    low = edges.index(below) + 1 if math.isfinite(below) else 0
    high = edges.index(above) + 1 if math.isfinite(above) else len(edges) + 1
    cut = ((max(first, low), min(end, high), count) for first, end, count in on(edges, own))
    return UnitWindows(edges, _shortened([(f, max(f, e), count) for f, e, count in cut]))


def united(*edges: Sequence[float]) -> tuple[float, ...]:
    """Returns all edges, falling, each once."""
    return tuple(sorted({edge for own in edges for edge in own}, reverse=True))


def on(edges: Sequence[float], own: UnitWindows) -> Runs:
    """Returns runs as they are on these edges, among which its own are."""
    starts = [0, *(edges.index(edge) + 1 for edge in own.edges), len(edges) + 1]
    return tuple((starts[first], starts[end], count) for first, end, count in own.runs)


def _shortened(runs: Sequence[Run]) -> Runs:
    """Returns runs with neighbours that act alike as one, and none without units."""
    short: list[Run] = []
    for first, end, count in runs:
        if short and short[-1][:2] == (first, end):
            short[-1] = (first, end, short[-1][2] + count)
        elif count:
            short.append((first, end, count))
    return tuple(short)


@dataclass(frozen=True)
class WindowPlan:
    """How a new task's units are shared out among ranges, whatever their number in a layer.

    Attributes:
        kind: "experts" or "sliding".
        edges: As in `UnitWindows`.
        alpha: Of a sliding window: how late it slides.
        beta: Of a sliding window: the share of the units that acts.
    """

    kind: str
    edges: tuple[float, ...]
    alpha: float = ALPHA
    beta: float = BETA

    @property
    def gain(self) -> float:
        """What s is multiplied with: 1/β for a sliding window."""
        return 1 / self.beta if self.kind == "sliding" else 1.0

    def runs(self, rank: int) -> Runs:
        """Returns when each of R units acts.

        Raises:
            DiffScalerError: Fewer units than experts.
        """
        count = len(self.edges) + 1
        if self.kind == "experts":
            if rank < count:
                raise DiffScalerError(
                    f"{count} experts cannot share {rank} hidden units: give a rank of {count} or "
                    f"more, or leave layers of fewer units out"
                )
            cuts = [round(i * rank / count) for i in range(count + 1)]
            return tuple((i, i + 1, cuts[i + 1] - cuts[i]) for i in range(count))
        width = max(1, math.floor(self.beta * rank))
        starts = [
            round((i / max(1, count - 1)) ** self.alpha * (rank - width)) for i in range(count)
        ]
        acting = [[i for i, s in enumerate(starts) if s <= c < s + width] for c in range(rank)]
        return _shortened([(own[0], own[-1] + 1, 1) if own else (0, 0, 1) for own in acting])


def expert_windows(count: int, edges: Sequence[float] | None = None) -> WindowPlan:
    """Returns a plan of N experts: each range has its own R/N units.

    Args:
        count: N.
        edges: Between their ranges, in λ, falling; None: `even_edges(N)`.

    Raises:
        DiffScalerError: Fewer than two experts, or edges that do not cut N ranges.
    """
    return WindowPlan("experts", _edges(count, edges))


def sliding_windows(
    ranges: int = SLIDING_RANGES,
    alpha: float = ALPHA,
    beta: float = BETA,
    edges: Sequence[float] | None = None,
) -> WindowPlan:
    """Returns a plan of a window that slides over the units, mostly where there is much noise.

    Args:
        ranges: How many places it has at most.
        alpha: α; above 1 it slides late, at high noise.
        beta: β in 0..1: the share of the units in it.
        edges: As in `expert_windows`.

    Raises:
        DiffScalerError: α or β cannot be meant, or as in `expert_windows`.
    """
    if not (alpha > 0 and 0 < beta <= 1):
        raise DiffScalerError(
            f"a sliding window has alpha > 0 and 0 < beta <= 1, got {alpha:g}, {beta:g}"
        )
    return WindowPlan("sliding", _edges(ranges, edges), float(alpha), float(beta))


def even_edges(count: int, log_snr_at: Callable[[float], float] | None = None) -> tuple[float, ...]:
    """Returns the edges of N ranges that are as long as each other on a base's clock.

    Args:
        count: N.
        log_snr_at: Time in 0..1, where 1 is pure noise -> λ; None: a flow's, 2 ln((1 − t)/t).
    """
    at = log_snr_at or (lambda t: 2 * math.log((1 - t) / t))
    return tuple(round(at(i / count), 6) for i in range(1, count))


def _edges(count: int, edges: Sequence[float] | None) -> tuple[float, ...]:
    if not 2 <= count <= MOST_RANGES:
        raise DiffScalerError(f"noise levels are cut into 2 to {MOST_RANGES} ranges, got {count}")
    found = even_edges(count) if edges is None else tuple(map(float, edges))
    if len(found) != count - 1 or not _falls(found):
        raise DiffScalerError(
            f"{count} ranges have {count - 1} edges between them, log-SNRs that fall, got "
            f"{shown(list(found))}"
        )
    return found


def _falls(edges: Sequence[float]) -> bool:
    falls = all(a > b for a, b in itertools.pairwise(edges))
    return falls and all(map(math.isfinite, edges))


@dataclass(frozen=True)
class TaskWindows:
    """When all the hidden units of a task act.

    Attributes:
        edges: As in `UnitWindows`.
        runs: Layer, with its component -> when its units act; "default": the others'.
        plan: What is told of how they came about: kind, alpha, beta.
    """

    edges: tuple[float, ...]
    runs: Mapping[str, Runs]
    plan: Mapping[str, Any]

    def of(self, layer: str) -> UnitWindows:
        """Returns a layer's, by its name with the component."""
        return UnitWindows(self.edges, self.runs.get(layer) or self.runs.get(_DEFAULT, ()))

    @property
    def facts(self) -> dict[str, Any]:
        """As a file's config holds them: JSON."""
        runs = {layer: [list(run) for run in own] for layer, own in self.runs.items()}
        return {**self.plan, "edges": list(self.edges), "units": runs}


def planned(plan: WindowPlan, ranks: Mapping[str, int]) -> TaskWindows:
    """Returns the windows of a new task.

    Args:
        plan: How units are shared out.
        ranks: R of each layer that has a subspace, by its name with the component.

    Raises:
        DiffScalerError: Experts without units.
    """
    told: dict[str, Any] = {"kind": plan.kind}
    told |= {"alpha": plan.alpha, "beta": plan.beta} if plan.kind == "sliding" else {}
    return gathered(plan.edges, {name: plan.runs(rank) for name, rank in ranks.items()}, told)


def gathered(
    edges: tuple[float, ...], runs: Mapping[str, Runs], plan: Mapping[str, Any]
) -> TaskWindows:
    """Returns the windows of a task from those of its layers: the commonest are the default."""
    known = list(runs.values())
    default = max(dict.fromkeys(known), key=known.count) if known else ()
    others = {name: own for name, own in runs.items() if own != default}
    return TaskWindows(edges, {_DEFAULT: default, **others}, plan)


def read_windows(facts: Any) -> TaskWindows:
    """Returns the windows that facts hold.

    Raises:
        DiffScalerError: They hold none that could be meant.
    """
    try:
        edges = tuple(map(float, facts["edges"]))
        runs = {
            str(layer): tuple((int(first), int(end), int(count)) for first, end, count in own)
            for layer, own in facts["units"].items()
        }
        every = [run for own in runs.values() for run in own]
        numbers = [number for own in facts["units"].values() for run in own for number in run]
        right = (
            1 <= len(edges) < MOST_RANGES
            and _falls(edges)
            and all(type(number) is int for number in numbers)
            and all(0 <= first <= end <= len(edges) + 1 and n > 0 for first, end, n in every)
        )
        plan = {key: facts[key] for key in ("kind", "alpha", "beta") if key in facts}
        right = right and type(plan.get("kind", "")) is str
        right = right and all(type(plan.get(key, 1.0)) in (int, float) for key in ("alpha", "beta"))
        right = right and not set(facts) - {"edges", "units", "kind", "alpha", "beta"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DiffScalerError(f"no windows could be meant by {shown(facts)}") from error
    if not right:
        raise DiffScalerError(f"no windows could be meant by {shown(facts)}")
    return TaskWindows(edges, runs, plan)
