"""COMMANDS: every command, and how it is found when it is called. Imports none of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

TRAIN, LOOK, CONVERT, MEASURE, DRAW = "Train", "Look", "Convert", "Measure", "Draw"


@dataclass(frozen=True)
class Place:
    """Where a command is, and what `diffscaler --help` says of it.

    Attributes:
        panel: Which commands it stands among.
        module: Relative to this package; holds the function, and EXAMPLES: its name -> the lines
            that end its help.
        function: The command itself. Its docstring begins with `help`.
        help: One sentence.
    """

    panel: str
    module: str
    function: str
    help: str


COMMANDS = {
    "train": Place(
        TRAIN,
        "..training.command.train",
        "train",
        "Train a task on a folder of pictures; the base stays as it is.",
    ),
    "partition": Place(
        TRAIN,
        ".experts",
        "partition",
        "Cut a data set into parts, one for each expert; pictures stay where they are.",
    ),
    "train-router": Place(
        TRAIN,
        ".experts",
        "train_router",
        "Train a router, which says which expert a noisy picture is for.",
    ),
    "info": Place(
        LOOK,
        ".files",
        "info",
        "Say what a file holds: a task, a LoRA of any kind, a checkpoint; of several, a table.",
    ),
    "convert": Place(
        CONVERT,
        ".convert",
        "convert",
        "Turn a LoRA file into a task, or a task into a LoRA file; exactly, or not at all.",
    ),
    "extract": Place(
        CONVERT,
        ".extract",
        "extract",
        "Make a task of what fine-tuning changed: fine-tuned model minus base.",
    ),
    "combine": Place(
        CONVERT, ".files", "combine", "Make one task of several: exactly what they do together."
    ),
    "resize": Place(CONVERT, ".extract", "resize", "Give a task another rank."),
    "average": Place(
        CONVERT,
        ".extract",
        "average",
        "Make one task of several checkpoints of a run: the mean of their parameters.",
    ),
    "eval": Place(
        MEASURE,
        ".evaluate",
        "evaluate",
        "Measure tasks against real pictures of what they are to draw.",
    ),
    "which-task": Place(
        MEASURE,
        ".which_task",
        "which_task",
        "Say which of several tasks made a picture, or that none did.",
    ),
    "features": Place(
        MEASURE,
        ".features",
        "features",
        "Read pictures' features off a frozen base, and probe what they tell.",
    ),
    "translate": Place(
        DRAW,
        ".translate",
        "translate",
        "Draw a picture anew under another task, from its own noise.",
    ),
}


class Later(TyperCommand):
    """A command of the table, imported when it is called; until then a name and a sentence."""

    def __init__(self, name: str) -> None:
        place = COMMANDS[name]
        super().__init__(name, help=place.help, rich_help_panel=place.panel)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Hands over to the command itself, for its help and its completion too."""
        return load(str(self.name)).make_context(info_name, args, parent=parent, **extra)


def load(name: str) -> Any:
    """Imports a command; returns it as typer's object."""
    place = COMMANDS[name]
    module = importlib.import_module(place.module, __package__)
    alone = typer.Typer(add_completion=False)
    examples = "\n\n".join(("Examples:", *module.EXAMPLES[name]))
    settings = {"help_option_names": ["--help", "-h"]}
    alone.command(name, epilog=examples, no_args_is_help=True, context_settings=settings)(
        getattr(module, place.function)
    )
    return typer.main.get_command(alone)
