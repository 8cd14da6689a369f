"""SETTINGS: every key of a configuration file, which is every flag of `diffscaler train` as well.

Data, and `RunSettings`, what the keys add up to. Reads no file and loads nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DiffScalerError, TaskFileError, shown, unknown
from ..file_names import harmless
from .config import CHOICES, TrainingConfig

DTYPES = ("float32", "bfloat16", "float16")
RESUMES = ("auto", "never")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "swanlab")
#: Section of a file -> what it is about; also the order of `--help`. "" stands before any section.
SECTIONS = {
    "": "The three that you must say, or nearly",
    "task": "The task",
    "training": "How long and how fast",
    "pictures": "The pictures",
    "prompts": "What the base is told",
    "helpers": "What helps beside the loss",
    "control": "Control pictures",
    "noise": "Which noise, which weight",
    "validation": "What is looked at on the way",
    "run": "How it runs",
}


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
        name: Its name in a file; the flag is `--name` with dashes.
        section: The section of a file it may stand in (or before all sections); see SECTIONS.
        help: A few words.
        kind: str, int, float, bool or Path.
        choices: The names it may have; none: any.
        many: A list of texts is taken as well.
        common: Shown first in `--help`.
        flags: Other flags than `--name`.
        text: True: a text is taken as well, in place of a whole number.
    """

    name: str
    section: str
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()
    many: bool = False
    common: bool = False
    flags: tuple[str, ...] = ()
    text: bool = False


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainingConfig)}


