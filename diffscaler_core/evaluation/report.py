"""EvaluationReport: the rows of a table, its caption and warnings, and the files it becomes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import write_whole
from .pictures import save_grid
from .rows import Row
from .settings import EvaluationSettings

ABSENT = "–"  # not measured, or of no meaning in that row


@dataclass(frozen=True)
class Column:
    """One column of the table as people read it; files for programs hold the plain numbers.

    Attributes:
        title: An arrow says where better is.
        text: Row -> what stands there.
    """

    title: str
    text: Callable[[Row], str]


def _number(name: str, form: str = ".3f", times: float = 1) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = getattr(row, name)
        return ABSENT if value is None else format(value * times, form)

    return text


def _drift(row: Row) -> str:
    if row.drift is None or row.drift_pixels is None:
        return ABSENT
    return f"{row.drift:.2f} ({row.drift_pixels:.3f})"


def _size(row: Row) -> str:
    if row.parameters is None or row.bytes is None:
        return ABSENT
    return f"{row.parameters:,} ({row.percent:.2f} %), {row.bytes / 2**20:.2f} MiB"


def _time(row: Row) -> str:
    if row.seconds is None:
        return ABSENT
    ratio = "" if row.times_base is None else f" ({row.times_base:.2f}×)"
    return f"{row.seconds:.3g} s{ratio}"


COLUMNS = (
    Column("", lambda row: row.name),
    Column("Fréchet ↓", _number("frechet")),
    Column(
        "kernel ×1000 ↓",
        lambda row: f"{row.kernel * 1000:.2f} ± {row.kernel_spread * 1000:.2f}",
    ),
    Column("precision ↑", _number("precision", ".2f")),
    Column("recall ↑", _number("recall", ".2f")),
    Column("density ↑", _number("density", ".2f")),
    Column("coverage ↑", _number("coverage", ".2f")),
    Column("loss ↓", _number("validation_loss", ".4f")),
    Column("drift (pixels) ↓", _drift),
    Column("parameters, size", _size),
    Column("per picture", _time),
    Column("peak", lambda row: ABSENT if row.peak is None else f"{row.peak / 2**20:.0f} MiB"),
)


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """What was measured.

    Attributes:
        settings: How.
        network: The feature network's name.
        size: How many features it gives.
        note: What goes with every figure taken with it.
        rows: In the order of the table; rows of one reference lie together.
        pictures: Of each row, what the grid shows; of references the pictures themselves.
    """

    settings: EvaluationSettings
    network: str
    size: int
    note: str = ""
    rows: tuple[Row, ...] = ()
    pictures: tuple[Sequence[Tensor], ...] = field(default=(), repr=False)

    def with_row(self, row: Row, pictures: Sequence[Tensor]) -> EvaluationReport:
        """Returns the report with one more row."""
        return replace(self, rows=(*self.rows, row), pictures=(*self.pictures, pictures))

    @property
    def references(self) -> tuple[str, ...]:
        """The references' names, in order."""
        return tuple(dict.fromkeys(row.reference for row in self.rows))

    @property
    def caption(self) -> str:
        """What must stand with the table: what it was measured with, and on how much."""
        counts = {row.reference: row.references for row in self.rows}
        real = ", ".join(f"{count} of {name}" for name, count in counts.items())
        note = f" ({self.note})" if self.note else ""
        told = self.settings
        return (
            f"Feature network: {self.network}, {self.size} features{note}. {told.pictures} "
            f"pictures drawn per row, seed {told.seed}, {told.steps} steps, guidance "
            f"{told.guidance:g}; reference pictures: {real}. Figures of other networks "
            f"or numbers of pictures are not comparable."
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes figures doubtful, one line each."""
        found = []
        fewest = min((min(row.pictures, row.references) for row in self.rows), default=None)
        if fewest is not None and fewest <= self.size:
            found.append(
                f"{fewest} pictures are no more than the {self.size} features: covariances are "
                f"singular and the Fréchet distance is far too high; compare kernel distances, or "
                f"take more pictures"
            )
        elif fewest is not None and fewest < 10 * self.size:
            found.append(
                f"{fewest} pictures are few for {self.size} features: the Fréchet distance is "
                f"clearly biased upwards; compare it only with rows of this table"
            )
        found += [
            f"task {row.name!r} at strength 0 changed pixels by up to {row.drift_off:.3g}: that is "
            f"a defect, please report it"
            for row in self.rows
            if row.drift_off
        ]
        return tuple(found)

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON can hold it."""
        return {
            "network": {"name": self.network, "features": self.size, "note": self.note},
            "settings": asdict(self.settings),
            "caption": self.caption,
            "warnings": list(self.warnings),
            "rows": [row.plain() for row in self.rows],
        }

    def markdown(self) -> str:
        """Returns the table, one part per reference, with caption and warnings."""
        lines: list[str] = []
        for reference in self.references:
            titles = [f"against {reference}", *(column.title for column in COLUMNS[1:])]
            lines += [_line(titles), _line(["---"] * len(titles))]
            own = [row for row in self.rows if row.reference == reference]
            lines += [_line([column.text(row) for column in COLUMNS]) for row in own]
            lines.append("")
        lines.append(self.caption)
        lines += [f"\n**Note:** {warning}." for warning in self.warnings]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Returns all rows with plain numbers, one header line."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, [one.name for one in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.plain() for row in self.rows)
        return buffer.getvalue()

    def labelled(self) -> list[tuple[str, Sequence[Tensor]]]:
        """Returns the grid's rows with their labels: references first, then what was drawn."""
        several = len(self.references) > 1
        named = []
        for row, pictures in zip(self.rows, self.pictures, strict=True):
            what = "references" if row.kind == "ceiling" else row.name
            label = f"{row.reference}: {what}" if several else what
            named.append((label, pictures))
        return named

    def save(self, folder: str | Path) -> None:
        """Writes table.md, table.csv, table.json and grid.png, each whole or not at all."""
        folder = Path(folder)
        told = json.dumps(self.plain(), indent=1, ensure_ascii=False)
        write_whole(folder / "table.md", self.markdown().encode())
        write_whole(folder / "table.csv", self.csv().encode())
        write_whole(folder / "table.json", f"{told}\n".encode())
        save_grid(folder / "grid.png", self.labelled())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"
