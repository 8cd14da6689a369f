"""A pipeline's models and their tasks: finding them, and loading a task onto all or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from ..affiner import PARTS
from ..attach import Weight
from ..errors import DiffScalerError, MismatchError, UnknownNameError
from ..file_rules import COMPONENTS
from ..files import load_task, task_from_tensors
from ..hotswap import check_hotswap, swap_tensors
from ..hub import find_task_file
from ..task import TaskAdapter
from .state import ModelState, bare, state_of

Source = str | Path | Mapping[str, Any] | TaskAdapter


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Returns the pipeline's denoisers, component -> model.

    Raises:
        DiffScalerError: It has none.
    """
    there = ((name, getattr(pipe, name, None)) for name in COMPONENTS)
    models = {name: model for name, model in there if isinstance(model, nn.Module)}
    if not models:
        raise DiffScalerError(f"{type(pipe).__name__} has none of {', '.join(COMPONENTS)}")
    return models


def states_of(pipe: Any) -> list[ModelState]:
    """Returns the states of those denoisers that carry tasks."""
    found = (state_of(model) for model in models_of(pipe).values())
    return [state for state in found if state is not None]


def check_names(pipe: Any, names: Sequence[str]) -> None:
    """Raises UnknownNameError unless all these tasks are loaded."""
    present = {name for state in states_of(pipe) for name in state.tasks}
    if missing := set(names) - present:
        raise UnknownNameError(
            f"Adapter name(s) {missing} not in the list of present adapters: {present or '{}'}."
        )


def check_unfused(pipe: Any, what: str, names: Sequence[str] | None = None, hint: str = "") -> None:
    """Raises DiffScalerError if any task, or any of these, is fused: one cannot `what` it then."""
    fused = {name for s in states_of(pipe) if s.fused is not None for name in s.fused.weights}
    held = sorted(fused if names is None else fused & set(names))
    if held:
        raise DiffScalerError(
            f"cannot {what} {', '.join(held)}: fused into the model's weights; "
            f"call unfuse_diffscaler() first{hint}"
        )


def weight_in(component: str, weight: Any) -> Weight:
    """Returns what a strength means for one component: a number, or {part: number}.

    Raises:
        UnknownNameError: It is a mapping with other keys than parts or components.
        DiffScalerError: It is no finite number.
    """
    if not isinstance(weight, Mapping):
        weight = 1.0 if weight is None else float(weight)
        if not math.isfinite(weight):
            raise DiffScalerError(f"a strength must be a finite number, got {weight}")
        return weight  # type: ignore[no-any-return]
    known = COMPONENTS if any(key in COMPONENTS for key in weight) else PARTS
    if odd := [key for key in weight if key not in known]:
        raise UnknownNameError(f"unknown part {odd[0]!r} of a strength; known: {', '.join(known)}")
    if known is COMPONENTS:
        return weight_in(component, weight.get(component))
    return {part: float(weight_in(component, w)) for part, w in weight.items()}  # type: ignore


def read_task(source: Source, **where: Any) -> TaskAdapter:
    """Returns the task of a file, folder, repository, TaskAdapter or mapping of tensors.

    Args:
        source: The task; tensors given directly are copied.
        where: As in `hub.find_task_file`, for a folder or repository.

    Raises:
        DiffScalerError: There is none, or it is broken.
    """
    if isinstance(source, TaskAdapter):
        task = source
    elif isinstance(source, Mapping):
        task = task_from_tensors(source, "the mapping")
    else:
        return load_task(find_task_file(source, **where))
    # a copy: hotswap and training write into tensors, and those of the caller are the caller's
    own = {n: {k: t.detach().clone() for k, t in ts.items()} for n, ts in task.layers.items()}
    extras = {name: tensor.detach().clone() for name, tensor in task.extras.items()}
    return task.replace(layers=own, extras=extras)


def models_for(
    task: TaskAdapter, models: Mapping[str, nn.Module], pipeline: str
) -> dict[str, nn.Module]:
    """Returns the models a task adapts, component -> model (the first for one without layers).

    Raises:
        MismatchError: The pipeline has not got all of them.
    """
    wanted = task.components or tuple(models)[:1]
    if any(component not in models for component in wanted):
        raise MismatchError(
            f"task {task.name!r} adapts {', '.join(wanted)}, but this {pipeline} has "
            f"{', '.join(models)}: load it into a pipeline of the base it was made for"
        )
    return {component: models[component] for component in wanted}


def add_task(name: str, task: TaskAdapter, models: Mapping[str, nn.Module]) -> None:
    """Attaches a task to all its models, at strength 0, or to none.

    Raises:
        DiffScalerError: The name is in use, the task does not fit, or a model is compiled.
    """
    if any(name in state.tasks for state in map(state_of, models.values()) if state is not None):
        raise DiffScalerError(
            f"Adapter name {name} already in use in the model - please select a new adapter name, "
            f"or pass hotswap=True to replace its tensors."
        )
    with ExitStack() as undo:
        for component, model in models.items():
            state = state_of(model) or ModelState(bare(model), component)
            state.take_in(name, task, model)
            undo.callback(state.let_go, [name])
        undo.pop_all()


def swap_task(name: str, task: TaskAdapter, models: Mapping[str, nn.Module]) -> None:
    """Copies a task over the loaded one of that name, in place, on all its models or on none.

    Raises:
        DiffScalerError: No such task is loaded, it is fused, or the new one does not fit into it.
    """
    states = [(c, state) for c, m in models.items() if (state := state_of(m)) is not None]
    if len(states) < len(models) or any(name not in state.tasks for _, state in states):
        raise DiffScalerError(
            f"hotswap=True replaces a loaded task, but none is called {name!r}; "
            f"give the name of a loaded one, or hotswap=False"
        )
    if any(state.is_fused(name) for _, state in states):
        raise DiffScalerError(f"task {name!r} is fused; call unfuse_diffscaler() before hotswap")
    running = [(s, s.attachment, c) for c, s in states if s.attachment is not None]
    for state, attachment, component in running:
        check_hotswap(attachment, name, state.tasks[name], task, component)
    for state, attachment, component in running:
        before = state.tasks[name].info
        swap_tensors(attachment, name, task, component)
        # what was loaded first keeps its gains: they are part of the attached affiners
        kept: dict[str, Any] = {"gain": before.get("gain", 1.0)}
        if before.get("control"):
            own = task.info.get("control") or {}
            kept["control"] = {**own, "gain": before["control"].get("gain", 1.0)}
        state.tasks[name] = task.with_info(**kept)
        state.apply()
