"""Automatic rank: on which layers a task's numbers are best spent. Arithmetic; knows no model.

A unit of rank in a layer is one row of D with one column of U: C_in·k + C_out numbers. What it is
worth there is read off the spectrum of that layer's gradient G = dL/dW at the untouched base: a
subspace of rank r can follow its r largest singular directions, so unit i is worth σᵢ², its share
of ‖G‖². The units are then bought by worth per number until the budget is spent. That is ours;
near to it are

    AdaLoRA (arXiv:2303.10512)  spends one budget by importance too, but while it trains, on
                                factors that are kept orthogonal; here ranks are settled before
    EVA (arXiv:2410.07170)      settles them before, by the variance of each layer's inputs
    LoRA-GA (arXiv:2407.05000)  takes the first directions of G as the start of U and D

How the gradient is taken stands in `training/rank_choice.py`. Shapes: G (C_out, C_in·k).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import DiffScalerError, shown

#: What `rank` is, where the ranks are to be chosen.
AUTO = "auto"
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


@dataclass(frozen=True)
class Spectrum:
    """What subspaces are worth in one layer.

    Attributes:
        gains: Worth of the first, second, … unit of rank, not rising, not negative.
        cost: Numbers a unit takes.
        confirmed: Share of the worth that the other half of the pictures confirms, 0 to 1.
    """

    gains: tuple[float, ...]
    cost: int
    confirmed: float = 1.0

    @property
    def total(self) -> float:
        """Worth of all units."""
        return sum(self.gains)

    def kept(self, rank: int) -> float:
        """Returns the share of the layer's worth that a rank has."""
        return sum(self.gains[:rank]) / self.total if self.total else 0.0


