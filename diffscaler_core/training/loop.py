"""Training a task, or several at once, on a frozen base: what a run needs is put together here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..auto_rank import AUTO, RankChoice
from ..errors import DiffScalerError, first_names
from ..methods import METHODS
from ..task import TaskAdapter, new_task, with_classes
from ..windows import SLIDING_RANGES, WindowPlan, expert_windows, sliding_windows
from .aligner import Aligner
from .bases.pipelines import as_denoiser
from .checkpoints import newest_checkpoint
from .conditioning import Prompts, new_classes, prompts_for
from .config import TrainingConfig
from .data.batches import Batches, TrainingData
from .debias import GroupTable, fits
from .denoiser import Denoiser
from .engine import Engine
from .hidden_groups import check_debias, infer_groups
from .launch import Launch, launch_of
from .learner import Learner, TaskRun, control_kind
from .objective import Objective
from .picture_encoders import PictureEncoder, frozen_encoder, load_encoder
from .progress import OnStep
from .rank_choice import choose
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

#: Told the ranks that were chosen: (the task's name, ranks).
OnRanks = Callable[[str, RankChoice], None]
#: Told the hidden groups of the pictures: (the task's name, groups).
OnGroups = Callable[[str, GroupTable], None]


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
    encoder: PictureEncoder | None = None,
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
        encoder: For `config.repa`: any function or module from pixels (B, 3, H, W) in −1..1 to
            tokens (B, M, Z); default: looked up by that name.

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
        encoder=encoder,
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
    on_ranks: OnRanks | None = None,
    accelerator: Any = None,
    encoder: PictureEncoder | None = None,
    on_groups: OnGroups | None = None,
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
        on_ranks: Told the ranks of a task (rank "auto") when they are chosen: (its name, ranks).
        accelerator: As in `train_task`.
        encoder: As in `train_task`.
        on_groups: Told the hidden groups of a task's pictures (debias): (its name, groups).

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
    seen = _encoder_of(encoder, runs, config, denoiser)
    runs = [_with_validation(run, config) for run in runs]
    configs = [replace(config, control=_control_of(run, config)) for run in runs]
    for run, own in zip(runs, configs, strict=True):
        _check_validation(run, own)
    told = [_prompts_of(run, denoiser, config) for run in runs]
    if folder is not None and not isinstance(folder, RunFolder):
        folder = RunFolder(Path(folder), main=launch.is_main)
    if config.rank == AUTO:
        kept = _kept_ranks(folder if resume == "auto" else None)
        runs = [
            _with_ranks(replace(run, ranks=run.ranks or kept.get(run.name)),
                        own, prompts, denoiser, launch, on_ranks)
            for run, own, prompts in zip(runs, configs, told, strict=True)
        ]  # fmt: skip
    if config.debias:
        going_on = folder is not None and resume == "auto" and newest_checkpoint(folder.checkpoints)
        runs = [
            _with_groups(run, own, prompts, denoiser, launch, folder, bool(going_on), on_groups)
            for run, own, (prompts, _) in zip(runs, configs, told, strict=True)
        ]
        for run in runs:
            if folder is not None and run.groups is not None:
                folder.groups(run.groups, run.name if len(runs) > 1 else "")
    tasks = {
        run.name: _start(denoiser, own, run, prompts)
        for run, own, (prompts, _) in zip(runs, configs, told, strict=True)
    }
    with (
        denoiser.held(config.checkpointing, config.at_resolution),
        denoiser.attached(tasks) as trainable,
    ):
        trainable.requires_grad_(True)
        if config.shard:
            launch.shard(denoiser.model)
        learners = [
            Learner(run, trainable, *prompts, own, denoiser.objective, denoiser.device)
            for run, prompts, own in zip(runs, told, configs, strict=True)
        ]
        if seen is not None:
            for learner in learners:
                learner.align(Aligner(learner, denoiser, seen))
        with ExitStack() as closing:
            if folder is not None:
                closing.callback(folder.close)
            engine = Engine(denoiser, trainable, learners, config, launch, folder)
            engine.begin(resume)
            return engine.train(on_step)


def choose_ranks(
    base: Any,
    data: Batches,
    config: TrainingConfig | None = None,
    *,
    prompts: Prompts | None = None,
    words: TaskAdapter | None = None,
    accelerator: Any = None,
) -> RankChoice:
    """Returns ranks for a task's layers, from the gradient of its pictures at the bare base.

    It is what `train_task` does first when `config.rank` is "auto". `.ranks` is a `rank_pattern`
    for `new_task`, and `TaskRun(ranks=…)` takes the choice as it is.

    Args:
        base: As in `train_task`; it stays bit for bit what it was.
        data: The pictures.
        config: The run's settings; `rank_budget` says how much may be spent.
        prompts: As in `train_task`.
        words: As in `train_task`.
        accelerator: As in `train_task`.

    Raises:
        DiffScalerError: The budget does not suffice, or the gradient is 0 or not finite.
    """
    config = replace(config or TrainingConfig(), rank=AUTO)
    denoiser, run = as_denoiser(base), TaskRun(config.name, data, prompts, words)
    told = _prompts_of(run, denoiser, config)
    chosen = _with_ranks(run, config, told, denoiser, launch_of(accelerator), None).ranks
    if chosen is None:
        raise DiffScalerError(f"method {config.method!r} has no subspaces to choose ranks for")
    return chosen


def _kept_ranks(folder: RunFolder | None) -> dict[str, RankChoice]:
    """Returns the ranks of the run that a folder holds: those are not chosen a second time."""
    found = None if folder is None else newest_checkpoint(folder.checkpoints)
    tasks = {} if found is None else found.facts["tasks"]
    return {name: RankChoice.of(own["ranks"]) for name, own in tasks.items() if own.get("ranks")}


def _with_ranks(
    run: TaskRun,
    config: TrainingConfig,
    prompts: tuple[Prompts, Prompts | None],
    denoiser: Denoiser,
    launch: Launch,
    on_ranks: OnRanks | None,
) -> TaskRun:
    """Returns the run with ranks chosen, unless it has some, or has nothing to choose."""
    subspaces = "subspace" in METHODS[config.method].parts
    if run.task is not None or run.ranks is not None or not subspaces:
        return run
    if config.shard:
        raise DiffScalerError(
            "rank 'auto' looks at the base before it is split over devices (shard): give a rank, "
            "or choose ranks beforehand (choose_ranks) on a machine that holds the base"
        )
    narrow = _start(denoiser, replace(config, rank=1), run, prompts[0])
    with denoiser.held(config.checkpointing, config.at_resolution):
        chosen = choose(denoiser, narrow, run, prompts, config, launch)
    logger.info("task %r: %s", run.name, chosen.summary())
    if on_ranks is not None:
        on_ranks(run.name, chosen)
    return replace(run, ranks=chosen)


def _with_groups(
    run: TaskRun,
    config: TrainingConfig,
    prompts: Prompts,
    denoiser: Denoiser,
    launch: Launch,
    folder: RunFolder | None,
    going_on: bool,
    on_groups: OnGroups | None,
) -> TaskRun:
    """Returns the run with hidden groups: its own, those the folder's run had, or inferred ones."""
    check_debias(run, config, launch)
    if run.groups is not None:
        return run
    if going_on and folder is not None and isinstance(run.data, TrainingData):
        for name in ("", run.name):  # of a run of one task, of several
            kept = folder.kept_groups(name)
            if kept is not None and fits(kept, run.data.image_ids, config.debias_groups):
                return replace(run, groups=kept)
    found = infer_groups(denoiser, run, prompts, config)
    logger.info("task %r: hidden groups\n%s", run.name, found.report())
    if on_groups is not None:
        on_groups(run.name, found)
    return replace(run, groups=found)


