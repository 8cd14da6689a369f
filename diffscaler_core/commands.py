"""The commands of `diffscaler`. A user's mistake is one line and exit code 1, never a traceback."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from .combine import combine_tasks
from .describe import describe
from .errors import DiffScalerError
from .files import load_task, read_info, save_task
from .training.command.train import EXAMPLES, train
from .version import __version__

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class _OneLineErrors(TyperGroup):
    """Turns what we refuse to do, and what the disk refuses, into one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FileNotFoundError as error:
            _complain(f"no file {error.filename!r}")
        except (DiffScalerError, OSError) as error:
            _complain(str(error))
        raise typer.Exit(1)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="One frozen diffusion model, many tiny tasks.",
    pretty_exceptions_show_locals=False,
)
app.command(epilog=EXAMPLES, no_args_is_help=True)(train)


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
) -> None:
    """One frozen diffusion model, many tiny tasks."""
    level = logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=err, show_time=False, show_path=False)
    if not verbose:  # other libraries' warnings are not about what was asked for
        handler.addFilter(lambda one: one.name.startswith("diffscaler") or one.levelno > level)
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A task file (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Say what a task file holds."""
    if not as_json:
        out.print(describe(load_task(file)), markup=False, highlight=False)
        return
    facts = read_info(file)
    facts["modelspec"] = {k: v for k, v in facts["modelspec"].items() if k != "thumbnail"}
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@app.command()
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
    combined = combine_tasks(tasks, _numbers(weights), name)
    save_task(combined, to)
    out.print(f"{to}: {describe_short(combined)}", highlight=False, markup=False)


def describe_short(task: Any) -> str:
    """Returns a task in a few words: name, layers, parameters, bytes."""
    return (
        f"task {task.name!r}, {len(task.layers)} layers, {task.num_parameters:,} parameters, "
        f"{task.nbytes / 2**20:.2f} MiB"
    )


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise DiffScalerError(f"weights {text!r} are no numbers; write them as 0.7,0.3") from None


def _complain(message: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # of a distributed launch: every process finds the same, one says so
    err.print(f"diffscaler: {message}", style="red", markup=False, highlight=False)
