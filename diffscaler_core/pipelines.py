"""The diffusers plugin: importing this module gives every `DiffusionPipeline` the methods below.

Each method is one of the functions here, with the pipeline as its first argument; use either. Names
and habits follow diffusers' LoRA methods, and the two never touch each other: a task acts on the
output of a layer, beside whatever LoRA is loaded, switched or unloaded. (A *fused* LoRA is part of
W, so that a task's scale multiplies it too.)

Tasks live on the models (transformer, transformer_2, unet), so pipelines that share a model share
them. No weight of a model changes, but for `fuse_diffscaler`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .attach import Attachment, Row, Weight, mix_of
from .errors import DiffScalerError
from .files import save_task
from .hub import FILE_NAME
from .plugin.control import diffscaler_control, set_diffscaler_control
from .plugin.fuse import fuse_diffscaler, unfuse_diffscaler
from .plugin.models import (
    Source,
    add_task,
    check_names,
    check_unfused,
    models_for,
    models_of,
    read_task,
    states_of,
    swap_task,
    weight_in,
)
from .plugin.regions import regions_of
from .plugin.rows import RowRequest
from .plugin.schedule import schedules_of

logger = logging.getLogger(__name__)


def load_diffscaler(
    pipe: DiffusionPipeline,
    path_or_repo_or_dict: Source,
    adapter_name: str | None = None,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
    hotswap: bool = False,
) -> None:
    """Loads a task; it becomes the active one, alone, at strength 1, as with `load_lora_weights`.

    Args:
        pipe: Any pipeline with a transformer, transformer_2 or unet.
        path_or_repo_or_dict: A file, a folder, a repository "owner/name" on the Hub, a TaskAdapter,
            or a mapping of a task file's tensors with its facts under "config".
        adapter_name: What the pipeline calls the task; default: the task's own name.
        weight_name: The file in the folder or repository; default `diffscaler.safetensors`, or in a
            local folder its only `.safetensors`.
        subfolder: Folder below the folder or repository.
        revision: Branch, tag or commit of the repository.
        token: The Hub's access token, or True for the stored one.
        cache_dir: Where downloads are kept.
        local_files_only: True: take a repository from the cache, never download.
        hotswap: True: replace the tensors of the loaded task `adapter_name` in place, which also
            works after torch.compile, without a recompile. Strengths stay as they are.

    Raises:
        DiffScalerError: No such file, a broken file, a task for another model, a name in use, or a
            model that is compiled already; every model is then as it was.
    """
    task = read_task(
        path_or_repo_or_dict,
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    name = adapter_name or task.name
    models = models_of(pipe)
    adapted = models_for(task, models, type(pipe).__name__)
    if hotswap:
        swap_task(name, task, adapted)
        return
    add_task(name, task, adapted)
    for state in states_of(pipe):
        state.choose(pipe, {name: 1.0} if name in state.tasks else {})
    for other in models.keys() - adapted.keys():
        logger.warning(
            "task %r adapts only %s; the pipeline's %s runs without it",
            name,
            ", ".join(adapted),
            other,
        )


def set_diffscaler(
    pipe: DiffusionPipeline,
    names: str | Sequence[str],
    weights: Weight | Sequence[Weight | None] | None = None,
    *,
    schedules: Any = None,
    masks: Any = None,
) -> None:
    """Makes these tasks the active ones; the others stay loaded and rest. No recompile.

    Schedules and masks hold until the next call of this function, also in `diffscaler_rows`.

    Args:
        pipe: The pipeline.
        names: One or more loaded tasks; their effects add up in parallel.
        weights: Strength of each (or one for all): a number, {part: number} with parts "scale",
            "shift", "subspace", or {component: either of them}; absent entries 1. None: 1.
        schedules: How strengths go over sampling time, as factors on them: one for all tasks, a
            list with one or None for each, or {name: schedule}. A schedule is text ("0: 0, 0.3: 1",
            percent of sampling time: factor), points [(percent, factor), …], {part: points} or a
            `Schedule`. Tasks without one follow their own `TaskAdapter.schedule`, if they have any
            ("0: 1" keeps such a task from it).
        masks: Where tasks act: one for all, a list with one or None for each, or {name: mask}. A
            mask is a PIL image (white: 1), an array or tensor (H, W) in 0..1, or a list of such or
            None, one per prompt; it is cut as control pictures are. Text tokens get its mean. None:
            everywhere.

    Raises:
        DiffScalerError: An unknown or fused task, another number of weights, schedules or masks, or
            something that is none; in the call: another number of masks than prompts, or a
            scheduler whose time nobody knows.
    """
    names = [names] if isinstance(names, str) else list(names)
    each = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
    if len(names) != len(each):
        raise DiffScalerError(
            f"Length of adapter names {len(names)} is not equal to the length of the weights "
            f"{len(each)}"
        )
    check_names(pipe, names)
    check_unfused(pipe, "set the strength of", names)
    over_time, regions = schedules_of(names, schedules), regions_of(names, masks)
    chosen = dict(zip(names, each, strict=True))
    plans = [
        (state, {n: weight_in(state.component, w) for n, w in chosen.items() if n in state.tasks})
        for state in states_of(pipe)
    ]
    for state, own in plans:
        state.choose(pipe, own, over_time, regions)


def enable_diffscaler(pipe: DiffusionPipeline) -> None:
    """Lets the active tasks act again after `disable_diffscaler`."""
    for state in states_of(pipe):
        state.enabled = True
        state.apply()


def disable_diffscaler(pipe: DiffusionPipeline) -> None:
    """Makes the pipeline run its base, bit for bit; strengths are kept for `enable_diffscaler`.

    Raises:
        DiffScalerError: Tasks are fused, so the base is not there; unfuse first.
    """
    check_unfused(pipe, "disable")
    for state in states_of(pipe):
        state.enabled = False
        state.apply()


@contextmanager
def diffscaler_rows(
    pipe: DiffusionPipeline, rows: Sequence[Row], num_images_per_prompt: int | None = None
) -> Iterator[None]:
    """Runs another task for each prompt of a call, in one batch, until the context ends.

    Args:
        pipe: The pipeline. Guidance and pictures per prompt are spread over the batch as the
            pipeline itself does.
        rows: One entry per prompt: a task's name (strength 1), a mix {name: strength}, or None for
            the base.
        num_images_per_prompt: Needed only where no diffusers pipeline makes the calls.

    Raises:
        DiffScalerError: An unknown or fused task; in the call: rows that do not fit its batch.
    """
    mixes = [mix_of(row) for row in rows]
    check_names(pipe, [name for mix in mixes for name in mix])
    check_unfused(pipe, "run rows beside")
    with ExitStack() as running:
        for state in states_of(pipe):
            running.enter_context(state.running(RowRequest(tuple(rows), num_images_per_prompt)))
        yield


def get_list_diffscalers(pipe: DiffusionPipeline) -> dict[str, list[str]]:
    """Returns the loaded tasks: component -> names."""
    return {state.component: list(state.tasks) for state in states_of(pipe)}


def get_active_diffscalers(pipe: DiffusionPipeline) -> list[str]:
    """Returns the active tasks (those `set_diffscaler` chose, also while disabled)."""
    return list(dict.fromkeys(name for state in states_of(pipe) for name in state.weights))


def attachments(pipe: DiffusionPipeline) -> dict[str, Attachment]:
    """Returns what carries the tasks: component -> Attachment, to train or to move."""
    return {s.component: s.attachment for s in states_of(pipe) if s.attachment is not None}


def delete_diffscaler(pipe: DiffusionPipeline, names: str | Sequence[str]) -> None:
    """Unloads these tasks; the others stay as they are.

    Raises:
        DiffScalerError: An unknown or fused task; nothing is unloaded.
    """
    names = [names] if isinstance(names, str) else list(names)
    check_names(pipe, names)
    check_unfused(pipe, "delete")
    for state in states_of(pipe):
        state.let_go(names)


def unload_diffscaler(pipe: DiffusionPipeline, keep_fused: bool | None = None) -> None:
    """Unloads every task; the models are then bit for bit what they were.

    Args:
        pipe: The pipeline.
        keep_fused: Needed while tasks are fused. True: the fused weights stay, for good (as after
            `fuse_lora` and `unload_lora_weights`); False: the models' own are put back first.

    Raises:
        DiffScalerError: Tasks are fused and `keep_fused` was not given.
    """
    if keep_fused is None:
        check_unfused(pipe, "unload", hint=" or pass keep_fused=True to keep their effect for good")
    elif not keep_fused:
        unfuse_diffscaler(pipe)
    for state in states_of(pipe):
        state.clear()


def save_diffscaler(
    pipe: DiffusionPipeline,
    directory: str | Path,
    adapter_name: str | None = None,
    *,
    weight_name: str = FILE_NAME,
) -> Path:
    """Writes a loaded task, as it is now, and returns the file's path.

    Args:
        pipe: The pipeline.
        directory: Folder to write to, made if need be.
        adapter_name: Which task; may be left out while only one is loaded.
        weight_name: The file's name.

    Raises:
        DiffScalerError: No such task, or the disk refuses.
    """
    loaded = dict.fromkeys(n for names in get_list_diffscalers(pipe).values() for n in names)
    if adapter_name is None and len(loaded) == 1:
        adapter_name = next(iter(loaded))
    if adapter_name is None:
        raise DiffScalerError(f"say which task to save, adapter_name=…; loaded: {list(loaded)}")
    check_names(pipe, [adapter_name])
    parts = [s.current(adapter_name) for s in states_of(pipe) if adapter_name in s.tasks]
    layers = {name: tensors for part in parts for name, tensors in part.layers.items()}
    extras = {name: tensor for part in parts for name, tensor in part.extras.items()}
    task = parts[0].replace(layers=layers, extras=extras)
    return save_task(task, Path(directory) / weight_name)


def add_methods(*functions: Callable[..., Any]) -> None:
    """Gives every pipeline these functions as methods; twice does no harm.

    Raises:
        DiffScalerError: diffusers, or somebody else, uses one of the names already.
    """
    for function in functions:
        there = getattr(DiffusionPipeline, function.__name__, function)
        # as a node pack, or reloaded, this very package has another name or other functions
        if "diffscaler_core" not in str(getattr(there, "__module__", "")).split("."):
            raise DiffScalerError(
                f"DiffusionPipeline.{function.__name__} exists already, from "
                f"{getattr(there, '__module__', 'elsewhere')}; use the function of "
                f"{function.__module__} instead"
            )
    for function in functions:
        setattr(DiffusionPipeline, function.__name__, function)


add_methods(
    load_diffscaler,
    set_diffscaler,
    enable_diffscaler,
    disable_diffscaler,
    diffscaler_rows,
    diffscaler_control,
    set_diffscaler_control,
    get_list_diffscalers,
    get_active_diffscalers,
    delete_diffscaler,
    unload_diffscaler,
    fuse_diffscaler,
    unfuse_diffscaler,
    save_diffscaler,
)
