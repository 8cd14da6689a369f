"""`diffscaler features`: what the frozen base sees in pictures, as a file, and how much it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from ..atomic import write_whole
from ..blocks import block_named
from ..errors import DiffScalerError
from ..files import load_task
from ..systems.features import TIMES, data_features, grid_of, labels_of, pixel_means, untold
from ..systems.partition import by_folder
from ..systems.probe import ProbeGrid, probe_grid
from ..training.data.batches import TrainingData
from ..training.data.prepare import encode_folder
from ..training.data.sources import Example, find_examples
from ..training.denoiser import Denoiser
from .base_options import Base, Device, Dtype, Size, opened
from .console import AsJson, check_device, check_out, err, numbers, out, say, say_json

#: Key of the header's JSON, and its version.
HEADER, FORMAT = "diffscaler.picture_features", "1"
EXAMPLES = {
    "features": (
        "diffscaler features --base assets/pocket --data pictures -o seen.safetensors",
        "diffscaler features --base assets/pocket --data pictures -o seen.safetensors --probe",
        "diffscaler features --base assets/pocket --data pictures -o with_ink.safetensors "
        "--task ink.safetensors --block 1 --time 0.1",
        "With --probe the sub-folders are the classes; the map of accuracies is a PNG beside the "
        "file. What it means: docs/features.md.",
    )
}


def features(
    base: Base,
    data: Annotated[str, typer.Option(help="Pictures, as --data of train.")],
    to: Annotated[Path, typer.Option("--out", "-o", help="The features' file.")],
    block: Annotated[
        str | None,
        typer.Option(help="Which block is read: a name or a number; default: the middle one."),
    ] = None,
    time: Annotated[float | None, typer.Option(help="How noisy, 0 to 1; default: 0.1.")] = None,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="Try a linear probe on every block and time; keep the best.", metavar=""
        ),
    ] = False,
    times: Annotated[str | None, typer.Option(help="For --probe: times, as 0.05,0.2,1.")] = None,
    task: Annotated[Path | None, typer.Option(help="A task to put on the base.")] = None,
    pool: Annotated[int, typer.Option(help="Means over pool x pool parts of a picture.")] = 1,
    noises: Annotated[int, typer.Option(help="Draws of noise that are averaged.")] = 1,
    words: Annotated[Path | None, typer.Option(help="File of the base's null prompt.")] = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(help="Pictures at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the noise and of the split.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Read pictures' features off a frozen base, and probe what they tell."""
    check_out(to)
    check_device(device)
    tried = tuple(numbers("times", times) or TIMES) if probe else (0.1 if time is None else time,)
    if probe and time is not None:
        tried = (time,)
    if not all(0 <= t <= 1 for t in tried):
        raise DiffScalerError(f"times lie in 0..1, got {', '.join(f'{t:g}' for t in tried)}")
    worn = {} if task is None else {"task": load_task(task)}
    denoiser, examples, encoded, told = _loaded(base, data, words, size, batch, dtype, device)
    blocks = [block_named(denoiser.model, block)] if block or not probe else None
    labels, classes = _classes(examples, encoded) if probe else (encoded.index, encoded.prompts)
    with (
        denoiser.held(),
        denoiser.attached(worn),
        Progress(console=err, transient=True, disable=not err.is_terminal) as bar,
    ):
        shown = bar.add_task("looking", total=len(tried))
        found = data_features(
            denoiser, encoded, tried, told, blocks,
            pool=pool, noises=noises, seed=seed, batch=batch,
            on_time=lambda done, of: bar.update(shown, completed=done),
        )  # fmt: skip
    grid = None
    if probe:
        grid = probe_grid(found, labels, classes, pixel_means(encoded), seed=seed)
        _draw(grid, to.with_suffix(".png"), Path(data).name)
    chosen = (grid.best.block, grid.best.time) if grid else next(iter(found))
    facts = {
        "version": FORMAT, "base": base, "data": data, "block": chosen[0], "time": chosen[1],
        "pool": pool, "noises": noises, "seed": seed, "classes": list(classes),
        "task": None if task is None else task.name,
    }  # fmt: skip
    header = {"format": "pt", HEADER: json.dumps(facts, ensure_ascii=False)}
    write_whole(to, save({"features": found[chosen].contiguous(), "labels": labels}, header))
    _say(grid, found[chosen].shape, chosen, to, as_json)


def _loaded(
    base: str, data: str, words: Path | None, size: int | None, batch: int, dtype: str, device: str
) -> tuple[Denoiser, list[Example], TrainingData, Any]:
    examples = find_examples(data)
    denoiser, table = opened(base, words, dtype, device)
    told = untold(denoiser, table)
    return denoiser, examples, encoded_pictures(denoiser, examples, size, batch), told


def _classes(examples: Sequence[Example], encoded: TrainingData) -> tuple[Tensor, tuple[str, ...]]:
    """Returns each picture's class, (N,), and the classes' names: folders, else the prompts."""
    if not all("/" in one.name for one in examples):
        return labels_of(encoded)
    parts = by_folder(examples)
    labels = torch.zeros(len(encoded), dtype=torch.long)
    for k, own in enumerate(parts.values()):
        labels[own] = k  # one size, so pictures keep their order
    return labels, tuple(parts)


def encoded_pictures(
    denoiser: Denoiser, data: Any, size: int | None, batch: int = 32
) -> TrainingData:
    """Returns a source's pictures as the base's latents.

    Args:
        denoiser: The base.
        data: As `encode_folder` takes it.
        size: Side in pixels; None: the base's own.
        batch: Pictures encoded at a time.

    Raises:
        DiffScalerError: Nobody says the size.
    """
    side = size or denoiser.size
    if side is None:
        raise DiffScalerError("this base does not say which size it was made for: give --size")
    encode = denoiser.encode or (lambda pixels: pixels)
    return encode_folder(data, side, encode, channels=denoiser.channels, batch=batch)


def _draw(grid: ProbeGrid, path: Path, title: str) -> None:
    try:
        from ..systems.probe_chart import draw_grid

        draw_grid(grid, path, title=title)
    except ImportError:
        err.print("note: no picture of the grid, as matplotlib is not installed", style="yellow")


def _say(
    grid: ProbeGrid | None, shape: Any, chosen: tuple[str, float], to: Path, as_json: bool
) -> None:
    told = {
        "file": str(to), "pictures": shape[0], "features": shape[1],
        "block": chosen[0], "time": chosen[1],
    }  # fmt: skip
    if as_json:
        say_json(told if grid is None else {**told, "probe": grid.plain()})
        return
    if grid is not None:
        blocks, times = grid_of({(cell.block, cell.time): shape for cell in grid.cells})
        table = Table(title=f"accuracy of a linear probe, {len(grid.classes)} classes")
        table.add_column("block")
        for t in times:
            table.add_column(f"t = {t:g}", justify="right")
        by_place = {(cell.block, cell.time): cell for cell in grid.cells}
        for name in blocks:
            table.add_row(name, *(f"{by_place[name, t].accuracy:.0%}" for t in times))
        out.print(table)
        say(
            f"chosen by other pictures: {grid.best.block} at t = {grid.best.time:g}, "
            f"{grid.best.accuracy:.0%}; mean values alone {grid.pixels or 0:.0%}, "
            f"guessing {grid.chance:.0%}"
        )
    say(f"{to}: {shape[1]} features of {shape[0]} pictures, {chosen[0]} at t = {chosen[1]:g}")
