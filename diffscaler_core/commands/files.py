"""Commands about task files: what one holds, and one made of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..combine import combine_tasks
from ..describe import describe
from ..files import load_task, read_info, save_task
from .console import in_short, numbers, say


def info(
    file: Annotated[Path, typer.Argument(help="A task file (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what a task file holds."""
    if not as_json:
        say(describe(load_task(file)))
        return
    facts = read_info(file)
    facts["modelspec"] = {k: v for k, v in facts["modelspec"].items() if k != "thumbnail"}
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def combine(
    files: Annotated[list[Path], typer.Argument(help="Two or more task files of one base.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The combined task file.")],
    weights: Annotated[
        str | None, typer.Option(help="One strength per file, as in 0.7,0.3; default 1 each.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new task's name.")] = None,
) -> None:
    """Make one task of several: exactly what they do together."""
    tasks = [load_task(file) for file in files]
    combined = combine_tasks(tasks, numbers("weights", weights), name)
    save_task(combined, to)
    say(f"{to}: {in_short(combined)}")
