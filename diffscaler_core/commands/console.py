"""What the commands of `diffscaler` share: where they print, how they read numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import DiffScalerError, TaskFileError

if TYPE_CHECKING:
    from ..task import TaskAdapter

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the outcome as JSON, and nothing else.", metavar="")
]

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Prints a line as it is: no markup, no colours of its own."""
    out.print(text, highlight=False, markup=False)


def say_json(value: Any) -> None:
    """Prints a value as JSON, on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def check_out(path: Path) -> None:
    """Refuses a file that could not be written, before any work is done.

    Raises:
        TaskFileError: It does not end in .safetensors, is a folder, or lies below a file.
    """
    from ..files import safetensors_path

    safetensors_path(path)
    if path.is_dir():
        raise TaskFileError(f"{str(path)!r} is a folder; name a file in it")
    above = _there(path.parent)
    if not above.is_dir():
        raise TaskFileError(f"{str(path)!r} cannot be written: {above.name!r} is no folder")


def check_folder(folder: Path) -> None:
    """Refuses a folder that could not be made, before any work is done.

    Raises:
        DiffScalerError: It is, or lies below, a file.
    """
    above = _there(folder)
    if not above.is_dir():
        raise DiffScalerError(f"no folder {str(folder)!r} can be made: {above.name!r} is a file")


def _there(path: Path) -> Path:
    """Returns the path itself, or the nearest one above it that exists."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def check_device(name: str) -> None:
    """Refuses a device that torch does not know, or that is not there.

    Raises:
        DiffScalerError: With torch's own reason.
    """
    import torch

    if name == "auto":
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DiffScalerError(f"device {name!r} cannot be used: {reason}") from None


def facts_of(task: TaskAdapter, file: Path) -> dict[str, Any]:
    """Returns what `--json` tells of a task that was just written to a file."""
    return {
        "name": task.name,
        "file": str(file),
        "layers": len(task.layers),
        "parameters": task.num_parameters,
        "bytes": file.stat().st_size,
    }


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


def spans(what: str, text: str | None) -> list[tuple[float | None, float | None] | None] | None:
    """Returns the ranges of a text such as ":0,0:,all"; None stays None, "all" becomes None.

    Raises:
        DiffScalerError: One is no range.
    """
    if text is None:
        return None
    try:
        return [None if part == "all" else _span(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise DiffScalerError(
            f"{what} {text!r} are no ranges; write them as low:high, as in :0,0:,all"
        ) from None


def _span(text: str) -> tuple[float | None, float | None]:
    low, high = (float(end) if end else None for end in text.split(":"))
    return low, high
