"""Tasks on a ComfyUI MODEL: the only file that handles a ModelPatcher.

A model with tasks is a clone with one wrapper round `BaseModel.apply_model` and a list of entries
in its `transformer_options`, which ComfyUI copies from clone to clone. For each model call the
wrapper opens a `Carrier` scope on the model object being called. Changing a strength patches no
weight and loads nothing.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.affiner import PARTS
from .carrier import Carrier, TaskParameters, is_running
from .keymap import native_layers

KEY = "diffscaler"
#: A conditioning's `model_conds` entry: strengths per batch row, (1 or B, number of tasks).
ROUTE = "ds_route"
#: Combinations of tasks kept ready per model object.
_KEPT = 8

_patchers: weakref.WeakKeyDictionary[TaskAdapter, dict[Any, ModelPatcher]] = (
    weakref.WeakKeyDictionary()
)
_carriers: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, Carrier]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True, eq=False)
class Entry:
    """One task on a model. Immutable: ComfyUI shares it between clones and cached outputs.

    Attributes:
        task: The task.
        parameters: Its parameters under the model's own names.
        strengths: Per part, in PARTS order.
        start_percent: Where in sampling it begins, 0 at full noise.
        end_percent: Where it ends, 1 at none.
    """

    task: TaskAdapter
    parameters: TaskParameters
    strengths: tuple[float, float, float]
    start_percent: float = 0.0
    end_percent: float = 1.0

    def is_active(self, model_sampling: Any, sigma: Tensor) -> bool:
        """Says whether a noise level is in range; the ends count, as in ComfyUI's own nodes."""
        if self.start_percent <= 0 and self.end_percent >= 1:
            return True  # do not wait for the GPU to learn sigma
        now = float(sigma.flatten()[0])
        first = float(model_sampling.percent_to_sigma(self.start_percent))
        last = float(model_sampling.percent_to_sigma(self.end_percent))
        return last <= now <= first


def apply_task(
    model: ModelPatcher,
    task: TaskAdapter,
    strength: float | Mapping[str, float] = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    component: str | None = None,
) -> ModelPatcher:
    """Returns a clone of the model that runs the task too; tasks add up as a parallel sum.

    Args:
        model: Any diffusion model; stays as it is.
        task: The task.
        strength: 1 as trained, 0 the model itself; or {"scale": …, "shift": …, "subspace": …}.
        start_percent: Where in sampling the task begins, 0 at full noise.
        end_percent: Where it ends.
        component: Which of the task's components this model is; None: its only one.

    Raises:
        MismatchError: The task does not fit this model.
    """
    strengths = _per_part(strength)
    if not any(strengths) or not task.layers:
        return model
    patcher = _patcher_of(task, model, component)
    entry = Entry(task, patcher.model, strengths, start_percent, end_percent)
    clone = model.clone()
    if not clone.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _WRAPPER)
    options = clone.model_options["transformer_options"]
    options[KEY] = [*options.get(KEY, ()), entry]
    others = clone.get_additional_models_with_key(KEY)
    if not any(patcher.is_clone(other) for other in others):
        clone.set_additional_models(KEY, [*others, patcher.clone()])
    return clone


def apply_tasks(
    model: ModelPatcher,
    tasks: Sequence[TaskAdapter],
    strengths: Sequence[float],
    component: str | None = None,
) -> ModelPatcher:
    """Returns a clone of the model that runs all these tasks too, each at its strength.

    Raises:
        MismatchError: A task does not fit this model.
    """
    for task, strength in zip(tasks, strengths, strict=True):
        model = apply_task(model, task, strength, component=component)
    return model


def tasks_on(model: ModelPatcher) -> tuple[Entry, ...]:
    """Returns the tasks a model runs, in the order of a route's columns."""
    return tuple(model.model_options.get("transformer_options", {}).get(KEY, ()))


