"""Ranking: how well each task fits a picture, as numbers, table and answer. Knows no model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

#: What tables and nodes call it when nothing fits.
NONE = "none of them"


@dataclass(frozen=True)
class Fit:
    """One candidate.

    Attributes:
        name: Of the candidate.
        task: Of its task; None: the base.
        prompt: Of its prompt; None: it is told nothing.
        probes: How many it got.
        difference: Mean over them of its error minus the base's; below 0: it denoises better.
        standard_error: Of that mean.
        share: By how much of the base's error, over the same probes, its own is lower.
    """

    name: str
    task: str | None
    prompt: str | None
    probes: int
    difference: float
    standard_error: float
    share: float

    def fits(self, threshold: float, least: float = 0.0) -> bool:
        """Says whether it beats the base by more than `threshold` standard errors and `least`.

        Args:
            threshold: Standard errors of the difference.
            least: Share of the base's error.
        """
        return self.difference < -threshold * self.standard_error and self.share >= least

    @property
    def sigmas(self) -> float:
        """By how many standard errors it beats the base; below 0: the base is better."""
        if not self.standard_error:
            return math.copysign(math.inf, -self.difference) if self.difference else 0.0
        return -self.difference / self.standard_error


@dataclass(frozen=True)
class Ranking:
    """All candidates for one picture.

    Attributes:
        fits: Best first: those that were probed longest, and among them by their difference.
        base_error: The base's own mean error, over all probes.
        threshold: See `Fit.fits`.
        least: The same.
        margin: Mean and standard error of the second's error minus the best's, over the probes
            that both got; None: there is only one.
        forwards: Rows that went through the model.
        full_forwards: What they would be if every candidate had got all probes.
    """

    fits: tuple[Fit, ...]
    base_error: float
    threshold: float
    least: float
    margin: tuple[float, float] | None
    forwards: int
    full_forwards: int

    @property
    def best(self) -> Fit:
        """The candidate that fits best, whether or not it fits."""
        return self.fits[0]

    @property
    def answer(self) -> str | None:
        """Name of the best candidate, or None: it does not beat the base beyond its noise."""
        return self.best.name if self.best.fits(self.threshold, self.least) else None

    def table(self) -> str:
        """Returns it as a few lines of text."""
        width = max(len("candidate"), *(len(fit.name) for fit in self.fits))
        lines = [f"{'candidate':{width}}  error - base  std. error  std. errors  better  probes"]
        lines += [
            f"{fit.name:{width}}  {fit.difference:+12.5f}  {fit.standard_error:10.5f}  "
            f"{fit.sigmas:+11.1f}  {fit.share:+6.1%}  {fit.probes:6d}"
            for fit in self.fits
        ]
        return "\n".join([self.sentence(), "", *lines, "", self._costs()])

    def sentence(self) -> str:
        """Returns the answer in a line."""
        best = self.best
        if self.answer is None:
            if best.difference >= 0:
                return f"{NONE}: {best.name} comes closest, and denoises no better than the base"
            asked = f"{self.threshold:g} are asked for"
            asked += f", and {self.least:.0%}" if self.least else ""
            said = f"{NONE}: {best.name} comes closest, but beats the base by {_by(best)} only"
            return f"{said} ({asked})"
        said = f"{best.name}: beats the base by {_by(best)}"
        if self.margin is None:
            return said
        gap, error = self.margin
        return f"{said}, {self.fits[1].name} by {gap:.5f} ± {error:.5f}"

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON can hold it."""
        return {
            "answer": self.answer,
            "best": self.best.name,
            "margin": None if self.margin is None else self.margin[0],
            "margin_standard_error": None if self.margin is None else self.margin[1],
            "threshold": self.threshold,
            "least": self.least,
            "base_error": self.base_error,
            "forwards": self.forwards,
            "full_forwards": self.full_forwards,
            "ranking": [asdict(fit) for fit in self.fits],
        }

    def _costs(self) -> str:
        return (
            f"base error {self.base_error:.5f}; {self.forwards} forward passes, "
            f"{self.full_forwards} if nothing were dropped"
        )


def _by(fit: Fit) -> str:
    return f"{fit.sigmas:.1f} standard errors ({fit.share:.1%})"
