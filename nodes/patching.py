"""Tasks on a ComfyUI MODEL: the only file that handles a ModelPatcher.

A model with tasks is a clone with one wrapper round `BaseModel.apply_model` and a list of entries
in its `transformer_options`, which ComfyUI copies from clone to clone. For each model call the
wrapper opens a `Carrier` scope on the model object being called. Changing a strength patches no
weight and loads nothing. A second wrapper, round the sampling, has control pictures encoded.
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
from ..diffscaler_core.control import Control
from .carrier import Carrier, TaskParameters, is_running
from .control_checks import check_embedding, check_vae, control_kind
from .control_conds import PREFIX, ControlPicture, ControlRows, placed_conds
from .keymap import native_controls, native_layers

KEY = "diffscaler"
#: A conditioning's `model_conds` entry: strengths per batch row, (1 or B, number of tasks).
ROUTE = "ds_route"
#: Combinations of tasks kept ready per model object.
_KEPT = 8
#: What a control is computed from, of its patch embedding.
_EMBEDDING = ("weight", "bias")

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
        control: Of a control task, the key of its picture in `model_conds`.
    """

    task: TaskAdapter
    parameters: TaskParameters
    strengths: tuple[float, float, float]
    start_percent: float = 0.0
    end_percent: float = 1.0
    control: str | None = None

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
        DiffScalerError: It is a control task, which needs a picture: see `apply_control`.
    """
    if task.is_control:
        raise DiffScalerError(
            f"task {task.name!r} takes a control picture ({control_kind(task)}): connect it to "
            f"DiffScaler Control"
        )
    return _applied(model, task, _per_part(strength), start_percent, end_percent, component)


def apply_control(
    model: ModelPatcher,
    task: TaskAdapter,
    picture: ControlPicture,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    component: str | None = None,
) -> ModelPatcher:
    """Returns a clone of the model that runs a control task where conditionings carry its picture.

    Other rows run as if the task were not there. See `apply_task` for the other arguments.

    Args:
        model: Any diffusion model; stays as it is.
        task: A control task.
        picture: What it is given; `picture.on` puts it on a conditioning.
        strength: Of the whole task: of the picture's embedding and of what reads it.
        start_percent: Where in sampling it begins.
        end_percent: Where it ends.
        component: Which of the task's components this model is.

    Raises:
        MismatchError: The task does not fit this model.
        DiffScalerError: It is no control task, or the VAE is missing or another base's.
    """
    if not task.is_control:
        raise DiffScalerError(
            f"task {task.name!r} takes no control picture: connect it to Apply DiffScaler Task, or "
            f"load a task that was trained with control pictures"
        )
    check_vae(model, picture)
    return _applied(
        model, task, _per_part(strength), start_percent, end_percent, component, picture.key
    )


def _applied(
    model: ModelPatcher,
    task: TaskAdapter,
    strengths: tuple[float, float, float],
    start_percent: float,
    end_percent: float,
    component: str | None,
    control: str | None = None,
) -> ModelPatcher:
    if not any(strengths) or not task.components:
        return model
    patcher = _patcher_of(task, model, component)
    entry = Entry(task, patcher.model, strengths, start_percent, end_percent, control)
    clone = model.clone()
    if not clone.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _WRAPPER)
    if control and not clone.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _PLACER)
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
        controls = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
        model = executor.class_obj
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        entries = options.get(KEY, ())
        if not entries or is_running(model):  # the model and a hook may both bring this wrapper
            return executor(*args, **kwargs)
        x, sigma = args[0], args[1]
        rows = _rows(entries, route, controls)
        weights = _weights(entries, model.model_sampling, sigma, rows)
        if not weights.any():
            return executor(*args, **kwargs)
        # without a control its task is not there at all: others' sums round as they do alone
        here = [i for i, e in enumerate(entries) if e.control is None or e.control in controls]
        entries, weights = [entries[i] for i in here], weights[..., here, :]
        carrier = _carrier(model, entries)
        if carrier.prepare(weights, x.device, model.get_dtype_inference()):
            _account(model, entries)
        compiled, references = is_compiled(model, options), len(kwargs.get("ref_latents") or ())
        given = _given(entries, weights, controls, carrier)
        if given:
            carrier.set_controls(given)
            if compiled:
                carrier.embed_now(x.to(model.get_dtype_inference()))
        with carrier.running(model, compiled, references):
            return executor(*args, **kwargs)


class _Placer:
    """Has the controls encoded at the size that is sampled, before anything is loaded for it."""

    def to(self, *args: object, **kwargs: object) -> _Placer:
        """Does nothing, as `_Wrapper.to`."""
        return self

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `outer_sample(noise, …, latent_shapes)` of a guider."""
        guider = executor.class_obj
        names = {
            entry.control: entry.task.name
            for entry in guider.model_options["transformer_options"].get(KEY, ())
            if entry.control
        }
        shape = (kwargs.get("latent_shapes") or [args[0].shape])[0]
        guider.conds = placed_conds(guider.conds, names, guider.model_patcher.model, shape)
        try:
            return executor(*args, **kwargs)
        finally:
            for kept in _carriers.values():
                for carrier in kept.values():
                    carrier.set_controls({})


