"""Commands that make a task of other weights: two models, another rank, several checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, TextColumn

from ..average import average_tasks
from ..errors import DiffScalerError, unknown
from ..extraction import ENERGY, MOST_RANK, extract_task
from ..files import load_task, save_task
from ..resize import resize_task
from .console import (
    AsJson,
    check_device,
    check_out,
    err,
    facts_of,
    in_short,
    numbers,
    say,
    say_json,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLES = {
    "extract": (
        "diffscaler extract tuned.safetensors base.safetensors -o task.safetensors",
        "diffscaler extract tuned.safetensors base.safetensors -o small.safetensors "
        "--rank auto --energy 0.8",
    ),
    "resize": (
        "diffscaler resize task.safetensors -o half.safetensors --rank 4",
        "diffscaler resize task.safetensors -o small.safetensors --energy 0.95",
    ),
    "average": (
        "diffscaler average step-800.safetensors step-1000.safetensors -o mean.safetensors",
        "diffscaler average step-800.safetensors step-1000.safetensors --weights 1,2 "
        "-o later.safetensors",
    ),
}


def extract(
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned model: a file, or a folder.")],
    base: Annotated[Path, typer.Argument(help="What it was trained from.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The task file.")],
    rank: Annotated[str, typer.Option(help="Rank of every layer, or auto.")] = "16",
    energy: Annotated[
        float, typer.Option(help="For auto: share of each layer's change to keep.")
    ] = ENERGY,
    rank_budget: Annotated[
        str | None, typer.Option(help="For auto: numbers to spend, as 8, 0.4% or 1.5M.")
    ] = None,
    most_rank: Annotated[int, typer.Option(help="For auto: largest rank of a layer.")] = MOST_RANK,
    scale: Annotated[bool, typer.Option(help="Use per-channel scales where they help.")] = True,
    targets: Annotated[str, typer.Option(help="Layers: a preset or regular expression.")] = "all",
    exclude: Annotated[str | None, typer.Option(help="Layers to leave out.")] = None,
    name: Annotated[str | None, typer.Option(help="The task's name; default: the file's.")] = None,
    dtype: Annotated[str, typer.Option(help=f"In the file: {', '.join(DTYPES)}.")] = "float32",
    component: Annotated[
        str | None, typer.Option(help="Which model of a pipeline's folder, as transformer_2.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Make a task of what fine-tuning changed: fine-tuned model minus base."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    check_out(to)
    check_device(device)
    parts = ("scale", "shift", "subspace") if scale else ("shift", "subspace")
    columns = (*Progress.get_default_columns(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        shown = bar.add_task("")
        found = extract_task(
            tuned,
            base,
            rank if rank == "auto" else _whole(rank),
            name=name or to.stem,
            parts=parts,
            targets=targets,
            exclude=exclude,
            energy=energy,
            rank_budget=_budget(rank_budget),
            most_rank=most_rank,
            dtype=DTYPES[dtype],
            component=component,
            device=device,
            on_tensor=lambda done, of, name: bar.update(
                shown, completed=done, total=of, description=name
            ),
        )
    save_task(found.task, to)
    if as_json:
        say_json(found.report.as_dict())
        return
    say(found.report.text())
    say(f"{to}: {in_short(found.task)}")


def resize(
    file: Annotated[Path, typer.Argument(help="A task file.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The new task file.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Keep no more ranks than hold this share, as 0.95.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a task another rank."""
    check_out(to)
    resized = resize_task(load_task(file), rank, energy=energy)
    save_task(resized.task, to)
    if as_json:
        facts = {"exact": resized.is_exact, "worst": resized.worst, "errors": dict(resized.errors)}
        say_json({**facts, **facts_of(resized.task, to)})
        return
    what = "relative error" if resized.is_exact else "share dropped (‖u‖·‖d‖, a heuristic)"
    mean = sum(resized.errors.values()) / len(resized.errors)
    say(f"{what}: {mean:.4f} on average, {resized.worst:.4f} in the worst layer")
    say(f"{to}: {in_short(resized.task)}")


def average(
    files: Annotated[list[Path], typer.Argument(help="Two or more checkpoints of one task.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The new task file.")],
    weights: Annotated[
        str | None, typer.Option(help="One number per file, as in 1,2; default: all alike.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new task's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one task of several checkpoints of a run: the mean of their parameters."""
    check_out(to)
    tasks = [load_task(file) for file in files]
    task = average_tasks(tasks, numbers("weights", weights), name)
    save_task(task, to)
    if as_json:
        say_json(facts_of(task, to))
        return
    say(f"{to}: {in_short(task)}")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise DiffScalerError(f"rank must be a number from 0 or 'auto', got {text!r}")
    return int(text)


def _budget(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text
