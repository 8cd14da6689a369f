"""The command that turns LoRA files into tasks, and tasks into LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ..errors import DiffScalerError, unknown
from ..files import load_task, save_task
from ..lora.read import import_lora, imported_text, is_task_file
from ..lora.write import NAMINGS, export_lora
from ..task import TaskAdapter
from .console import AsJson, check_out, facts_of, in_short, say, say_json

EXAMPLES = {
    "convert": (
        "diffscaler convert my_lora.safetensors my_task.safetensors",
        "diffscaler convert my_task.safetensors back.safetensors --to kohya",
        "diffscaler convert my_lora.safetensors other.safetensors --to diffusers",
    )
}


def convert(
    source: Annotated[Path, typer.Argument(help="A LoRA file, or a task file.")],
    target: Annotated[Path, typer.Argument(help="The file to write (.safetensors).")],
    to: Annotated[
        str | None,
        typer.Option(help=f"task (default for a LoRA file), or a naming: {', '.join(NAMINGS)}."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base, a folder or 'owner/name': to check against, or for scales."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The task's name.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a LoRA that changes the text encoder too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a LoRA file into a task, or a task into a LoRA file; exactly, or not at all."""
    is_task = is_task_file(source)
    to = to or ("" if is_task else "task")
    if is_task and to in ("", "task"):
        raise DiffScalerError(
            f"{source.name!r} is a task already; say which LoRA naming to write with --to "
            f"{', --to '.join(NAMINGS)}"
        )
    if to not in ("task", *NAMINGS):
        raise unknown("--to", to, ("task", *NAMINGS))
    check_out(target)
    model = None if base is None else _denoiser(base)
    if is_task:
        task = load_task(source)
        task = task if name is None else task.with_info(name=name)
    else:
        task = import_lora(source, name=name, base=model, strict=strict)
    if to == "task":
        save_task(task, target)
    else:
        export_lora(task, target, to, base=model)
    if as_json:
        say_json(_facts(task, target, to))
        return
    if not is_task:
        say(imported_text(task))
    say(f"{target}: {in_short(task)}" + ("" if to == "task" else f", as a LoRA ({to} naming)"))


def _denoiser(base: str) -> nn.Module:
    from ..training.bases.load import load_base  # needs diffusers

    pipe = load_base(base, device="cpu")
    model: nn.Module = getattr(pipe, "transformer", None) or pipe.unet
    return model


def _facts(task: TaskAdapter, target: Path, to: str) -> dict[str, Any]:
    facts = {key: task.info.get(key) for key in ("name", "method", "base", "imported", "gain")}
    known = {key: value for key, value in facts.items() if value is not None}
    return {**known, "to": to, **facts_of(task, target)}