class _Wrapper:
    """Runs one model call with its tasks."""

    def to(self, *args: object, **kwargs: object) -> _Wrapper:
        """Does nothing: ComfyUI offers devices and dtypes, even float8, to whatever has `to`."""
        return self

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `apply_model(x, t, …, transformer_options, **conds)`."""
        route = kwargs.pop(ROUTE, None)
        model = executor.class_obj
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        entries = options.get(KEY, ())
        if not entries or is_running(model):  # the model and a hook may both bring this wrapper
            return executor(*args, **kwargs)
        x, sigma = args[0], args[1]
        weights = _weights(entries, model.model_sampling, sigma, route)
        if not weights.any():
            return executor(*args, **kwargs)
        carrier = _carrier(model, entries)
        if carrier.prepare(weights, x.device, model.get_dtype_inference()):
            _account(model, entries)
        with carrier.running(model, is_compiled(model, options)):
            return executor(*args, **kwargs)


_WRAPPER = _Wrapper()


def _weights(
    entries: Sequence[Entry], model_sampling: Any, sigma: Tensor, route: Tensor | None
) -> Tensor:
    """Returns the strengths in force: (K, 3), or (B, K, 3) where a route tells rows apart."""
    active = [entry.is_active(model_sampling, sigma) for entry in entries]
    zero = (0.0,) * len(PARTS)
    weights = torch.tensor(
        [entry.strengths if on else zero for entry, on in zip(entries, active, strict=True)]
    )
    if route is None:
        return weights
    rows = route.detach().to("cpu", torch.float32)
    if rows.ndim != 2 or rows.shape[1] != len(entries):
        raise DiffScalerError(
            f"the conditioning routes {rows.shape[-1]} tasks, but the model runs {len(entries)}: "
            f"connect the routed conditioning to the model it was routed for"
        )
    if bool((rows == rows[:1]).all()):
        return rows[0, :, None] * weights
    return rows[:, :, None] * weights


def is_compiled(model: Any, options: Mapping[str, Any]) -> bool:
    """Says whether a `BaseModel` runs compiled code, given the options of its call."""
    wrapped = "torch.compile" in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return wrapped or hasattr(model.diffusion_model, "_orig_mod")


def _carrier(model: Any, entries: Sequence[Entry]) -> Carrier:
    """Returns the carrier of these tasks on this model object, from the last calls or made now.

    It remembers the layers' biases, so another state of the weight patches is another carrier;
    while a schedule changes a bias itself (hooked weights), nothing is remembered.
    """
    parameters = [entry.parameters for entry in entries]
    patcher = model.current_patcher
    if patcher is not None and patcher.hook_backup:
        biases = (f"{name}.bias" for task in parameters for name in task.affiners)
        if any(bias in patcher.hook_backup for bias in biases):
            return Carrier(model, parameters, check=False)
    replaced = {} if patcher is None else patcher.object_patches
    key = (
        tuple(id(task) for task in parameters),
        model.current_weight_patches_uuid,
        tuple((name, id(new)) for name, new in replaced.items() if "diffusion_model" in name),
    )
    kept = _carriers.setdefault(model, OrderedDict())
    carrier = kept.get(key)
    if carrier is None or carrier.closed:
        kept[key] = carrier = Carrier(model, parameters)
        for old in [k for k, c in kept.items() if c.closed] + list(kept)[:-_KEPT]:
            kept.pop(old, None)
    kept.move_to_end(key)
    return carrier


def _patcher_of(task: TaskAdapter, model: ModelPatcher, component: str | None) -> ModelPatcher:
    """Returns what ComfyUI's memory management knows the task by, the same for all models alike.

    Raises:
        MismatchError: The task does not fit this model.
    """
    if component is None and len(task.components) == 1:
        component = task.components[0]
    layers = native_layers(task, model.model, component)
    shapes = tuple((n, tuple(t.shape)) for n, own in layers.items() for t in own.values())
    place = (model.model.get_dtype_inference().itemsize, model.load_device, model.offload_device)
    known = _patchers.setdefault(task, {})
    if (shapes, place) not in known:
        known[shapes, place] = _new_patcher(TaskParameters(layers, task.info), *place)
    return known[shapes, place]


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


def _account(model: Any, entries: Sequence[Entry]) -> None:
    """Tells ComfyUI what the tasks hold now: parameters, and what was computed from them."""
    own = model.current_patcher
    patchers = [] if own is None else own.get_additional_models_with_key(KEY)
    for parameters in {entry.parameters for entry in entries}:
        held = parameters.nbytes + parameters.folded_bytes
        for patcher in patchers:
            if patcher.model is parameters:
                patcher.size = held
        if getattr(parameters, "model_loaded_weight_memory", 0):
            parameters.model_loaded_weight_memory = held


def _per_part(strength: float | Mapping[str, float]) -> tuple[float, float, float]:
    if not isinstance(strength, Mapping):
        return (strength,) * 3
    return (strength["scale"], strength["shift"], strength["subspace"])
