"""The commands of `diffscaler`. A user's mistake is one line and exit code 1, never a traceback.

To add a command, write its function in the file of its subject and one line in COMMANDS. What a
command needs is imported when it is called: `diffscaler --help` does not wait for torch.
"""

from __future__ import annotations

import logging
import os
import traceback
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from ..errors import DiffScalerError
from ..version import __version__
from .console import err, say
from .table import COMMANDS, Later

_NOTES = """Every command has examples: diffscaler COMMAND --help.

Exit codes: 0 done · 1 refused, and stderr says why in a line · 2 wrong usage · \
130 stopped by Ctrl-C, 143 by SIGTERM.

What was asked for is on stdout, all else on stderr; with --json stdout is one JSON value."""


class _Group(TyperGroup):
    """Turns what we refuse to do, and what the disk refuses, into one line."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {**self.commands, **{name: Later(name) for name in COMMANDS}}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("stopped")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # whoever read our output has had enough of it; typer ends quietly
        except (DiffScalerError, ModuleNotFoundError, OSError) as error:
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            _complain(_in_words(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    epilog=_NOTES,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_show_locals=False,
)


@app.callback(invoke_without_command=True)
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", metavar="")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", metavar="")] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="DIFFSCALER_DEBUG",
            help="Show where an error came from.",
            metavar="",
        ),
    ] = False,
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


def _in_words(error: Exception) -> str:
    """Returns an error as a line for who made the mistake."""
    if isinstance(error, ModuleNotFoundError):
        return f"this needs the library {error.name}; run: pip install 'diffscaler[all]'"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no file {error.filename!r}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}"
    return str(error)


def _complain(message: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return  # of a distributed launch: every process finds the same, one says so
    err.print(f"diffscaler: {message}", style="red", markup=False, highlight=False)