_WRAPPER = _Wrapper()
_PLACER = _Placer()


def _rows(
    entries: Sequence[Entry], route: Tensor | None, controls: Mapping[str, ControlRows]
) -> Tensor | None:
    """Returns the factor of each task in each row, (B, K), or (1, K) if none differ; None: all 1.

    Raises:
        DiffScalerError: The conditioning routes another number of tasks.
    """
    rows = None
    if route is not None:
        rows = route.detach().to("cpu", torch.float32)
        if rows.ndim != 2 or rows.shape[1] != len(entries):
            raise DiffScalerError(
                f"the conditioning routes {rows.shape[-1]} tasks, but the model runs "
                f"{len(entries)}: connect the routed conditioning to the model it was routed for"
            )
    for slot, entry in enumerate(entries):
        if entry.control is not None:
            given = controls.get(entry.control)
            factors = torch.zeros(1) if given is None or not given.is_placed else given.factors
            rows = torch.ones(1, len(entries)) if rows is None else rows
            rows = rows.expand(max(len(rows), len(factors)), -1).clone()
            rows[:, slot] *= factors
    return rows


def _given(
    entries: Sequence[Entry],
    weights: Tensor,
    controls: Mapping[str, ControlRows],
    carrier: Carrier,
) -> dict[int, Control]:
    """Returns the control of every task that runs one now; the same pictures, the same object."""
    given = {}
    for slot, entry in enumerate(entries):
        if entry.control in controls and bool(weights[..., slot, :].any()):
            rows = controls[entry.control]
            given[slot] = carrier.remembered(rows.key, rows.control)
    return given


def _weights(
    entries: Sequence[Entry], model_sampling: Any, sigma: Tensor, rows: Tensor | None
) -> Tensor:
    """Returns the strengths in force: (K, 3), or (B, K, 3) where rows differ."""
    active = [entry.is_active(model_sampling, sigma) for entry in entries]
    zero = (0.0,) * len(PARTS)
    weights = torch.tensor(
        [entry.strengths if on else zero for entry, on in zip(entries, active, strict=True)]
    )
    if rows is None:
        return weights
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
        read = {f"{name}.bias" for task in parameters for name in task.affiners}
        read |= {f"{n}.{kind}" for t in parameters for n in t.controls for kind in _EMBEDDING}
        if any(name in patcher.hook_backup for name in read):
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
    controls = native_controls(task, model.model, component)
    if task.is_control:
        check_embedding(task, model.model, controls)
    held = (*layers.items(), *controls.items())
    shapes = tuple((name, tuple(t.shape)) for name, own in held for t in own.values())
    place = (model.model.get_dtype_inference().itemsize, model.load_device, model.offload_device)
    known = _patchers.setdefault(task, {})
    if (shapes, place) not in known:
        parameters = TaskParameters(layers, task.info, controls, task.control_facts)
        known[shapes, place] = _new_patcher(parameters, *place)
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
