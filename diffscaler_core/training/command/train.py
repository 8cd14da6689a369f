"""`diffscaler train`: pictures become a task file. The flags are the keys of SETTINGS."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor

from ...auto_rank import AUTO
from ...commands.console import check_device, check_out, facts_of, say_json
from ...errors import DiffScalerError
from ...files import save_task
from ...methods import METHODS
from ...task import TaskAdapter
from ..advice import before_training
from ..bases.load import DTYPES, load_base
from ..bases.pipelines import as_denoiser
from ..config import TrainingConfig
from ..config_file import read_config
from ..denoiser import Denoiser
from ..engine import DivergedError
from ..learner import TaskRun
from ..loop import choose_ranks, train_tasks
from ..picture_encoders import PictureEncoder, load_encoder
from ..progress import Progress, by_noise
from ..run_folder import RunFolder
from ..settings import SECTIONS, SETTINGS, RunSettings, Setting
from .display import Display, Encoding
from .finish import finished, last_samples, sample_file
from .model_card import check_repository, push
from .plan import format_plan, plan_task, time_steps
from .run_data import load_run, load_starts, load_words, skipped_lines
from .tracking import Tracker, check_tracker, start_tracker

EXAMPLES = {
    "train": (
        "diffscaler train --base assets/pocket --data pictures/flowers --out flowers.safetensors",
        "diffscaler train flowers.toml --plan",
        "diffscaler train flowers.toml --steps 2000",
        "accelerate launch --num_processes 4 -m diffscaler_core.cli train flowers.toml",
        "Each key of the file is a flag here, and a flag wins. More about each: docs/training.md.",
    )
}
_COMMON = "Common"


@dataclass
class _Job:
    """A run's parts, loaded."""

    settings: RunSettings
    console: Console
    accelerator: Any
    denoiser: Denoiser
    runs: list[TaskRun]
    folder: RunFolder
    encoder: PictureEncoder | None = None

    @property
    def main(self) -> bool:
        return self.folder.main


def _train(file: Path | None, plan: bool, as_json: bool, said: Mapping[str, Any]) -> None:
    """Train a task on a folder of pictures; the base stays as it is."""
    settings = read_config(file, said)
    if settings.log_with is not None:
        check_tracker(settings.log_with)
    if settings.push_to_hub is not None:
        check_repository(settings.push_to_hub)
    check_device(settings.device)
    for one in settings.tasks:
        check_out(one.out)
    job = _load(settings)
    if plan:
        _print_plan(job, as_json)
        return
    tasks, drawn, steps_here = _run(job)
    early = _save(job, tasks, drawn, steps_here)
    if as_json and job.main:
        files = {own.name: own.out for own in settings.tasks}
        told = [
            {**facts_of(task, files[name]), "training": task.info["training"]}
            for name, task in tasks.items()
        ]
        say_json({"tasks": told})
    if early:
        raise typer.Exit(130)
    if settings.push_to_hub is not None and job.main:
        _push(job, tasks)


def _load(settings: RunSettings) -> _Job:
    """Loads what the settings name; all that can be refused is refused here."""
    accelerator = _accelerator()
    main = accelerator is None or bool(accelerator.is_main_process)
    console = Console(stderr=True, soft_wrap=True, quiet=not main)
    starts, words = load_starts(settings), load_words(settings)
    device = settings.device
    if accelerator is not None and device == "auto":
        device = str(accelerator.device)
    denoiser = as_denoiser(load_base(settings.base, settings.dtype, device))
    encoder = None
    if settings.config.repa != "off" and settings.config.repa_weight:
        encoder = load_encoder(settings.config.repa, denoiser.device, download=True)
    runs = []
    with _main_first(accelerator if settings.cache else None):
        for task in settings.tasks:
            runs.append(
                load_run(
                    denoiser,
                    settings,
                    task,
                    words[task.name],
                    starts.get(task.name),
                    lambda what: Encoding(console, what),
                )
            )
    for line in skipped_lines(runs):
        console.print(f"skipped {line}", style="yellow", markup=False, highlight=False)
    parameters = sum(p.numel() for p in denoiser.model.parameters())
    for run in runs:
        if settings.stream:  # nobody knows how many pictures there are
            continue
        config = replace(settings.config, control=run.control or "")
        for line in before_training(config, len(run.data), parameters):
            console.print(f"{run.name}: {line}", style="yellow", markup=False, highlight=False)
    folder = RunFolder(settings.folder, settings, main=main)
    return _Job(settings, console, accelerator, denoiser, runs, folder, encoder)


