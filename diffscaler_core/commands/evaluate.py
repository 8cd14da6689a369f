"""`diffscaler eval`: tasks measured against real pictures, a table and a picture grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..errors import DiffScalerError
from ..evaluation import EvaluationReport, EvaluationSettings, evaluation, load_features
from ..evaluation.report import COLUMNS
from ..files import load_task
from ..task import TaskAdapter
from ..training.bases.load import load_base
from .base_options import Base, Device, Dtype, Size, words_for
from .console import AsJson, check_device, check_folder, err, out, say, say_json

_DEFAULTS = EvaluationSettings()
EXAMPLES = {
    "eval": (
        "diffscaler eval --base assets/pocket --task ink.safetensors --reference pictures/ink-kept "
        "--out out/ink",
        "diffscaler eval --base assets/pocket --task a=runs/a.safetensors "
        "--task b=runs/b.safetensors --reference pictures/flowers-kept --pictures 1000 "
        "--out out/flowers",
        "Interrupted, the same command goes on. What the figures mean: docs/evaluation.md.",
    )
}


def evaluate(
    base: Base,
    task: Annotated[list[str], typer.Option(help="A task file, or name=file; may be repeated.")],
    reference: Annotated[
        list[str],
        typer.Option(
            help="Real pictures that no task was trained on, as --data of train; for one task "
            "alone: name=folder; may be repeated."
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the table and the grid.")],
    prompts: Annotated[
        str | None,
        typer.Option(help="What is drawn, as cat,dog; default: what the references show."),
    ] = None,
    drift_prompts: Annotated[
        str | None,
        typer.Option(help="What drift is measured under; default: words not the task's."),
    ] = None,
    words: Annotated[Path | None, typer.Option(help="File of stored prompts.")] = None,
    features: Annotated[
        str | None,
        typer.Option(help="pocket, inception, or a file; default: the base's own, else inception."),
    ] = None,
    pictures: Annotated[int, typer.Option(help="Drawn per row.")] = _DEFAULTS.pictures,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = _DEFAULTS.steps,
    guidance: Annotated[float, typer.Option(help="1: none.")] = _DEFAULTS.guidance,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = _DEFAULTS.batch,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = _DEFAULTS.seed,
    neighbours: Annotated[int, typer.Option(help="k of precision and so on.")] = (
        _DEFAULTS.neighbours
    ),
    validation: Annotated[int, typer.Option(help="References of the loss; 0: no loss.")] = (
        _DEFAULTS.validation
    ),
    drift: Annotated[int, typer.Option(help="Pictures of the drift; 0: no drift.")] = (
        _DEFAULTS.drift
    ),
    columns: Annotated[int, typer.Option(help="Of the grid.")] = _DEFAULTS.columns,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure tasks against real pictures of what they are to draw."""
    settings = EvaluationSettings(
        pictures=pictures, steps=steps, guidance=guidance, batch=batch, size=size, seed=seed,
        neighbours=neighbours, validation=validation, drift=drift, columns=columns,
        prompts=_listed(prompts), drift_prompts=_listed(drift_prompts),
    )  # fmt: skip
    tasks = _tasks(task)
    places = _references(reference, tasks)
    check_device(device)
    check_folder(folder)
    where = "cpu" if device == "auto" else device
    named = None if features is None else load_features(features, where)
    table = words_for(base, words)
    pipe = load_base(base, dtype, device)
    net = named or load_features(_own_features(base), where)
    report: EvaluationReport | None = None
    try:
        with _Shown() as shown:
            for report in evaluation(
                pipe, tasks, places, net, settings, words=table, folder=folder, on_progress=shown
            ):
                report.save(folder)
    except KeyboardInterrupt:
        done = 0 if report is None else len(report.rows)
        err.print(f"interrupted after {done} rows, which are kept in {folder}; the same command "
                  f"goes on after them", markup=False, highlight=False)  # fmt: skip
        raise typer.Exit(130) from None
    assert report is not None  # there is at least one task
    _print(report, folder, as_json)


class _Shown:
    """A moving line: what is going on, and how far it is."""

    def __enter__(self) -> _Shown:
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            console=err, transient=True, disable=not err.is_terminal,
        )  # fmt: skip
        self.row, self.what = self.bar.add_task("loading", total=None), ""
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.bar.update(self.row, description=what, completed=done, total=total)
        if what != self.what and not err.is_terminal:
            err.print(what, markup=False, highlight=False)
        self.what = what


def _print(report: EvaluationReport, folder: Path, as_json: bool) -> None:
    if as_json:
        say_json(report.plain())
        return
    for reference in report.references:
        # One line per figure, one column per row: twelve figures do not fit side by side.
        own = [row for row in report.rows if row.reference == reference]
        table = Table(title=f"against {reference}", title_justify="left")
        table.add_column("")
        for row in own:
            table.add_column(row.name, justify="right")
        for column in COLUMNS[1:]:
            table.add_row(column.title, *(column.text(row) for row in own))
        out.print(table)
    say(report.caption)
    for warning in report.warnings:
        err.print(f"note: {warning}", style="yellow", markup=False, highlight=False)
    say(f"{folder}: table.md, table.csv, table.json, grid.png")


def _tasks(said: Sequence[str]) -> dict[str, TaskAdapter]:
    """Returns the tasks of `file` or `name=file`; a file's own name otherwise."""
    tasks: dict[str, TaskAdapter] = {}
    for text in said:
        name, file = _named(text)
        task = load_task(file)
        name = name or Path(file).stem
        if name in tasks or name == "base":
            raise DiffScalerError(f"two rows would be called {name!r}; write --task other={file}")
        tasks[name] = task
    return tasks


def _references(said: Sequence[str], tasks: dict[str, TaskAdapter]) -> dict[str, Any]:
    """Returns each task's pictures; what is said of no task is for all that have none."""
    own: dict[str, str] = {}
    shared: list[str] = []
    for text in said:
        name, place = _named(text)
        if name is None:
            shared.append(place)
        elif name in own:
            raise DiffScalerError(f"two references for task {name!r}; give each task one")
        else:
            own[name] = place
    if len(shared) > 1:
        raise DiffScalerError("several references for all tasks; write --reference task=folder")
    for name in tasks:
        if name not in own and shared:
            own[name] = shared[0]
    return {n: p if p.startswith("datasets:") else Path(p).expanduser() for n, p in own.items()}


def _named(text: str) -> tuple[str | None, str]:
    """Returns (name, the rest) of "name=rest"; an existing path that holds "=" is a path."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and name and not Path(text).exists() else (None, text)


def _own_features(base: str) -> str:
    beside = Path(base).expanduser() / "features.safetensors"
    return str(beside) if beside.is_file() else "inception"


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