@dataclass(frozen=True)
class RankChoice:
    """Ranks for a task's layers, and what they were chosen by.

    Attributes:
        ranks: Target -> rank, 0 leaves the subspace out; `new_task`'s `rank_pattern`.
        spectra: Target -> its spectrum.
        budget: Numbers that the subspaces may take.
        pictures: How many pictures it was chosen by; 0: unknown.
    """

    ranks: Mapping[str, int]
    spectra: Mapping[str, Spectrum]
    budget: int
    pictures: int = 0

    @property
    def spent(self) -> int:
        """Numbers that the subspaces take."""
        return sum(rank * self.spectra[name].cost for name, rank in self.ranks.items())

    @property
    def kept(self) -> float:
        """Share of all layers' worth that the ranks have."""
        total = sum(spectrum.total for spectrum in self.spectra.values())
        own = sum(self.spectra[n].kept(r) * self.spectra[n].total for n, r in self.ranks.items())
        return own / total if total else 0.0

    @property
    def confirmed(self) -> float:
        """Share of all layers' worth that both halves of the pictures agree on."""
        total = sum(spectrum.total for spectrum in self.spectra.values())
        own = sum(spectrum.confirmed * spectrum.total for spectrum in self.spectra.values())
        return own / total if total else 0.0

    @property
    def usual(self) -> int:
        """The rank that most layers with a subspace have."""
        own = [rank for rank in self.ranks.values() if rank]
        return max(sorted(set(own)), key=own.count, default=1)

    def summary(self) -> str:
        """Returns the choice in one line."""
        ranks = [rank for rank in self.ranks.values() if rank]
        spread = f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no subspace at all"
        return (
            f"{spread} on {len(ranks)} of {len(self.ranks)} layers, {self.spent:,} of "
            f"{self.budget:,} numbers; they hold {self.kept:.0%} of the gradient's energy, "
            f"{self.confirmed:.0%} of it confirmed"
        )

    def report(self) -> str:
        """Returns the choice as text: in one line, then one line per layer.

        Of each layer: its rank, its share of all layers' energy, the share of its own energy that
        the rank holds, and the rank that would hold 90 %.
        """
        total = sum(spectrum.total for spectrum in self.spectra.values()) or 1.0
        width = max((len(name) for name in self.ranks), default=5)
        lines = [self.summary(), f"{'layer':<{width}}  rank  of all   kept  rank for 90 %"]
        for name, rank in self.ranks.items():
            own = self.spectra[name]
            lines.append(
                f"{name:<{width}}  {rank:>4}  {own.total / total:>6.1%} {own.kept(rank):>6.0%}  "
                f"{rank_at(own.gains, 0.9):>13}"
            )
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """Returns the choice as JSON can hold it."""
        return {
            "ranks": dict(self.ranks),
            "spectra": {
                name: {"gains": list(own.gains), "cost": own.cost, "confirmed": own.confirmed}
                for name, own in self.spectra.items()
            },
            "budget": self.budget,
            "pictures": self.pictures,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> RankChoice:
        """Returns the choice that `state` described."""
        spectra = {
            name: Spectrum(tuple(own["gains"]), int(own["cost"]), float(own["confirmed"]))
            for name, own in state["spectra"].items()
        }
        return cls(dict(state["ranks"]), spectra, int(state["budget"]), int(state["pictures"]))


def rank_at(energies: Sequence[float] | Tensor, share: float) -> int:
    """Returns the smallest rank whose largest energies (σ²) make up a share of all of them."""
    ordered = sorted((float(energy) for energy in energies), reverse=True)
    wanted, held = share * sum(ordered), 0.0
    for rank, energy in enumerate(ordered):
        if held >= wanted * (1 - 1e-12):
            return rank
        held += energy
    return len(ordered)


def allocate(
    spectra: Mapping[str, Spectrum], budget: int, most: int | None = None
) -> dict[str, int]:
    """Returns the ranks worth most under a budget: target -> rank.

    Units are bought by worth per number. A layer's units cost the same and are worth less and less,
    so no other choice of the same numbers is worth more, but for what the last unit that no longer
    fits leaves over: that is spent on cheaper layers. Ties go to the earlier layer. A unit that is
    worth nothing is not bought, so the budget need not be spent.

    Args:
        spectra: What units are worth, and cost.
        budget: Numbers there are.
        most: Largest rank of a layer; None: as many as its spectrum has units.
    """
    ranks = dict.fromkeys(spectra, 0)
    queue: list[tuple[float, int, str]] = []

    def offer(place: int, name: str) -> None:
        own, rank = spectra[name], ranks[name]
        limit = len(own.gains) if most is None else min(most, len(own.gains))
        if rank < limit and own.gains[rank] > 0:
            heapq.heappush(queue, (-own.gains[rank] / own.cost, place, name))

    for place, name in enumerate(spectra):
        offer(place, name)
    left = budget
    while queue:
        _, place, name = heapq.heappop(queue)
        if spectra[name].cost <= left:
            left -= spectra[name].cost
            ranks[name] += 1
            offer(place, name)
    return ranks


def budget_of(
    said: int | str, *, units: Mapping[str, int], limits: Mapping[str, int], fixed: int, base: int
) -> int:
    """Returns how many numbers the subspaces may take.

    Args:
        said: 8 (a whole number): as many as rank 8 everywhere; "0.4%": that share of the base's
            numbers, for scales, shifts and subspaces; "20k" or "1.5M": so many numbers for those.
        units: Target -> numbers a unit of rank takes.
        limits: Target -> its largest rank.
        fixed: Numbers that scales and shifts take.
        base: Numbers of the base.

    Raises:
        DiffScalerError: It says nothing of the kind, or leaves nothing for subspaces.
    """
    kind, value = parsed_budget(said)
    if kind == "rank":
        return sum(min(int(value), limits[name]) * unit for name, unit in units.items())
    whole = round(value * base) if kind == "share" else round(value)
    if whole - fixed < min(units.values()):
        raise DiffScalerError(
            f"rank_budget {said!r} is {whole:,} numbers; scales and shifts take {fixed:,} of them, "
            f"and one unit of rank {min(units.values()):,} more: raise it, adapt fewer layers "
            f"(targets), or take method lora, which has subspaces alone"
        )
    return whole - fixed


def parsed_budget(said: int | str) -> tuple[str, float]:
    """Returns a budget as ("rank", R), ("share", of the base) or ("numbers", how many).

    Raises:
        DiffScalerError: It is none of them.
    """
    text = str(said).strip().lower()
    number, kind = text, "rank"
    if text.endswith("%"):
        number, kind = text[:-1], "share"
    elif text[-1:] in ("k", "m"):
        number, kind = text[:-1], "numbers"
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    whole = kind != "rank" or (value.is_integer() and not isinstance(said, float))
    if isinstance(said, bool) or not 0 < value < float("inf") or not whole:
        raise DiffScalerError(
            f"rank_budget must be a rank (8: as many numbers as rank 8 everywhere), a share of the "
            f"base ('0.4%') or a count ('20k', '1.5M'), got {shown(said)}"
        )
    if kind == "numbers":
        value *= _UNITS[text[-1]]
    return kind, value / 100 if kind == "share" else value
