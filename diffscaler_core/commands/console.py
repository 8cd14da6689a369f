"""What the commands of `diffscaler` share: where they print, how they read numbers."""

from __future__ import annotations

from rich.console import Console

from ..errors import DiffScalerError
from ..task import TaskAdapter

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Prints a line as it is: no markup, no colours of its own."""
    out.print(text, highlight=False, markup=False)


def in_short(task: TaskAdapter) -> str:
    """Returns a task in a few words: name, layers, parameters, bytes."""
    return (
        f"task {task.name!r}, {len(task.layers)} layers, {task.num_parameters:,} parameters, "
        f"{task.nbytes / 2**20:.2f} MiB"
    )


def numbers(what: str, text: str | None) -> list[float] | None:
    """Returns the numbers of a text such as "0.7,0.3"; None stays None.

    Raises:
        DiffScalerError: One is no number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise DiffScalerError(f"{what} {text!r} are no numbers; write them as 0.7,0.3") from None