def _of_config(name: str, section: str, help: str, **more: Any) -> Setting:
    """Returns a setting that `TrainingConfig` holds: type and choices are read off there."""
    kind = str if _DEFAULTS[name] is None else type(_DEFAULTS[name])
    return Setting(name, section, help, kind, tuple(CHOICES.get(name, ())), **more)


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("base", "", "A diffusers folder, or owner/name on the Hub.", common=True),
        Setting("data", "", "A folder of pictures, or datasets:name.", common=True),
        Setting("out", "", "The task file to write.", Path, common=True, flags=("--out", "-o")),
        _of_config("name", "task", "The task's name; default: the file's.", common=True),
        _of_config("method", "task", "Which parts on which layers."),
        _of_config("activation", "task", "Of the subspaces; method: its own."),
        _of_config("gamma_blocks", "task", "Of method difffit: which blocks have its γ."),
        _of_config("experts", "task", "Ranges of noise with hidden units of their own."),
        _of_config("time_route", "task", "A window over the hidden units slides with the noise."),
        _of_config("route_alpha", "task", "How late it slides."),
        _of_config("route_beta", "task", "The share of the units in it."),
        _of_config("rank", "task", "Width of the new subspaces, or auto.", common=True, text=True),
        _of_config("rank_budget", "task", "Of rank auto: a rank, 0.4%, 20k, 1.5M.", text=True),
        _of_config("targets", "task", "blocks, attention, mlp, all, or a pattern.", many=True),
        _of_config("exclude", "task", "Targets to leave out: a pattern.", many=True),
        Setting("start", "task", "Go on from this task file.", Path, flags=("--start", "--from")),
        Setting("save_dtype", "task", "Of the file.", choices=DTYPES),
        _of_config("steps", "training", "Optimiser steps.", common=True),
        _of_config("batch", "training", "Pictures per step.", common=True),
        _of_config("accumulate", "training", "Parts a batch is computed in."),
        _of_config("lr", "training", "Learning rate of the subspaces.", common=True),
        _of_config("lr_scale_shift", "training", "Learning rate of scales and shifts."),
        _of_config("lr_prompts", "training", "Learning rate of learned prompts."),
        _of_config("optimizer", "training", "What moves the parameters."),
        _of_config("schedule", "training", "How the learning rates fall."),
        _of_config("warmup", "training", "Steps over which they rise first."),
        _of_config("restarts", "training", "Arcs of cosine_restarts."),
        _of_config("weight_decay", "training", "Of the subspaces."),
        _of_config("beta1", "training", "AdamW's memory of gradients."),
        _of_config("beta2", "training", "AdamW's memory of their squares."),
        _of_config("clip", "training", "Largest norm of a gradient; 0: any."),
        _of_config("ema", "training", "Running mean that is saved, such as 0.99; 0: none."),
        Setting("size", "pictures", "Side in pixels; default: the base's.", int, common=True),
        _of_config("at_resolution", "pictures", "Times the base's own size: stretches positions."),
        Setting("buckets", "pictures", "Keep wide and tall pictures wide and tall.", bool),
        Setting("crops", "pictures", "Random crops of each picture, beside its middle.", int),
        Setting("flip", "pictures", "Also the mirrored pictures.", bool),
        Setting("skip_bad", "pictures", "Skip broken pictures.", bool),
        Setting("stream", "pictures", "Read and encode while training; keep nothing.", bool),
        Setting("cache", "pictures", "Folder that keeps encoded pictures.", Path),
        Setting("split", "pictures", "Of a data set."),
        Setting("image_column", "pictures", "Of a data set; default: the first with pictures."),
        Setting("caption_column", "pictures", "Of a data set, or key of metadata.jsonl."),
        Setting("prior", "pictures", "Pictures of what the base must not forget."),
        _of_config("prior_weight", "pictures", "Weight of their loss."),
        _of_config("prior_share", "pictures", "Share of each batch they take."),
        _of_config("prompts", "prompts", "Where prompts come from."),
        Setting("words", "prompts", "File of stored prompts.", Path),
        _of_config("drop", "prompts", "Share of prompts left out, for guidance."),
        _of_config("prompt_noise", "prompts", "What tells new prompts apart at first."),
        _of_config("perturb", "prompts", "Noise on the prompts' embeddings."),
        _of_config("perturb_gamma", "prompts", "Its size."),
        _of_config("repa", "helpers", "Encoder to align a block with: pocket, a file, DINOv2."),
        _of_config("repa_block", "helpers", "Which block, from 1; 0: an early one."),
        _of_config("repa_weight", "helpers", "Weight of the alignment; 0: none."),
        _of_config("repa_until", "helpers", "Share of the steps after which it ends."),
        _of_config("repa_width", "helpers", "Of its projector; 0: by the block's."),
        _of_config("debias", "helpers", "Weight of what sets hidden groups apart; 0: none."),
        _of_config("debias_groups", "helpers", "How many are looked for, per prompt."),
        Setting("debias_from", "helpers", "Task whose losses tell the groups.", Path),
        _of_config("control", "control", "What they show, such as edges: a task that takes them."),
        Setting("control_from", "control", "A folder or column; or what makes them, as edges."),
        Setting("control_strength", "control", "Of control_from refine: how coarse, to 1.", float),
        _of_config("control_drop", "control", "Share of them left out."),
        _of_config("control_rank", "control", "Width of their subspace; 0: a patch's numbers."),
        _of_config("control_activation", "control", "Of their subspace."),
        _of_config("control_embedding", "control", "How they are embedded."),
        _of_config("lr_control", "control", "Learning rate of their affiner."),
        _of_config("timesteps", "noise", "How much noise, and how often."),
        _of_config("timestep_mean", "noise", "logit_normal's mean."),
        _of_config("timestep_std", "noise", "logit_normal's width."),
        _of_config("timestep_shift", "noise", "Above 1: more of the noisy times."),
        _of_config("timestep_uniform", "noise", "Share of uniform times among them."),
        _of_config("weighting", "noise", "Weight of the loss by noise."),
        _of_config("snr_gamma", "noise", "min_snr's cap."),
        _of_config("chain_tau", "noise", "chain's rise with noise."),
        Setting("validation", "validation", "Pictures that are not trained on."),
        _of_config("validation_share", "validation", "Or: the share of the pictures kept back."),
        _of_config("validate_every", "validation", "Steps between validations; 0: at the end."),
        _of_config("validation_times", "validation", "Noise levels per picture."),
        _of_config("sample_every", "validation", "Steps between samples; 0: at the end."),
        _of_config("sample_steps", "validation", "Steps of the sampler."),
        _of_config("guidance", "validation", "Guidance of the samples."),
        Setting("preview", "validation", "Copy the last samples into this PNG.", Path),
        Setting("folder", "run", "The run's folder; default: beside the task file.", Path),
        Setting("resume", "run", "Go on where the run stopped.", choices=RESUMES),
        _of_config("save_every", "run", "Steps between checkpoints; 0: only at the end."),
        _of_config("keep", "run", "Checkpoints kept."),
        Setting("device", "run", "auto, cpu, cuda, …"),
        Setting("dtype", "run", "Of the base.", choices=DTYPES),
        _of_config("precision", "run", "What is computed in: no is as the base is."),
        _of_config("checkpointing", "run", "Less memory, slower."),
        _of_config("shard", "run", "Split the base over several devices."),
        _of_config("seed", "run", "Same seed, same numbers."),
        Setting("log_with", "run", "Send the numbers to this tracker too.", choices=TRACKERS),
        Setting("push_to_hub", "run", "Upload task and card to owner/name."),
    )
}
#: Keys of a `[[tasks]]` entry: what may differ between the tasks of one run.
TASK_KEYS = (
    *("name", "data", "out", "words", "prompts", "validation", "prior", "start"),
    *("control", "control_from"),
)


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What one task of a run learns from, and where it goes; as in SETTINGS."""

    name: str
    data: str
    out: Path
    prompts: str = "auto"
    words: Path | None = None
    validation: str | None = None
    prior: str | None = None
    start: Path | None = None
    control: str | None = None
    control_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A run, checked; nothing is loaded yet. Attributes are as in SETTINGS.

    Attributes:
        config: What `train_task` is told.
        tasks: One entry, or one per `[[tasks]]`.
        values: The keys that were said, as they were said.
    """

    base: str
    folder: Path
    tasks: tuple[TaskSettings, ...]
    config: TrainingConfig
    save_dtype: str = "float32"
    size: int | None = None
    buckets: bool = False
    crops: int = 0
    flip: bool = False
    skip_bad: bool = False
    stream: bool = False
    cache: Path | None = None
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None
    control_strength: float = 1.0
    debias_from: Path | None = None
    preview: Path | None = None
    resume: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    log_with: str | None = None
    push_to_hub: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


