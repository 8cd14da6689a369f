"""Tasks on a ComfyUI MODEL: the only file that handles a ModelPatcher.

A model with tasks is a clone with one wrapper round `BaseModel.apply_model` and a list of entries
in its `transformer_options`, which ComfyUI copies from clone to clone. For each model call the
wrapper opens a `Carrier` scope on the model object being called. Changing a strength patches no
weight and loads nothing. A second wrapper, round the sampling, has control pictures encoded and
routes and regions laid out for the latents that are sampled.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.control import Control
from .call_regions import CallRegions
from .carrier import Carrier, is_running
from .context_window import check_window
from .control_checks import check_vae, control_kind
from .control_conds import PREFIX, ControlPicture, ControlRows, placed_conds
from .entries import Entry, factors_of, levels_at, ranges_at, weights_at
from .region_mask import RegionMask
from .row_conds import ROUTE, Route, placed_rows, tasks_at
from .step_caches import follow_rows, follow_step
from .task_memory import account, patcher_of
from .weights_alone import refuse_weights_alone

KEY = "diffscaler"
#: Combinations of tasks kept ready per model object.
_KEPT = 8
#: What a control is computed from, of its patch embedding.
_EMBEDDING = ("weight", "bias")

_carriers: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Any, Carrier]] = (
    weakref.WeakKeyDictionary()
)


def apply_task(
    model: ModelPatcher,
    task: TaskAdapter,
    strength: float | Mapping[str, float] = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    component: str | None = None,
    region: Tensor | None = None,
) -> ModelPatcher:
    """Returns a clone of the model that runs the task too; tasks add up as a parallel sum.

    Args:
        model: Any diffusion model; stays as it is.
        task: The task.
        strength: 1 as trained, 0 the model itself; or {"scale": …, "shift": …, "subspace": …}.
        start_percent: Where in sampling the task begins, 0 at full noise.
        end_percent: Where it ends.
        component: Which of the task's components this model is; None: its only one.
        region: Where in the picture the task acts, (H, W) or (N, H, W) in 0..1, of any size; N is 1
            or the latent batch. None: everywhere.

    Raises:
        MismatchError: The task does not fit this model.
        DiffScalerError: It is a control task, which needs a picture: see `apply_control`.
    """
    _check_plain(task)
    if not any(_per_part(strength)):
        return model
    mask = None if region is None else RegionMask(task.name, region)
    times = {"start_percent": start_percent, "end_percent": end_percent}
    return _applied(model, task, component, _per_part(strength), region=mask, **times)


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
    if not strength:
        return model
    times = {"start_percent": start_percent, "end_percent": end_percent}
    return _applied(model, task, component, _per_part(strength), control=picture.key, **times)


def route_tasks(
    model: ModelPatcher, tasks: Sequence[TaskAdapter], component: str | None = None
) -> tuple[ModelPatcher, list[Route]]:
    """Returns a clone of the model that runs tasks where conditionings route them, and the keys.

    A task that the model routes already is there once, however many conditionings route it. Rows
    that route none of them run as if they were not there; `row_conds.routed` routes them.

    Args:
        model: Any diffusion model; stays as it is.
        tasks: The tasks.
        component: Which of their components this model is; None: their only one.

    Raises:
        MismatchError: A task does not fit this model.
        DiffScalerError: One is a control task.
    """
    routes = []
    for task in tasks:
        _check_plain(task)
        route = (task, component)
        if all(entry.route != route for entry in tasks_on(model)):
            model = _applied(model, task, component, _per_part(1.0), route=route)
        routes.append(route)
    return model, routes


def _check_plain(task: TaskAdapter) -> None:
    if task.is_control:
        raise DiffScalerError(
            f"task {task.name!r} takes a control picture ({control_kind(task)}): connect it to "
            f"DiffScaler Control"
        )


def _applied(
    model: ModelPatcher,
    task: TaskAdapter,
    component: str | None,
    strengths: tuple[float, float, float],
    **facts: Any,
) -> ModelPatcher:
    """Returns a clone with one `Entry` more, made of these facts."""
    if not task.components:
        return model
    if task.new_classes:
        raise DiffScalerError(
            f"task {task.name!r} brings {len(task.new_classes)} classes to a base that is told "
            f"class numbers, and no model here is told any: run it in diffusers"
        )
    patcher = patcher_of(task, model, component)
    entry = Entry(task, patcher.model, strengths, **facts)
    clone = model.clone()
    if not clone.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _WRAPPER)
        # before anybody who may leave a step out
        steps = clone.wrappers.get(WrappersMP.PREDICT_NOISE, {})
        clone.wrappers[WrappersMP.PREDICT_NOISE] = {KEY: [_STEP], **steps}
    if (entry.control or entry.rides_on_rows) and not clone.get_wrappers(
        WrappersMP.OUTER_SAMPLE, KEY
    ):
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _PLACER)
    options = clone.model_options["transformer_options"]
    options[KEY] = [*options.get(KEY, ()), entry]
    others = clone.get_additional_models_with_key(KEY)
    if not any(patcher.is_clone(other) for other in others):
        clone.set_additional_models(KEY, [*others, patcher.clone()])
    refuse_weights_alone(clone, KEY, lambda one: [entry.task.name for entry in tasks_on(one)])
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
    """Returns the tasks a model runs, in the order they were put on it."""
    return tuple(model.model_options.get("transformer_options", {}).get(KEY, ()))


class Stays:
    """What ComfyUI keeps among a model's wrappers: base of them all."""

    def to(self, *args: object, **kwargs: object) -> Stays:
        """Does nothing: ComfyUI offers devices and dtypes, even float8, to whatever has `to`."""
        return self


