"""The commands of `diffscaler`. A user's mistake is one line and exit code 1, never a traceback.

To add a command, write its function in the file of its subject and one line in the list below.
"""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from ..errors import DiffScalerError
from ..training.command.train import EXAMPLES, train
from ..version import __version__
from .console import err, say
from .convert import convert
from .evaluate import EXAMPLES as EVALUATION_EXAMPLES
from .evaluate import evaluate
from .extract import average, extract, resize
from .files import combine, info


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
app.command()(info)
app.command()(combine)
app.command()(extract)
app.command()(resize)
app.command()(average)
app.command()(convert)
app.command("eval", epilog=EVALUATION_EXAMPLES, no_args_is_help=True)(evaluate)


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
        say(__version__)
        raise typer.Exit


def _complain(message: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # of a distributed launch: every process finds the same, one says so
    err.print(f"diffscaler: {message}", style="red", markup=False, highlight=False)
