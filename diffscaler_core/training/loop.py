"""Training a task, or several at once, on a frozen base: what a run needs is put together here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DiffScalerError
from ..task import TaskAdapter, new_task
from .bases.pipelines import as_denoiser
from .conditioning import Prompts, prompts_for
from .config import TrainingConfig
from .data.batches import Batches, TrainingData
from .denoiser import Denoiser
from .engine import Engine
from .launch import launch_of
from .learner import Learner, TaskRun, control_kind
from .progress import OnStep
from .run_folder import RunFolder


def train_task(
    base: Any,
    data: Batches,
    config: TrainingConfig | None = None,
    *,
    prompts: Prompts | None = None,
    words: TaskAdapter | None = None,
    task: TaskAdapter | None = None,
    validation: Batches | None = None,
    prior: Batches | None = None,
    folder: str | Path | RunFolder | None = None,
    resume: str = "auto",
    on_step: OnStep | None = None,
    accelerator: Any = None,
) -> TaskAdapter:
    """Returns a task trained on pictures; the base is bit for bit what it was.

    Ctrl-C and an `on_step` that returns True end the run early; the task then is the state so far,
    and `info["training"]["steps_done"]` says how far. With a folder, that state is saved first, and
    the same call goes on from there.

    Args:
        base: A diffusers pipeline, or a `Denoiser`. It runs where it is, in its own dtype.
        data: From `encode_folder` or `encode_pictures`.
        config: The run's settings.
        prompts: What the base is told; default: `prompts_for(…, config.prompts, words=words)`.
        words: Stored prompts to look names up in.
        task: A task to go on from (it stays as it is); default: a new one, which changes nothing.
        validation: Pictures that are never trained on; default: `config.validation_share` of data.
        prior: Pictures the task must not forget (prior preservation).
        folder: Where checkpoints, log, samples and curve go; None: nowhere.
        resume: "auto": go on from the folder's newest checkpoint, if there is one; "never".
        on_step: Called with a `Progress` after each step.
        accelerator: An `accelerate.Accelerator` of a distributed launch: every process trains on
            its share of each batch, and gradients are averaged.

    Raises:
        DivergedError: The loss became NaN or Inf; `.task` is the last good state.
        DiffScalerError: Prompts that cannot be had, a task that does not fit, a folder of another
            run, …
    """
    config = config or TrainingConfig()
    run = TaskRun(config.name, data, prompts, words, task, validation, prior)
    tasks = train_tasks(
        base,
        [run],
        config,
        folder=folder,
        resume=resume,
        on_step=on_step,
        accelerator=accelerator,
    )
    return tasks[run.name]


def train_tasks(
    base: Any,
    runs: Sequence[TaskRun],
    config: TrainingConfig | None = None,
    *,
    folder: str | Path | RunFolder | None = None,
    resume: str = "auto",
    on_step: OnStep | None = None,
    accelerator: Any = None,
) -> dict[str, TaskAdapter]:
    """Returns several tasks trained in one run on one frozen base, by name.

    Each step is one pass over all tasks' batches, each group of rows running its own task. A task
    sees nothing of the others: it becomes what a run of its own would make of it.

    Args:
        base: As in `train_task`.
        runs: One entry per task, of different names.
        config: The settings of all; `config.batch` is each task's own batch.
        folder: As in `train_task`.
        resume: As in `train_task`.
        on_step: Called after each step once per task, with `Progress.task` set.
        accelerator: As in `train_task`.

    Raises:
        DivergedError: One task's loss became NaN or Inf; `.tasks` are the last good states of all.
        DiffScalerError: As in `train_task`, or two tasks of one name.
    """
    config = config or TrainingConfig()
    if resume not in ("auto", "never"):
        raise DiffScalerError(f"resume must be 'auto' or 'never', got {resume!r}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names) or not names:
        raise DiffScalerError(f"a run needs tasks of different names, got {names}")
    denoiser, launch = as_denoiser(base), launch_of(accelerator)
    launch.check(config.batch, config.accumulate)
    runs = [_with_validation(run, config) for run in runs]
    configs = [replace(config, control=_control_of(run, config)) for run in runs]
    for run, own in zip(runs, configs, strict=True):
        _check_validation(run, own)
    told = [_prompts_of(run, denoiser, config) for run in runs]
    tasks = {
        run.name: _fresh(denoiser, own, run) if run.task is None else _copy(run.task, run.name)
        for run, own in zip(runs, configs, strict=True)
    }
    with denoiser.held(config.checkpointing), denoiser.attached(tasks) as trainable:
        trainable.requires_grad_(True)
        if config.shard:
            launch.shard(denoiser.model)
        learners = [
            Learner(run, trainable, *prompts, own, denoiser.objective, denoiser.device)
            for run, prompts, own in zip(runs, told, configs, strict=True)
        ]
        with ExitStack() as closing:
            if folder is not None and not isinstance(folder, RunFolder):
                folder = RunFolder(Path(folder), main=launch.is_main)
            if folder is not None:
                closing.callback(folder.close)
            engine = Engine(denoiser, trainable, learners, config, launch, folder)
            engine.begin(resume)
            return engine.train(on_step)


def _with_validation(run: TaskRun, config: TrainingConfig) -> TaskRun:
    if run.validation is not None or not config.validation_share:
        return run
    seed = config.seed if run.seed is None else run.seed
    data, validation = run.data.split(config.validation_share, seed)
    return replace(run, data=data, validation=validation if len(validation) else None)


def _check_validation(run: TaskRun, config: TrainingConfig) -> None:
    data = run.validation
    if isinstance(data, TrainingData) and len(data) and bool(data.controls) != bool(config.control):
        raise DiffScalerError(
            f"task {run.name!r} learns {'from' if config.control else 'without'} control pictures, "
            f"but its validation pictures have {'none' if config.control else 'some'}"
        )


def _prompts_of(
    run: TaskRun, denoiser: Denoiser, config: TrainingConfig
) -> tuple[Prompts, Prompts | None]:
    """Returns a task's prompts, and those of its prior pictures."""
    seed = config.seed if run.seed is None else run.seed
    prompts = run.prompts
    if prompts is None:
        prompts = prompts_for(
            denoiser,
            run.data.prompts,
            config.prompts,
            words=run.words,
            noise=config.prompt_noise,
            seed=seed,
        )
    for data in (run.data, run.validation):
        if data is not None and prompts.names != data.prompts:
            raise DiffScalerError(f"prompts {prompts.names} are not the data's {data.prompts}")
    if run.prior is None:
        return prompts, None
    others = run.prior_prompts or prompts_for(denoiser, run.prior.prompts, words=run.words)
    if others.learned:
        raise DiffScalerError(
            "the prior pictures' prompts must be known to the base (stored or encoded), not learned"
        )
    return prompts, others