def _encoder_of(
    given: PictureEncoder | None,
    runs: Sequence[TaskRun],
    config: TrainingConfig,
    denoiser: Denoiser,
) -> PictureEncoder | None:
    """Returns the picture encoder of a run with `repa`, None of one without."""
    if config.repa == "off" or not config.repa_weight or not config.repa_until:
        return None
    if config.shard:
        raise DiffScalerError(
            "repa looks into a block of the base, and shard splits the blocks over devices: leave "
            "out one of the two"
        )
    for run in runs:
        if not isinstance(run.data, TrainingData):
            raise DiffScalerError(
                f"repa keeps what an encoder sees in each picture, and the pictures of task "
                f"{run.name!r} are a stream that is never kept: leave out repa, or stream"
            )
    found = load_encoder(config.repa, denoiser.device) if given is None else given
    return frozen_encoder(found, denoiser.device)


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
            task=run.task,
        )
    _check_drop(denoiser, prompts, config)
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
    if unknown := new_classes(denoiser, others):
        raise DiffScalerError(
            f"the prior pictures' classes must be known to the base; it has no "
            f"{first_names(unknown)}: name their folders by number"
        )
    return prompts, others


def _control_of(run: TaskRun, config: TrainingConfig) -> str:
    return control_kind(run.task, (config.control or None) if run.control is None else run.control)


