"""What a request asks for, what it gets back, and which requests may share a batch."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: How many tasks one picture may mix, and how strong each may be.
MOST_TASKS, STRONGEST = 8, 10.0
#: Names become file names, so nothing else is let through.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class RequestError(ValueError):
    """A request that cannot be served, and the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class PictureRequest:
    """One picture.

    Attributes:
        prompt: A text; for the pocket base a word.
        tasks: Task name -> strength; empty: the base alone.
        seed: Of this picture's noise. It decides the picture, whoever else is in the batch.
        steps: Sampling steps.
        guidance: Classifier-free guidance scale.
        width: In pixels.
        height: In pixels.
    """

    prompt: str
    tasks: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    steps: int = 20
    guidance: float = 3.5
    width: int = 128
    height: int = 128

    @property
    def batch_key(self) -> Hashable:
        """What all rows of one pipeline call have in common; prompt, task and seed differ freely.

        A call has one schedule, one guidance and one shape of latents.
        """
        return self.steps, self.guidance, self.width, self.height

    @property
    def task_key(self) -> Hashable:
        """`batch_key` for a server that cannot mix tasks: the tasks must be the same, too."""
        return self.batch_key, tuple(sorted(self.tasks.items()))


@dataclass(frozen=True)
class Facts:
    """How a picture came about.

    Attributes:
        rows: Pictures in its batch.
        tasks: Different tasks in its batch.
        misses: Tasks that had to be loaded for its batch.
        seconds: The batch's time, loading included.
        waited: Seconds this request waited for its batch to begin.
        replica: Who drew it.
    """

    rows: int
    tasks: int
    misses: int
    seconds: float
    waited: float = 0.0
    replica: str = ""

    def headers(self) -> dict[str, str]:
        """Returns the facts as HTTP headers."""
        return {
            f"X-Batch-{name.capitalize()}": f"{value:.6g}"
            if isinstance(value, float)
            else str(value)
            for name, value in vars(self).items()
        }


def tasks_of(given: Any) -> dict[str, float]:
    """Returns the tasks a client named: "ink", {"ink": 0.7, "neon": 0.3} or None.

    Raises:
        RequestError: Not a name, too many, or a strength that is no sensible number.
    """
    named = {given: 1.0} if isinstance(given, str) else dict(given or {})
    if len(named) > MOST_TASKS:
        raise RequestError(422, f"{len(named)} tasks for one picture; at most {MOST_TASKS}")
    for name, strength in named.items():
        if not _NAME.fullmatch(name):
            raise RequestError(
                404, f"no task {name[:100]!r}: names have letters, digits, '.', '_', '-'"
            )
        if not math.isfinite(strength) or abs(strength) > STRONGEST:
            raise RequestError(
                422, f"strength {strength} of task {name!r} is not in ±{STRONGEST:g}"
            )
    return {name: float(strength) for name, strength in named.items()}
