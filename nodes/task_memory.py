"""What ComfyUI's memory management knows tasks by: a patcher for each, and the bytes it holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..diffscaler_core import TaskAdapter
from .carrier import TaskParameters
from .control_checks import check_embedding
from .keymap import native_controls, native_layers, native_windows

_patchers: weakref.WeakKeyDictionary[TaskAdapter, dict[Any, ModelPatcher]] = (
    weakref.WeakKeyDictionary()
)
_fitted: weakref.WeakKeyDictionary[
    nn.Module, weakref.WeakKeyDictionary[TaskAdapter, dict[Any, ModelPatcher]]
] = weakref.WeakKeyDictionary()


def patcher_of(task: TaskAdapter, model: ModelPatcher, component: str | None) -> ModelPatcher:
    """Returns what ComfyUI's memory management knows the task by, the same for all models alike.

    Remembered, as bringing a task's layers under a model's own names takes longer than a switch
    should.

    Raises:
        MismatchError: The task does not fit this model.
    """
    if component is None and len(task.components) == 1:
        component = task.components[0]
    place = (model.model.get_dtype_inference().itemsize, model.load_device, model.offload_device)
    replaced = tuple((n, id(new)) for n, new in model.object_patches.items() if "diffusion" in n)
    fitted = _fitted.setdefault(model.model, weakref.WeakKeyDictionary()).setdefault(task, {})
    key = (component, place, replaced)
    if key not in fitted:
        fitted[key] = _new_or_known(task, model.model, component, place)
    return fitted[key]


def _new_or_known(
    task: TaskAdapter, model: Any, component: str | None, place: tuple[Any, ...]
) -> ModelPatcher:
    layers = native_layers(task, model, component)
    controls = native_controls(task, model, component)
    if task.is_control:
        check_embedding(task, model, controls)
    held = (*layers.items(), *controls.items())
    shapes = tuple((name, tuple(t.shape)) for name, own in held for t in own.values())
    known = _known_of(task)
    if (shapes, place) not in known:
        windows = native_windows(task, model, component) if task.is_timed else {}
        parameters = TaskParameters(layers, task.info, controls, task.control_facts, windows)
        known[shapes, place] = _new_patcher(parameters, *place)
    return known[shapes, place]


def _known_of(task: TaskAdapter) -> dict[Any, ModelPatcher]:
    """Returns the patchers of a task; with other schedules it is the same parameters."""
    if task not in _patchers:
        known = list(_patchers.items())
        _patchers[task] = next((own for other, own in known if _is_alike(other, task)), {})
    return _patchers[task]


def _is_alike(one: TaskAdapter, other: TaskAdapter) -> bool:
    if one.info != other.info or len(one.tensors) != len(other.tensors):
        return False
    return all(a is b for a, b in zip(one.tensors, other.tensors, strict=True))


def _new_patcher(
    parameters: TaskParameters,
    itemsize: int,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Makes a patcher that counts the parameters, and what one model will compute from them."""
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    computed = itemsize * sum(p.numel() for p in parameters.parameters())
    patcher = kind(parameters, load_device, offload_device, size=parameters.nbytes + computed)
    again = (parameters, itemsize, load_device, offload_device)
    patcher.cached_patcher_init = (_copied_patcher, again)
    return patcher


def _copied_patcher(parameters: TaskParameters, *args: Any, **kwargs: Any) -> ModelPatcher:
    """Makes a patcher round a copy, which a second GPU's clone of the model brings along."""
    return _new_patcher(parameters.copy(), *args, **kwargs)


def account(tasks: Sequence[TaskParameters], changed: bool) -> None:
    """Tells ComfyUI what the tasks hold now: parameters, and what was computed from them.

    Each sampling may load another clone of a task's patcher, which still believes what was so then.
    """
    held = set(tasks)
    for parameters in held if changed else ():
        parameters.held_bytes = parameters.nbytes + parameters.folded_bytes
        if getattr(parameters, "model_loaded_weight_memory", 0):
            parameters.model_loaded_weight_memory = parameters.held_bytes
    for patcher in comfy.model_management.loaded_models():
        if patcher.model in held and patcher.model.held_bytes:
            patcher.size = patcher.model.held_bytes