def _check_drop(denoiser: Denoiser, prompts: Prompts, config: TrainingConfig) -> None:
    if "label" in prompts.fields and denoiser.null_label is None and config.drop:
        raise DiffScalerError(
            f"drop {config.drop:g} leaves classes out, but this base has no class for that: set "
            f"drop to 0 (or say which class means 'none': Denoiser.null_label)"
        )


def _start(
    denoiser: Denoiser, config: TrainingConfig, run: TaskRun, prompts: Prompts
) -> TaskAdapter:
    """Returns the task that a run starts from, with all classes that it is shown."""
    new = new_classes(denoiser, prompts)
    if run.task is None:
        seed = config.seed if run.seed is None else run.seed
        return fresh_task(denoiser, replace(config, name=run.name, seed=seed), new, run.ranks)
    _check_windows(run.task, config)
    task = _copy(run.task, run.name)
    more = [name for name in new if name not in task.new_classes]
    if not more:
        return task
    start = None if task.new_classes else denoiser.null_label
    return with_classes(task, denoiser.model, more, denoiser.component, start)


def fresh_task(
    denoiser: Denoiser,
    config: TrainingConfig,
    classes: Sequence[str] = (),
    ranks: RankChoice | None = None,
) -> TaskAdapter:
    """Returns the task that a run starts from; it changes nothing yet.

    Args:
        denoiser: The base.
        config: The run's settings.
        classes: Names of the classes that the task brings; they start from `null_label`.
        ranks: For rank "auto"; None: the method has no subspaces.
    """
    return new_task(
        denoiser.model if denoiser.shape_model is None else denoiser.shape_model,
        config.method,
        config.rank if isinstance(config.rank, int) else 1 if ranks is None else ranks.usual,
        config.targets,
        config.name,
        rank_pattern=None if ranks is None else ranks.ranks,
        exclude=config.exclude,
        component=denoiser.component,
        control=config.control or None,
        control_rank=config.control_rank or None,
        control_activation=config.control_activation,
        control_embedding=config.control_embedding,
        classes=classes,
        class_start=denoiser.null_label,
        activation=None if config.activation == "method" else config.activation,
        gamma_blocks=config.gamma_blocks,
        windows=_plan(denoiser.objective, config),
        seed=config.seed,
    )


def _plan(objective: Objective, config: TrainingConfig) -> WindowPlan | None:
    """Returns how hidden units are shared out among ranges of noise, even in t."""
    if config.time_route:
        edges = objective.range_edges(SLIDING_RANGES)
        return sliding_windows(SLIDING_RANGES, config.route_alpha, config.route_beta, edges)
    if config.experts > 1:
        return expert_windows(config.experts, objective.range_edges(config.experts))
    return None


def _check_windows(task: TaskAdapter, config: TrainingConfig) -> None:
    """Refuses to share out the units of a task anew that a run goes on from."""
    asked = "sliding" if config.time_route else "experts" if config.experts > 1 else ""
    windows = task.windows
    kind = "" if windows is None else windows.plan.get("kind", "")
    same = windows is not None and asked == kind
    same = same and (asked != "experts" or len(windows.edges) + 1 == config.experts)  # type: ignore[union-attr]
    if asked and not same:
        raise DiffScalerError(
            f"task {task.name!r}, to go on from, says itself which hidden units act at which noise "
            f"level: leave out experts and time_route, or start a new task"
        )


def _copy(task: TaskAdapter, name: str) -> TaskAdapter:
    """Returns the task on float32 tensors of its own; attaching alone would share them."""
    layers = {
        layer: {part: t.detach().to(torch.float32, copy=True) for part, t in tensors.items()}
        for layer, tensors in task.layers.items()
    }
    extras = {n: t.detach().to(torch.float32, copy=True) for n, t in task.extras.items()}
    return task.replace(layers=layers, extras=extras).with_info(name=name)
