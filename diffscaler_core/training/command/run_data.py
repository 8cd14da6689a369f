"""What a run's settings name, loaded: each task's pictures, prompts and starting point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DiffScalerError, first_names
from ...files import load_task
from ...task import TaskAdapter
from ..bases.load import default_words
from ..conditioning import new_classes, prompts_for
from ..data.batches import with_one_table
from ..data.coarse import Coarse
from ..data.controls import CONTROLS
from ..data.prepare import TrainingData, encode_folder
from ..data.sources import CONTROL_FOLDER
from ..data.streaming import stream
from ..denoiser import Denoiser
from ..learner import TaskRun, control_kind
from ..settings import RunSettings, TaskSettings

#: With `validation_share`, so many of a stream's first pictures are kept back.
STREAM_VALIDATION = 64
#: The name in CONTROLS that has a strength.
REFINE = "refine"
#: What is encoded -> how to show how far that is: (done, all).
Shown = Callable[[str], Callable[[int, int], None]]


def load_words(settings: RunSettings) -> dict[str, TaskAdapter | None]:
    """Returns each task's stored prompts, from its own file or from beside the base."""
    beside = default_words(settings.base)
    files = {task.name: task.words or beside for task in settings.tasks}
    return {name: None if file is None else load_task(file) for name, file in files.items()}


def load_starts(settings: RunSettings) -> dict[str, TaskAdapter]:
    """Returns the tasks to go on from."""
    return {task.name: load_task(task.start) for task in settings.tasks if task.start is not None}


def picture_size(settings: RunSettings, denoiser: Denoiser) -> int:
    """Returns the side of the pictures in pixels: the one asked for, or the base's own.

    Raises:
        DiffScalerError: The base does not say, or cannot take it.
    """
    size = settings.size
    if size is None and denoiser.size is not None:
        size = round(denoiser.size * settings.config.at_resolution)
    if size is None:
        raise DiffScalerError("this base does not say its size; give size (--size) in pixels")
    if size % denoiser.factor:
        raise DiffScalerError(f"size {size} must be a multiple of {denoiser.factor} for this base")
    return size


def load_run(
    denoiser: Denoiser,
    settings: RunSettings,
    task: TaskSettings,
    words: TaskAdapter | None,
    start: TaskAdapter | None,
    shown: Shown,
) -> TaskRun:
    """Returns one task's run: its pictures encoded, its prompts looked up.

    Raises:
        DiffScalerError: Pictures or prompts that cannot be had.
    """
    config, size = settings.config, picture_size(settings, denoiser)
    kind = control_kind(start, task.control)
    if settings.stream:
        return _streamed(denoiser, settings, task, words, start, size, kind)

    def encoded(
        where: str, name: str = task.name, views: bool = True, kind: str = kind
    ) -> TrainingData:
        return encode_folder(
            _place(where),
            size,
            denoiser.encode or (lambda pixels: pixels),
            name=name,
            **_controls(
                kind,
                task.control_from,
                where if where != task.data else None,
                settings.control_strength,
            ),
            split=settings.split,
            image=settings.image_column,
            prompt=settings.caption_column,
            flip=settings.flip and views,
            crops=settings.crops if views else 0,
            buckets=settings.buckets,
            factor=denoiser.factor,
            skip_bad=settings.skip_bad,
            channels=denoiser.channels,
            cache=settings.cache,
            encoder_key=denoiser.encoder_key,
            on_encode=shown(where),
        )

    data = encoded(task.data)
    validation = prior = None
    if task.validation is not None:
        validation = encoded(task.validation, views=False)
        data, validation = with_one_table(data, validation)
    if task.prior is not None:
        prior = encoded(task.prior, name=Path(task.prior).name, kind="")
    prompts = prompts_for(
        denoiser, data.prompts, task.prompts, words=words, noise=config.prompt_noise,
        seed=config.seed, cache=settings.cache, task=start,
    )  # fmt: skip
    if prompts.learned or new_classes(denoiser, prompts):
        _refuse_untrained(data)
    return TaskRun(
        task.name, data, prompts, words, start,
        validation=validation, prior=prior, seed=config.seed, control=kind,
        biased=None if settings.debias_from is None else load_task(settings.debias_from),
    )  # fmt: skip


