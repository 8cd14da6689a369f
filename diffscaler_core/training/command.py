"""`diffscaler train`: a folder of pictures becomes a task file."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import DiffScalerError, TaskFileError, unknown
from ..files import load_task, save_task
from ..task import TaskAdapter
from .bases import DTYPES, default_words, load_base
from .conditioning import Prompts, prompts_for
from .config import TrainingConfig
from .data import TrainingData, encode_folder
from .denoiser import Denoiser
from .diffusers_bases import as_denoiser
from .loop import DivergedError, train_task
from .loop import Progress as Step

_DEFAULT = TrainingConfig()
_WHAT, _PACE, _SHOWN, _RUN = "The task", "How long and how fast", "What is shown", "How it runs"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


def train(
    base: Annotated[str, _option("A diffusers folder, or owner/name on the Hub.", _WHAT)],
    data: Annotated[Path, _option("Folder of pictures, or of one folder per class.", _WHAT)],
    out: Annotated[Path, _option("The task file to write (.safetensors).", _WHAT, "--out", "-o")],
    name: Annotated[str | None, _option("Its name; default: the file's.", _WHAT)] = None,
    method: Annotated[str, _option("Which parts on which layers.", _WHAT)] = _DEFAULT.method,
    rank: Annotated[int, _option("Width of the new subspaces.", _WHAT)] = _DEFAULT.rank,
    targets: Annotated[
        str, _option("blocks, attention, mlp, all, or a pattern.", _WHAT)
    ] = "blocks",
    start: Annotated[Path | None, _option("Go on from this task file.", _WHAT, "--from")] = None,
    save_dtype: Annotated[
        str, _option("Of the file: float32, bfloat16, float16.", _WHAT)
    ] = "float32",
    steps: Annotated[int, _option("Optimiser steps.", _PACE)] = _DEFAULT.steps,
    batch: Annotated[int, _option("Pictures per step.", _PACE)] = _DEFAULT.batch,
    lr: Annotated[float, _option("Learning rate of the subspaces.", _PACE)] = _DEFAULT.lr,
    lr_scale_shift: Annotated[
        float, _option("Of scales and shifts.", _PACE)
    ] = _DEFAULT.lr_scale_shift,
    lr_prompts: Annotated[float, _option("Of learned prompts.", _PACE)] = _DEFAULT.lr_prompts,
    schedule: Annotated[str, _option("cosine or constant.", _PACE)] = _DEFAULT.schedule,
    ema: Annotated[
        float, _option("Running mean of the parameters; 0: none.", _PACE)
    ] = _DEFAULT.ema,
    size: Annotated[int | None, _option("Side in pixels; default: the base's.", _SHOWN)] = None,
    flip: Annotated[bool, _option("Also the mirrored pictures.", _SHOWN, "--flip")] = False,
    skip_bad: Annotated[bool, _option("Skip broken pictures.", _SHOWN, "--skip-bad")] = False,
    prompts: Annotated[str, _option("auto, stored, learned, encoded.", _SHOWN)] = _DEFAULT.prompts,
    words: Annotated[Path | None, _option("File of stored prompts.", _SHOWN)] = None,
    drop: Annotated[float, _option("Share of prompts left out.", _SHOWN)] = _DEFAULT.drop,
    timesteps: Annotated[str, _option("auto, logit_normal, uniform.", _SHOWN)] = _DEFAULT.timesteps,
    weighting: Annotated[str, _option("none, min_snr, cosmap.", _SHOWN)] = _DEFAULT.weighting,
    dtype: Annotated[str, _option("Of the base: float32, bfloat16, float16.", _RUN)] = "float32",
    precision: Annotated[str, _option("no, or bf16 (autocast).", _RUN)] = _DEFAULT.precision,
    checkpointing: Annotated[
        bool, _option("Less memory, slower.", _RUN, "--checkpointing")
    ] = False,
    device: Annotated[str, _option("auto, cpu, cuda, …", _RUN)] = "auto",
    seed: Annotated[int, _option("Same seed, same numbers.", _RUN)] = _DEFAULT.seed,
    preview: Annotated[Path | None, _option("PNG of samples, at the end.", _RUN)] = None,
) -> None:
    """Train a task on a folder of pictures; the base stays as it is."""
    console = Console(stderr=True, soft_wrap=True)
    if out.suffix != ".safetensors":
        raise TaskFileError(f"--out {out.name!r} must end in .safetensors")
    if save_dtype not in DTYPES:
        raise unknown("dtype", save_dtype, DTYPES)
    config = TrainingConfig(
        name=name or out.stem,
        method=method,
        rank=rank,
        targets=targets,
        steps=steps,
        batch=batch,
        lr=lr,
        lr_scale_shift=lr_scale_shift,
        lr_prompts=lr_prompts,
        schedule=schedule,
        ema=ema,
        drop=drop,
        prompts=prompts,
        timesteps=timesteps,
        weighting=weighting,
        precision=precision,
        checkpointing=checkpointing,
        seed=seed,
    )
    task = None if start is None else load_task(start)
    words = words or default_words(base)
    known = None if words is None else load_task(words)
    denoiser = as_denoiser(load_base(base, dtype, device))
    pictures = _pictures(denoiser, data, size, config.name, flip, skip_bad)
    for line in pictures.skipped:
        console.print(f"skipped {line}", style="yellow", markup=False)
    told = prompts_for(
        denoiser, pictures.prompts, prompts, words=known, noise=config.prompt_noise, seed=seed
    )
    trained = _run(console, denoiser, pictures, config, told, task, out)
    shown = _samples(denoiser, trained, told, pictures, preview, seed)
    save_task(_finished(trained, save_dtype, shown), out)
    facts = trained.info["training"]
    early = facts["steps_done"] < config.steps
    console.print(
        f"{out}: {'stopped early, ' if early else ''}{facts['steps_done']} of {config.steps} "
        f"steps, {len(pictures)} pictures, loss {facts['loss'] or 0:.4f}, {facts['seconds']:.0f} s",
        markup=False,
    )
    if early:
        raise typer.Exit(130)


def _pictures(
    denoiser: Denoiser, folder: Path, size: int | None, name: str, flip: bool, skip_bad: bool
) -> TrainingData:
    size = size or denoiser.size
    if size is None:
        raise DiffScalerError("this base does not say its size; give --size in pixels")
    if size % denoiser.factor:
        raise DiffScalerError(f"size {size} must be a multiple of {denoiser.factor} for this base")
    return encode_folder(
        folder,
        size,
        denoiser.encode or (lambda pixels: pixels),
        name=name,
        flip=flip,
        skip_bad=skip_bad,
        channels=denoiser.channels,
    )


def _run(
    console: Console,
    denoiser: Denoiser,
    data: TrainingData,
    config: TrainingConfig,
    prompts: Prompts,
    task: TaskAdapter | None,
    out: Path,
) -> TaskAdapter:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        row = bar.add_task("training", total=config.steps, loss=0.0)

        def on_step(now: Step) -> None:
            bar.update(row, completed=now.step, loss=now.mean_loss)

        try:
            return train_task(denoiser, data, config, prompts=prompts, task=task, on_step=on_step)
        except DivergedError as error:
            if not error.task.info["training"]["steps_done"]:
                raise
            kept = save_task(error.task, out.with_name(f"{out.stem}-last-good.safetensors"))
            raise DiffScalerError(f"{error}; the last good state is in {kept.name!r}") from error


def _samples(
    denoiser: Denoiser,
    task: TaskAdapter,
    prompts: Prompts,
    data: TrainingData,
    path: Path | None,
    seed: int,
) -> Any:
    """Writes a grid of samples, two per prompt, of at most eight prompts; returns it, or None."""
    if path is None:
        return None
    from .preview import grid, preview

    channels, height, width = data.latents.shape[2:]
    few, shape = prompts.first(8), (channels, height, width)
    shown = preview(denoiser, task, few, shape, per_prompt=2, seed=seed)
    picture = grid(shown, columns=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return picture


def _finished(task: TaskAdapter, dtype: str, picture: Any) -> TaskAdapter:
    """Returns the task as it goes into a file: in its dtype, dated, with a thumbnail."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    spec = {"date": now, **task.modelspec}
    if picture is not None:
        from ..thumbnails import encode_thumbnail

        spec["thumbnail"] = encode_thumbnail(picture)
    layers = {
        name: {part: tensor.to(DTYPES[dtype]) for part, tensor in tensors.items()}
        for name, tensors in task.layers.items()
    }
    return task.replace(layers=layers, modelspec=spec).with_info(created=now)