def settings_of(values: Mapping[str, Any]) -> RunSettings:
    """Returns the run that checked values add up to; fills in names and places.

    Args:
        values: Key of SETTINGS -> value, and "tasks" -> one mapping per task.

    Raises:
        DiffScalerError: Something is missing, or two settings contradict each other.
    """
    entries = list(values.get("tasks", ()))
    if not values.get("base"):
        raise DiffScalerError("no base was given; say base = 'folder' in the file, or --base")
    if entries and (values.get("data") or values.get("out")):
        raise DiffScalerError("with [[tasks]], data and out belong into each task's own entry")
    if not entries and not values.get("data"):
        raise DiffScalerError("no pictures were given; say data = 'folder' in the file, or --data")
    shared = {key: values[key] for key in TASK_KEYS if key in values}
    named = [_named({**shared, **entry}) for entry in entries or [{}]]
    folder = _folder(values, named)
    tasks = tuple(_task(one, folder) for one in named)
    _refuse_doubles(tasks)
    if _among_pictures(folder, named):
        raise DiffScalerError(
            f"the run's folder {shown(str(folder))} lies among the pictures, where its samples "
            f"would be trained on; give another folder"
        )
    if values.get("buckets") and any(task.prior for task in tasks):
        raise DiffScalerError("prior pictures and the task's must have one shape: without buckets")
    known = {f.name for f in dataclasses.fields(RunSettings)} - {"folder", "tasks", "config"}
    config = {key: value for key, value in values.items() if key in _DEFAULTS}
    return RunSettings(
        folder=folder,
        tasks=tasks,
        config=TrainingConfig(**{**config, "name": tasks[0].name}),
        values=dict(values),
        **{key: value for key, value in values.items() if key in known},
    )


def _named(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's entry with its name: what it says, the file's, or the pictures' folder's."""
    out = entry.get("out")
    if out is not None and out.suffix != ".safetensors":
        raise TaskFileError(f"out {shown(out.name)} must end in .safetensors")
    if "data" not in entry:
        raise DiffScalerError(
            f"task {shown(entry.get('name', ''))} names no data, a folder of pictures"
        )
    source = Path(str(entry["data"]).removeprefix("datasets:")).resolve()
    name = entry.get("name") or (out.stem if out else source.stem) or "task"
    return {**entry, "name": name}


def _folder(values: Mapping[str, Any], named: list[dict[str, Any]]) -> Path:
    """Returns the run's folder: the one given, or one named like the task, beside its file."""
    if values.get("folder"):
        return Path(values["folder"])
    out = named[0].get("out")
    if out is None:
        return Path("runs") / harmless("+".join(str(one["name"]) for one in named))
    if len(named) > 1:
        return Path(out).parent / "run"
    beside = Path(out).with_suffix("")
    return beside.with_name(f"{beside.name}-run") if _among_pictures(beside, named) else beside


def _among_pictures(folder: Path, named: list[dict[str, Any]]) -> bool:
    """Says whether a folder is one of pictures, or lies in one."""
    said = [one.get(key) for one in named for key in ("data", "validation", "prior")]
    places = [expanded(place).resolve() for place in said if place]
    own = expanded(folder).resolve()
    return any(place == own or place in own.parents for place in places)


def expanded(path: str | Path) -> Path:
    """Returns a path whose ~ is somebody's home folder.

    Raises:
        DiffScalerError: There is nobody of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DiffScalerError(f"{shown(str(path))} begins with a home folder nobody has") from None


def _refuse_doubles(tasks: tuple[TaskSettings, ...]) -> None:
    for what, of in (
        ("name", lambda task: harmless(task.name).lower()),
        ("out", lambda task: str(task.out.resolve()).lower()),
    ):
        own = [of(task) for task in tasks]
        for task, one in zip(tasks, own, strict=True):
            if own.count(one) > 1:
                raise DiffScalerError(
                    f"two tasks have the {what} {shown(str(getattr(task, what)))} (or nearly)"
                )


def _task(entry: dict[str, Any], folder: Path) -> TaskSettings:
    out = entry.get("out") or folder / f"{harmless(entry['name'])}.safetensors"
    if "control_from" in entry and not ("control" in entry or "start" in entry):
        raise DiffScalerError(
            f"control_from {shown(entry['control_from'])} says where control pictures come from; "
            f'say also what they show, such as control = "edges"'
        )
    return TaskSettings(**{**entry, "out": out})


def check_choice(setting: Setting, value: object) -> None:
    """Refuses a name that is none of a setting's choices."""
    if setting.choices and value not in setting.choices:
        raise unknown(setting.name, value, setting.choices)
