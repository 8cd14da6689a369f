"""Timing: variants take turns in random order, so that a noisy machine hurts all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


def measure(call: Callable[[], object], device: str) -> float:
    """Returns the wall time of one call in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@dataclass(frozen=True)
class Ratio:
    """How much longer one variant takes than another.

    Attributes:
        fastest: The fastest call of the one over the fastest of the other.
        median: Of the ratios within each round, which a slow phase of the machine moves least.
        low: The quartile below it.
        high: The quartile above it.
    """

    fastest: float
    median: float
    low: float
    high: float


class Turns:
    """The times of several variants.

    Args:
        seconds: Variant -> the fastest call of each round.
    """

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = dict(seconds)

    def fastest(self, name: str) -> float:
        """Returns the seconds of the fastest call of all rounds."""
        return min(self.seconds[name])

    def ratio(self, name: str, to: str) -> Ratio:
        """Returns how much longer `name` took than `to`."""
        each = [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]
        low, median, high = quartiles(each)
        return Ratio(self.fastest(name) / self.fastest(to), median, low, high)

    def table(self, to: str, title: str = "variant", per: float = 1.0) -> str:
        """Returns a Markdown table of all variants, as ratios to one of them.

        Args:
            to: The variant that is 1.
            title: Head of the first column.
            per: Milliseconds are of this share of a call.
        """
        lines = [
            f"| {title} | fastest, ms | ratio, fastest | ratio, median of {self.rounds} rounds "
            f"(quartiles) |",
            "|---|---|---|---|",
        ]
        for name in self.seconds:
            ratio = self.ratio(name, to)
            lines.append(
                f"| {name} | {1000 * per * self.fastest(name):.2f} | {ratio.fastest:.3f} | "
                f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f}) |"
            )
        return "\n".join(lines)

    def goals(self, *comparisons: tuple[str, str, str]) -> str:
        """Returns a Markdown table of comparisons: a variant, to which, and what is wished for."""
        lines = ["| time of | to | median (quartiles) | goal |", "|---|---|---|---|"]
        for name, to, goal in comparisons:
            if name in self.seconds and to in self.seconds:
                ratio = self.ratio(name, to)
                spread = f"{ratio.median:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"
                lines.append(f"| {name} | {to} | {spread} | {goal} |")
        return "\n".join(lines)

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(next(iter(self.seconds.values())))


def take_turns(
    variants: Mapping[str, Callable[[], object]], device: str, rounds: int, calls: int = 2
) -> Turns:
    """Times every variant in every round, after one round that is not counted.

    Args:
        variants: Name -> what to call.
        device: "cpu", or "cuda", which is waited for.
        rounds: How many rounds.
        calls: Calls of a variant in a turn; the fastest counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            fastest = min(measure(variants[name], device) for _ in range(calls))
            if turn:
                seconds[name].append(fastest)
    return Turns(seconds)