def _print_plan(job: _Job, as_json: bool) -> None:
    settings = job.settings
    processes = int(job.accelerator.num_processes) if job.accelerator is not None else 1
    plans = []
    for run in job.runs:
        config = replace(settings.config, name=run.name, control=run.control or "")
        assert run.prompts is not None  # `load_run` looks them up
        ranks = None
        if config.rank == AUTO and "subspace" in METHODS[config.method].parts:
            ranks = choose_ranks(job.denoiser, run.data, config, prompts=run.prompts)
        plan = plan_task(
            job.denoiser,
            config,
            run.data,
            run.prompts,
            ranks=ranks,
            save_bytes=DTYPES[settings.save_dtype].itemsize,
            processes=processes,
        )
        seconds, peak = time_steps(
            job.denoiser, config, run.data, run.prompts, job.accelerator, ranks, job.encoder
        )
        plans.append(replace(plan, step_seconds=seconds, peak_bytes=peak))
    if job.main and as_json:
        say_json({"tasks": [asdict(plan) for plan in plans]})
    elif job.main:
        typer.echo(format_plan(plans))


def _run(job: _Job) -> tuple[dict[str, TaskAdapter], dict[str, list[Tensor]], int]:
    """Returns (the tasks, their last samples, steps done in this process)."""
    settings, drawn = job.settings, dict[str, list[Tensor]]()
    display = Display(job.console, settings.config.steps, job.folder)
    with _tracker(job) as tracker, display:

        def on_step(now: Progress) -> None:
            display(now)
            if tracker is not None:
                tracker.log(now)
            if now.samples:
                drawn[now.task] = list(now.samples)

        try:
            tasks = train_tasks(
                job.denoiser,
                job.runs,
                settings.config,
                folder=job.folder,
                resume=settings.resume,
                on_step=on_step,
                on_ranks=lambda name, ranks: display.say(f"{name}: {ranks.report()}"),
                on_groups=lambda name, found: display.say(f"{name}: {found.report()}"),
                accelerator=job.accelerator,
                encoder=job.encoder,
            )
        except DivergedError as error:
            raise _diverged(job, error) from error
        except SystemExit:  # SIGTERM; the engine has saved a checkpoint
            display.say(f"stopped; the same command goes on from {job.folder.checkpoints}")
            raise
        except KeyboardInterrupt:  # a second Ctrl-C, in the middle of a step
            display.say(f"interrupted; the last checkpoint is in {job.folder.checkpoints}")
            raise typer.Exit(130) from None
    return tasks, drawn, display.steps_here


def _save(
    job: _Job, tasks: Mapping[str, TaskAdapter], drawn: Mapping[str, list[Tensor]], steps_here: int
) -> bool:
    """Writes the task files and says so; returns whether the run was stopped early."""
    settings, early = job.settings, False
    for own, run in zip(settings.tasks, job.runs, strict=True):
        task = tasks[own.name]
        facts = task.info["training"]
        early = facts["steps_done"] < settings.config.steps
        if not job.main:
            continue
        if steps_here == 0:
            job.console.print(
                f"{job.folder.path} holds this run, and it is finished; say resume 'never' to "
                f"start anew, or more steps to go on",
                markup=False,
                highlight=False,
            )
        picture = last_samples(job.folder, own.name, len(job.runs) > 1, drawn.get(own.name))
        save_task(finished(task, DTYPES[settings.save_dtype], picture), own.out)
        if picture is not None and settings.preview is not None and run is job.runs[0]:
            settings.preview.parent.mkdir(parents=True, exist_ok=True)
            picture.save(settings.preview)
        job.console.print(_summary(own.out, facts, settings.config, early),
                          markup=False, highlight=False)  # fmt: skip
    if job.accelerator is not None:
        job.accelerator.wait_for_everyone()
    return early


def _summary(out: Path, facts: Mapping[str, Any], config: TrainingConfig, early: bool) -> str:
    best = facts.get("best_validation_loss")
    checked = f", best validation loss {best:.4f} at step {facts['best_step']}" if best else ""
    bands = facts.get("loss_by_noise")
    noise = f", by noise {by_noise(bands)}" if bands else ""
    return (
        f"{out}: {'stopped early, ' if early else ''}{facts['steps_done']} of {config.steps} "
        f"steps, {facts['images']} pictures, loss {facts['loss'] or 0:.4f}{noise}{checked}, "
        f"{facts['seconds']:.0f} s"
    )