def _controls(
    kind: str, source: str | None, other: str | None = None, strength: float = 1.0
) -> dict[str, Any]:
    """Returns where control pictures come from, as `encode_folder` and `stream` are told.

    Args:
        kind: What they show; "": there are none.
        source: A name of CONTROLS, a folder, or a column or key; None: by the kind if it is one of
            CONTROLS, else from beside the pictures, or the first column that is called so.
        other: Pictures other than the training's: theirs lie beside them, if that folder is there.
        strength: Of coarse pictures to refine.
    """
    if not kind:
        return {}
    source = source or (kind if kind in CONTROLS else None)
    if strength != 1 and source != REFINE:
        raise DiffScalerError(
            f"control_strength {strength:g} says how coarse the pictures of control_from "
            f"{REFINE!r} are; this run's controls are {source or kind!r}"
        )
    if source == REFINE:
        return {"control_from": Coarse(strength)}
    if source in CONTROLS:
        return {"control_from": source}
    if source is None:
        return {"control": True}
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"control": source}
    if other is not None and Path(f"{other.rstrip('/')}{CONTROL_FOLDER}").expanduser().is_dir():
        return {"control": True}
    return {"control": folder}


def _streamed(
    denoiser: Denoiser,
    settings: RunSettings,
    task: TaskSettings,
    words: TaskAdapter | None,
    start: TaskAdapter | None,
    size: int,
    kind: str,
) -> TaskRun:
    """Returns the run of a stream: captions are encoded on the way, known words looked up once."""
    config = settings.config
    kept = {
        "validation": task.validation,
        "prior": task.prior,
        "buckets": settings.buckets,
        "crops": settings.crops,
        "cache": settings.cache,
    }
    for key, value in kept.items():
        if value:
            raise DiffScalerError(
                f"{key} needs pictures that are prepared before the run, and stream prepares none: "
                f"leave out {key}, or stream"
            )
    texts = denoiser.encode_text if task.prompts in ("auto", "encoded") else None
    data = stream(
        _place(task.data),
        size,
        denoiser.encode or (lambda pixels: pixels),
        prompts=None if words is None or texts is not None else words.prompts,
        encode_text=texts,
        name=task.name,
        split=settings.split,
        image=settings.image_column,
        prompt=settings.caption_column,
        flip=settings.flip,
        channels=denoiser.channels,
        validation=STREAM_VALIDATION if config.validation_share else 0,
        **_controls(kind, task.control_from, strength=settings.control_strength),
    )
    prompts = prompts_for(denoiser, data.prompts, task.prompts, words=words, seed=config.seed)
    return TaskRun(task.name, data, prompts, words, start, seed=config.seed, control=kind)


def _refuse_untrained(data: TrainingData) -> None:
    """Refuses to learn a prompt or class that no training picture has."""
    shown = set(data.index.tolist())
    never = [name for i, name in enumerate(data.prompts) if i not in shown]
    if never:
        raise DiffScalerError(
            f"{len(never)} prompts stand only in the validation pictures, so they would be "
            f"validated without being learned: {first_names(never)}"
        )


def skipped_lines(runs: Sequence[TaskRun]) -> list[str]:
    """Returns a line per picture that could not be used."""
    sources = [data for run in runs for data in (run.data, run.validation, run.prior)]
    return [line for data in sources for line in getattr(data, "skipped", ())]


def _place(where: str) -> Any:
    """Returns a folder as a path; a data set's name stays a text."""
    return where if where.startswith("datasets:") else Path(where).expanduser()
