"""Which tasks a call runs and how strongly: rows, controls and schedules multiplied out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..attach import Row, Weight, mix_of
from ..schedule import Factors, scaled

if TYPE_CHECKING:
    from .control_request import ControlRequest


@dataclass(frozen=True)
class RowRequest:
    """What a user asked for: one entry per prompt.

    Attributes:
        rows: One entry per prompt.
        images: Pictures per prompt, or None: ask the running pipeline.
    """

    rows: tuple[Row, ...]
    images: int | None = None


def mixes_of(
    rows: Sequence[Row],
    known: Sequence[str],
    requests: Mapping[str, ControlRequest],
    controls: Mapping[str, Any],
) -> list[dict[str, Weight]]:
    """Returns what each row runs. A control task that no row names acts in all of them.

    Args:
        rows: What the user asked for.
        known: The tasks that act by hooks; others are left out.
        requests: The controls that were asked for, by task.
        controls: Those that act in this call, by task.
    """
    plain = [mix_of(row) for row in rows]
    named = {name for mix in plain for name in mix}
    mixes = []
    for mix in plain:
        own = {name: weight for name, weight in mix.items() if name in known}
        acting = {n: c for n, c in controls.items() if n in mix or n not in named}
        mixes.append(with_controls(own, requests, acting))
    return mixes


def with_controls(
    weights: Mapping[str, Weight],
    requests: Mapping[str, ControlRequest],
    controls: Mapping[str, Any],
) -> dict[str, Weight]:
    """Returns strengths with those of the controls multiplied in; arguments as in `mixes_of`."""
    acting = {n: requests[n].weight(weights.get(n, 1.0)) for n in controls}
    return {n: w for n, w in weights.items() if n not in requests} | acting


def times(weights: Mapping[str, Weight], factors: Mapping[str, Factors]) -> dict[str, Weight]:
    """Returns strengths with the factors of schedules multiplied in."""
    return {name: scaled(w, factors[name]) if name in factors else w for name, w in weights.items()}
