"""Schedules: how strong a task is over sampling time. Pure numbers; no model, no sampler.

A schedule is a factor on a task's strength, per part, as a function of the percent of sampling
time: 0 is pure noise, 1 the finished picture, on the scale of ComfyUI's `start_percent`, whatever
the sampler and however many its steps. What percent a step is at is the host's to say.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .affiner import PARTS
from .errors import DiffScalerError, shown, unknown
from .strengths import read_number

Point = tuple[float, float]
Points = tuple[Point, ...]
#: Of the parts, in the order of PARTS.
Factors = tuple[float, float, float]

#: Ways from one point to the next, as the share of the change that is done at a share t in 0..1.
INTERPOLATIONS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "step": lambda t: 0.0,
    "smooth": lambda t: t * t * (3 - 2 * t),
}

#: What a part without points has.
_ONE: Points = ((0.0, 1.0),)
#: A percent comes from a sampler's float32, which must not miss its point by the last digit.
_NEAR = 1e-6
_ENTRY = re.compile(r"(?:(?P<part>[A-Za-z_]+)\s+)?(?P<percent>[^\s:]+)\s*:\s*(?P<factor>\S+)")


@dataclass(frozen=True)
class Schedule:
    """Factors on a task's strength over sampling time. Immutable, hashable, compared by value.

    Each part has its own points; a part without points keeps the factor 1. Before the first point
    and after the last the factor stays. Two points at one percent make a jump; there the second
    counts.

    Attributes:
        scale: Points (percent in 0..1, factor), put in order of percent.
        shift: The same for the shift.
        subspace: The same for the subspace.
        interpolation: What is between points, a name in INTERPOLATIONS: "linear"; "step" (the last
            point's factor until the next one); "smooth" (level at the points).

    Raises:
        UnknownNameError: No such interpolation.
        DiffScalerError: A percent outside 0..1, a factor that is not finite, or three points at one
            percent.
    """

    scale: Points = ()
    shift: Points = ()
    subspace: Points = ()
    interpolation: str = "linear"

    def __post_init__(self) -> None:
        """Puts the points in order and refuses what cannot be meant."""
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        for part in PARTS:
            object.__setattr__(self, part, _ordered(getattr(self, part), part))

    @classmethod
    def of(cls, given: Any, interpolation: str = "linear") -> Schedule:
        """Returns the schedule that a user means.

        Args:
            given: A Schedule; text for `parse`; points [(percent, factor), …] for all parts; or
                {part: points}.
            interpolation: Unless `given` says.

        Raises:
            DiffScalerError: Nothing of the kind.
        """
        if isinstance(given, Schedule):
            return given
        if isinstance(given, str):
            return cls.parse(given, interpolation)
        by_part = given if isinstance(given, Mapping) else dict.fromkeys(PARTS, given)
        for part in by_part:
            if part not in PARTS:
                raise unknown("part", part, PARTS)
        points = {part: _as_points(own) for part, own in by_part.items()}
        return cls(**points, interpolation=interpolation)

    @classmethod
    def parse(cls, text: str, interpolation: str = "linear") -> Schedule:
        """Returns the schedule of lines such as "0.3: 1", percent: factor.

        A line (or what lies between commas) is one of

        - `0.3: 1`: a point of every part that has no lines of its own;
        - `scale 0.3: 1`: a point of one part: scale, shift or subspace;
        - `step`, `linear` or `smooth`: what is between points.

        Empty lines and what follows a # are left out.

        Args:
            text: The lines.
            interpolation: Unless the text says.

        Raises:
            DiffScalerError: A line that cannot be read, which the message names, or no point.
        """
        own: dict[str, list[Point]] = {}
        for row, line in enumerate(text.splitlines(), start=1):
            for entry in re.split("[,;]", line.partition("#")[0]):
                word = entry.strip()
                if word in INTERPOLATIONS:
                    interpolation = word
                elif word:
                    part, point = _point(word, f"line {row} of the schedule, {shown(word)}")
                    own.setdefault(part, []).append(point)
        if not own:
            raise DiffScalerError(
                "a schedule has at least one line 'percent: factor', such as '0.3: 1'"
            )
        points = {part: tuple(own.get(part, own.get("", ()))) for part in PARTS}
        return cls(**points, interpolation=interpolation)

    @classmethod
    def window(cls, start: float = 0.0, end: float = 1.0, fade: float = 0.0) -> Schedule:
        """Returns factor 1 from `start` until just before `end`, or to the last step, else 0.

        Args:
            start: Percent in 0..1.
            end: Percent in 0..1.
            fade: Percent, within the window, over which the factor rises from 0 at its start and
                falls to 0 at its end; an edge at 0 or 1 does not fade. 0: at once.

        Raises:
            DiffScalerError: Not 0 <= start < end <= 1, or fades longer than the window.
        """
        if not 0 <= start < end <= 1:
            raise DiffScalerError(
                f"a window is 0 <= start < end <= 1 of sampling time, got {start:g} and {end:g}"
            )
        edges = (start > 0) + (end < 1)
        if not 0 <= fade * edges <= end - start + 1e-9:
            raise DiffScalerError(
                f"{edges} fades of {fade:g} do not fit a window from {start:g} to {end:g}"
            )
        if not fade:
            rise = [(0.0, 0.0), (start, 1.0)] if start > 0 else [(0.0, 1.0)]
            return cls.of([*rise, (end, 0.0)] if end < 1 else rise, "step")
        rise = [(start, 0.0), (min(start + fade, end), 1.0)] if start > 0 else [(0.0, 1.0)]
        fall = [(max(end - fade, rise[-1][0]), 1.0), (end, 0.0)] if end < 1 else []
        return cls.of([*rise, *fall])

    def at(self, percent: float) -> Factors:
        """Returns the factors of (scale, shift, subspace) at a percent of sampling time."""
        between = INTERPOLATIONS[self.interpolation]
        scale = _value(self.scale, percent, between)
        shift = scale if self.shift == self.scale else _value(self.shift, percent, between)
        if self.subspace == self.scale:
            return scale, shift, scale
        return scale, shift, _value(self.subspace, percent, between)

    def __str__(self) -> str:
        """Returns the text that `parse` reads back as the same schedule."""
        lines = [] if self.interpolation == "linear" else [self.interpolation]
        if self.scale == self.shift == self.subspace:
            return "\n".join([*lines, *_lines("", self.scale)])
        for part in PARTS:
            if getattr(self, part) != _ONE:
                lines += _lines(f"{part} ", getattr(self, part))
        return "\n".join(lines)


def scaled(weight: float | Mapping[str, float], factors: Factors) -> dict[str, float]:
    """Returns a strength, a number or one per part (absent ones 1), times factors of the parts."""
    own = weight if isinstance(weight, Mapping) else dict.fromkeys(PARTS, weight)
    return {part: float(own.get(part, 1.0)) * f for part, f in zip(PARTS, factors, strict=True)}


def _ordered(points: Iterable[Point], part: str) -> Points:
    """Returns points by percent, those at one percent as they came; checked."""
    ordered = sorted(((float(p), float(f)) for p, f in points), key=lambda point: point[0])
    for percent, factor in ordered:
        if not (0 <= percent <= 1 and math.isfinite(factor)):
            raise DiffScalerError(
                f"a point of a schedule is a percent of sampling time in 0..1 and a finite factor, "
                f"got {percent:g}: {factor:g} for {part}"
            )
    for (first, _), (third, _) in zip(ordered, ordered[2:], strict=False):
        if first == third:
            raise DiffScalerError(
                f"a schedule has at most two points at one percent, for a jump; {part} has more at "
                f"{first:g}"
            )
    return tuple(ordered) or _ONE


def _as_points(given: Any) -> Points:
    """Returns pairs of numbers as points."""
    try:
        return tuple((float(percent), float(factor)) for percent, factor in given)
    except (TypeError, ValueError) as error:
        raise DiffScalerError(
            f"a schedule is text such as '0: 0, 0.3: 1', or points [(percent, factor), …], got "
            f"{shown(given)}"
        ) from error


def _point(word: str, where: str) -> tuple[str, Point]:
    """Returns the part ("" for all) and the point that an entry names."""
    found = _ENTRY.fullmatch(word)
    if found is None:
        raise DiffScalerError(
            f"{where}: write 'percent: factor', such as '0.3: 1' or 'scale 0.3: 1', or one of "
            f"{', '.join(INTERPOLATIONS)}"
        )
    part = found["part"] or ""
    if part and part not in PARTS:
        raise DiffScalerError(f"{where}: no part {shown(part)}; parts are {', '.join(PARTS)}")
    percent, factor = (read_number(found[name], where) for name in ("percent", "factor"))
    if not 0 <= percent <= 1:
        raise DiffScalerError(
            f"{where}: a percent of sampling time is in 0..1 (0 pure noise, 1 the picture), got "
            f"{percent:g}"
        )
    return part, (percent, factor)


def _value(points: Sequence[Point], percent: float, between: Callable[[float], float]) -> float:
    """Returns the factor at a percent; at a point exactly the point's."""
    after = bisect_right(points, percent + _NEAR, key=lambda point: point[0])
    if after == 0 or after == len(points):
        return points[max(after - 1, 0)][1]
    (start, first), (end, last) = points[after - 1 : after + 1]
    return first + (last - first) * between(max(percent - start, 0.0) / (end - start))


def _lines(prefix: str, points: Points) -> list[str]:
    return [f"{prefix}{_short(percent)}: {_short(factor)}" for percent, factor in points]


def _short(number: float) -> str:
    return repr(number).removesuffix(".0")