class _Wrapper(Stays):
    """Runs one model call with its tasks."""

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `apply_model(x, t, …, transformer_options, **conds)`."""
        routes = kwargs.pop(ROUTE, None)
        controls = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
        model = executor.class_obj
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        entries = options.get(KEY, ())
        if not entries or is_running(model):  # the model and a hook may both bring this wrapper
            return executor(*args, **kwargs)
        x, sigma = args[0], args[1]
        factors = factors_of(entries, routes, controls)
        weights = weights_at(entries, model.model_sampling, sigma, factors)
        levels = levels_at(entries, model.model_sampling, sigma)
        follow_rows(options, weights, ranges_at(entries, levels))
        check_window(options.get("context_window"), entries, controls, args[0].ndim)
        if not weights.any():
            return executor(*args, **kwargs)
        # without a control its task is not there at all: others' sums round as they do alone
        here = [i for i, e in enumerate(entries) if e.control is None or e.control in controls]
        entries, weights = [entries[i] for i in here], weights[..., here, :]
        carrier = _carrier(model, entries)
        if levels is not None:
            carrier.set_time(_by_row(levels, len(x)))
        changed = carrier.prepare(weights, x.device, model.get_dtype_inference())
        account([entry.parameters for entry in entries], changed)
        compiled, references = is_compiled(model, options), len(kwargs.get("ref_latents") or ())
        given = _given(entries, weights, controls, carrier)
        if given:
            carrier.set_controls(given)
            if compiled:
                carrier.embed_now(x.to(model.get_dtype_inference()))
        regions = None
        if any(entry.region is not None for entry in entries):
            context = kwargs.get("c_crossattn")
            text = 0 if context is None else context.shape[1]
            asked = CallRegions(entries, routes, x.shape, references, text)
            regions = carrier.remembered(asked.key, lambda: asked.made(model))
        carrier.set_regions(regions)
        with carrier.running(model, compiled, references):
            return executor(*args, **kwargs)


class _Placer(Stays):
    """Lays out what rides on conditionings at the size that is sampled, before anything loads."""

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `outer_sample(noise, …, latent_shapes)` of a guider."""
        guider = executor.class_obj
        entries = guider.model_options["transformer_options"].get(KEY, ())
        shape = (kwargs.get("latent_shapes") or [args[0].shape])[0]
        names = {entry.control: entry.task.name for entry in entries if entry.control}
        if names:
            model = guider.model_patcher.model
            guider.conds = placed_conds(guider.conds, names, model, shape)
        if any(entry.rides_on_rows for entry in entries):
            routes = [entry.route for entry in entries if entry.route is not None]
            guider.conds = placed_rows(guider.conds, routes, shape)
        for entry in entries:
            if entry.region is not None:
                entry.region.check(shape[0])
        try:
            return executor(*args, **kwargs)
        finally:
            for kept in _carriers.values():
                for carrier in kept.values():
                    carrier.set_controls({})
                    carrier.set_regions(None)


class _Step(Stays):
    """Tells what may leave whole steps out which tasks run in this one."""

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `predict_noise(x, sigma, model_options, …)` of a guider."""
        guider, sigma, options = executor.class_obj, args[1], args[2]["transformer_options"]

        def strengths() -> object:
            sampling = guider.inner_model.model_sampling
            entries = options.get(KEY, ())
            weights = weights_at(entries, sampling, sigma, None)
            ranges = ranges_at(entries, levels_at(entries, sampling, sigma))
            return weights.tolist(), ranges, tasks_at(guider.conds, sigma)

        follow_step(options, strengths)
        return executor(*args, **kwargs)


_WRAPPER = _Wrapper()
_STEP = _Step()
_PLACER = _Placer()


def _by_row(levels: Tensor, rows: int) -> Tensor:
    """Returns noise levels one for each row of a call, or one for all, ()."""
    alike = len(levels) != rows or bool((levels == levels[:1]).all())
    return levels[0] if alike else levels


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


def refuse_tasks(model: ModelPatcher, advice: str) -> None:
    """Refuses a model that runs tasks already, with what to do instead.

    Raises:
        DiffScalerError: It does.
    """
    if tasks_on(model):
        names = ", ".join(repr(entry.task.name) for entry in tasks_on(model))
        raise DiffScalerError(f"this model runs tasks already ({names}); {advice}")


def refuse_compiled(model: ModelPatcher, why: str) -> None:
    """Refuses a compiled model.

    Raises:
        DiffScalerError: It is one.
    """
    if is_compiled(model.model, {"wrappers": model.wrappers}):
        raise DiffScalerError(
            f"this model is compiled, and {why}; connect the model before the compile node"
        )


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


def _per_part(strength: float | Mapping[str, float]) -> tuple[float, float, float]:
    if not isinstance(strength, Mapping):
        return (strength,) * 3
    return (strength["scale"], strength["shift"], strength["subspace"])