def _diverged(job: _Job, error: DivergedError) -> DiffScalerError:
    """Saves the last good states; returns the error that says where they are."""
    kept = []
    for own in job.settings.tasks:
        task = error.tasks.get(own.name)
        if task is not None and task.info["training"]["steps_done"] and job.main:
            path = own.out.with_name(f"{own.out.stem}-last-good.safetensors")
            kept.append(save_task(task, path).name)
    if not kept:
        return error
    return DiffScalerError(f"{error}; the last good state is in {', '.join(map(repr, kept))}")


def _push(job: _Job, tasks: Mapping[str, TaskAdapter]) -> None:
    settings, several = job.settings, len(job.runs) > 1
    files = {own.out: tasks[own.name] for own in settings.tasks}
    pictures = [sample_file(job.folder, own.name, several) for own in settings.tasks]
    where = push(
        str(settings.push_to_hub), files, settings.base, [p for p in pictures if p is not None]
    )
    job.console.print(f"uploaded to {where}", markup=False, highlight=False)


@contextlib.contextmanager
def _tracker(job: _Job) -> Iterator[Tracker | None]:
    settings = job.settings
    if settings.log_with is None or not job.main:
        yield None
        return
    told = {**asdict(settings.config), "base": settings.base}
    name = "+".join(run.name for run in job.runs)
    tracker = start_tracker(settings.log_with, name, job.folder.path / "tracker", told)
    try:
        yield tracker
    finally:
        tracker.close()


def _accelerator() -> Any:
    """Returns accelerate's Accelerator under a distributed launch, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import Accelerator
    except ImportError:
        raise DiffScalerError(
            "several processes need accelerate; run: pip install accelerate"
        ) from None
    return Accelerator()


@contextlib.contextmanager
def _main_first(accelerator: Any) -> Iterator[None]:
    """Lets one process fill the cache that the others then read."""
    if accelerator is None:
        yield
        return
    with accelerator.main_process_first():
        yield


def _flag(setting: Setting) -> Any:
    """Returns a setting as typer wants a parameter to be annotated."""
    panel = _COMMON if setting.common else SECTIONS[setting.section]
    default = TrainingConfig.__dataclass_fields__.get(setting.name)
    fallback = RunSettings.__dataclass_fields__.get(setting.name)
    value = getattr(default or fallback, "default", None)
    told = isinstance(value, (int, float, str)) and value != "" and setting.name != "name"
    shown = f"; default {value}" if told and setting.kind is not bool else ""
    names = setting.flags or (f"--{setting.name.replace('_', '-')}",)
    if setting.kind is bool:
        names = (f"{names[0]}/--no-{names[0][2:]}",)
    choices = f" ({', '.join(setting.choices)})" if setting.choices else ""
    kind = str if setting.text else setting.kind
    return Annotated[
        kind | None,
        typer.Option(
            *names,
            help=f"{setting.help.rstrip('.')}{choices}{shown}.",
            metavar=_METAVARS[kind],
            rich_help_panel=panel,
        ),
    ]


_METAVARS = {str: "TEXT", int: "N", float: "X", bool: "", Path: "PATH"}


def _command() -> Callable[..., None]:
    """Returns `train` with one flag per setting, those most used first."""

    def train(**said: Any) -> None:
        _train(said.pop("file"), said.pop("plan"), said.pop("as_json"), said)

    ordered = sorted(
        SETTINGS.values(), key=lambda s: (not s.common, list(SECTIONS).index(s.section))
    )
    annotations: dict[str, Any] = {
        "file": Annotated[
            Path | None, typer.Argument(help="A configuration file (TOML); see docs/training.md.")
        ],
        **{setting.name: _flag(setting) for setting in ordered},
        "plan": Annotated[
            bool,
            typer.Option(
                "--plan",
                help="Say what it will be, memory and time too; train nothing.",
                metavar="",
                rich_help_panel=_COMMON,
            ),
        ],
        "as_json": Annotated[
            bool,
            typer.Option(
                "--json",
                help="Print the plan, or what was trained, as JSON, and nothing else.",
                metavar="",
                rich_help_panel=_COMMON,
            ),
        ],
    }
    defaults = {"plan": False, "as_json": False}
    train.__annotations__ = annotations
    train.__doc__ = _train.__doc__
    train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=kind
            )
            for name, kind in annotations.items()
        ]
    )
    return train


train = _command()
