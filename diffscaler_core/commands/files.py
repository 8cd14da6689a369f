"""Commands about files: what one holds, and one task made of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..combine import combine_tasks
from ..describe_file import describe_file, file_row, file_values
from ..errors import DiffScalerError, TaskFileError
from ..files import load_task, save_task
from .console import AsJson, check_out, facts_of, in_short, numbers, out, say, say_json, spans

EXAMPLES = {
    "info": (
        "diffscaler info ink.safetensors",
        "diffscaler info ink.safetensors my_lora.safetensors tuned.safetensors",
        "diffscaler info ink.safetensors --layers --json",
    ),
    "combine": (
        "diffscaler combine ink.safetensors neon.safetensors -o both.safetensors",
        "diffscaler combine ink.safetensors neon.safetensors --weights 0.7,0.3 --name mine "
        "-o mine.safetensors",
        "diffscaler combine my_task.safetensors my_task.safetensors --weights 0.3,1 "
        "--ranges :0,0: -o rising.safetensors",
        "With --ranges each acts at some noise levels alone: docs/time_ranges.md.",
    ),
}


def info(
    files: Annotated[list[Path], typer.Argument(help="Any safetensors files.")],
    layers: Annotated[bool, typer.Option("--layers", help="Name every layer's rank.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what a file holds: a task, a LoRA of any kind, a checkpoint; of several, a table."""
    if as_json:
        told = [file_values(file, layers) for file in files]
        shown = told[0] if len(files) == 1 else told
        say_json(shown)
    elif len(files) == 1 or layers:
        say("\n\n".join(describe_file(file, layers) for file in files))
    else:
        _table(files)


def _table(files: list[Path]) -> None:
    """Prints a line for each file, and then complains of those that are none."""
    table = Table("file", "kind", "made for", "rank", "layers", "parameters", "size", "dtypes")
    bad: list[DiffScalerError] = []
    for file in files:
        try:
            table.add_row(*map(escape, file_row(file)))
        except TaskFileError as error:
            bad.append(error)
    Console(width=None if out.is_terminal else 200).print(table)
    if bad:
        raise DiffScalerError("\n".join(map(str, bad)))


def combine(
    files: Annotated[list[Path], typer.Argument(help="Two or more task files of one base.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The combined task file.")],
    weights: Annotated[
        str | None, typer.Option(help="One strength per file, as in 0.7,0.3; default 1 each.")
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(
            help="Noise levels that each file acts at, low:high in log-SNR, or all: as in :0,0:"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new task's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one task of several: exactly what they do together."""
    check_out(to)
    tasks = [load_task(file) for file in files]
    combined = combine_tasks(
        tasks, numbers("weights", weights), name, ranges=spans("ranges", ranges)
    )
    save_task(combined, to)
    if as_json:
        say_json(facts_of(combined, to))
        return
    say(f"{to}: {in_short(combined)}")