def _control_of(run: TaskRun, config: TrainingConfig) -> str:
    return control_kind(run.task, (config.control or None) if run.control is None else run.control)


def _fresh(denoiser: Denoiser, config: TrainingConfig, run: TaskRun) -> TaskAdapter:
    seed = config.seed if run.seed is None else run.seed
    return fresh_task(denoiser, replace(config, name=run.name, seed=seed))


def fresh_task(denoiser: Denoiser, config: TrainingConfig) -> TaskAdapter:
    """Returns the task that a run starts from; it changes nothing yet."""
    return new_task(
        denoiser.model if denoiser.shape_model is None else denoiser.shape_model,
        config.method,
        config.rank,
        config.targets,
        config.name,
        exclude=config.exclude,
        component=denoiser.component,
        control=config.control or None,
        control_rank=config.control_rank or None,
        control_activation=config.control_activation,
        control_embedding=config.control_embedding,
        seed=config.seed,
    )


def _copy(task: TaskAdapter, name: str) -> TaskAdapter:
    """Returns the task on float32 tensors of its own; attaching alone would share them."""
    layers = {
        layer: {part: t.detach().to(torch.float32, copy=True) for part, t in tensors.items()}
        for layer, tensors in task.layers.items()
    }
    extras = {n: t.detach().to(torch.float32, copy=True) for n, t in task.extras.items()}
    return task.replace(layers=layers, extras=extras).with_info(name=name)
