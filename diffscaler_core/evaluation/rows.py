"""Row: the figures of one line of a table, and the file each is kept in until the next run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..atomic import write_whole

#: What a row is about: the references through the VAE, the base alone, or a task.
KINDS = ("ceiling", "base", "task")


@dataclass(frozen=True)
class Row:
    """One line. None: not measured, or of no meaning there.

    Attributes:
        name: Of the task; "base"; "references, through the VAE".
        kind: One of KINDS.
        reference: Which reference pictures it is compared with.
        pictures: How many were drawn.
        references: How many they were compared with.
        frechet: Fréchet distance.
        kernel: Kernel distance.
        kernel_spread: Its standard deviation over subsets.
        precision: See `distances.Manifolds`.
        recall: The same.
        density: The same.
        coverage: The same.
        validation_loss: Over reference pictures.
        drift: How far other prompts' pictures move, 1: as far as another picture.
        drift_pixels: The same in pixels, root mean square of a range 0..1.
        drift_off: The largest difference at strength 0.
        parameters: Of the task.
        percent: The same, of the base's.
        bytes: Of the task's tensors.
        seconds: Per picture, sampling without decoding.
        times_base: The same, over the base's.
        peak: Bytes taken at the peak of one batch, above what was held before.
    """

    name: str
    kind: str
    reference: str
    pictures: int
    references: int
    frechet: float
    kernel: float
    kernel_spread: float
    precision: float
    recall: float
    density: float
    coverage: float
    validation_loss: float | None = None
    drift: float | None = None
    drift_pixels: float | None = None
    drift_off: float | None = None
    parameters: int | None = None
    percent: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    times_base: float | None = None
    peak: int | None = None

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON can hold it: NaN as None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Row:
        """Returns the row that `plain` described."""
        return cls(**{one.name: plain[one.name] for one in fields(cls)})


def save_row(path: Path, key: str, row: Row) -> None:
    """Writes a finished row, whole or not at all."""
    text = json.dumps({"key": key, "row": row.plain()}, indent=1, ensure_ascii=False)
    write_whole(path, text.encode())


def saved_row(path: Path, key: str) -> Row | None:
    """Returns the row of a file if it was made of the very same things, else None."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Row.of(kept["row"]) if kept["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):  # none, cut short, or of an older version
        return None
