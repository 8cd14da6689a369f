"""Several tasks to one, and one task to a weaker or stronger one. Exact; no model needed."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .affiner import PARTS
from .classes import CLASSES, ROWS
from .errors import DiffScalerError, first_names, shown, unknown
from .targets import pattern_value
from .task import TaskAdapter, parts_of
from .windows import UnitWindows, gathered, joined, limited, on, united

#: Noise levels, from above one log-SNR up to another; None: no end.
Range = tuple[float | None, float | None]

#: Which part's strength multiplies which tensor; U carries the subspace's.
_PART_OF = {"scale": "scale", "shift": "shift", "up": "subspace", ROWS: "shift"}


def combine_tasks(
    tasks: Sequence[TaskAdapter],
    weights: Sequence[float] | None = None,
    name: str | None = None,
    *,
    ranges: Sequence[Range | None] | None = None,
) -> TaskAdapter:
    """Returns one task that does what `tasks` do together at these strengths; exact.

    Scales and shifts add, subspaces concatenate their ranks. Where relu and identity meet, the
    identity subspace is written as relu(z) − relu(−z), at twice its rank. New classes are numbered
    anew, in the tasks' order; each runs the layers of all tasks. Hidden units keep the noise levels
    that they act at.

    Args:
        tasks: One or more tasks of the same base.
        weights: Strength of each; default 1.
        name: The new task's name; default: the names joined by "+".
        ranges: Noise levels that each acts at; see `limit_task`. None, also for one: as it does.

    Raises:
        DiffScalerError: No task, another number of weights or ranges, other shapes, other
            schedules, scales that treat the frozen bias differently, a control task among several,
            new classes of one name or of different tables, or a range for a task with more than
            subspaces.
    """
    if ranges is not None:
        if len(ranges) != len(tasks):
            raise DiffScalerError(
                f"{len(tasks)} tasks and {len(ranges)} ranges: need as many of each"
            )
        pairs = zip(tasks, ranges, strict=True)
        tasks = [task if own is None else limit_task(task, *own) for task, own in pairs]
    weights = [1.0] * len(tasks) if weights is None else list(weights)
    if not tasks or len(tasks) != len(weights):
        raise DiffScalerError(
            f"{len(tasks)} tasks and {len(weights)} weights: need as many of each"
        )
    _check_alike(tasks)
    relu = any(_activation(task) == "relu" for task in tasks)
    layers: dict[str, dict[str, Tensor]] = {}
    for task, weight in zip(tasks, weights, strict=True):
        gain = float(task.info.get("gain", 1.0))
        for layer, tensors in task.layers.items():
            own = _scaled(tensors, dict.fromkeys(PARTS, weight))
            if "up" in own:
                own["up"] = own["up"] if gain == 1.0 else _wide(own["up"]) * gain
                if relu and _activation(task) == "identity":
                    own["down"] = torch.cat([own["down"], -own["down"]])
                    own["up"] = torch.cat([own["up"], -own["up"]], dim=1)
            layers[layer] = _added(layer, layers.get(layer), own)
    info = _combined_info(tasks, weights, name, "relu" if relu else "identity")
    conditioning, prompts = _combined_prompts(tasks)
    extras, classes = _combined_classes(tasks, weights)
    if len(tasks) == 1:
        extras = _scaled_extras(tasks[0], dict.fromkeys(PARTS, weights[0]))
    facts = {**info, **prompts, **classes, **_combined_windows(tasks, layers, relu)}
    return TaskAdapter(layers, facts, conditioning, {}, extras, tasks[0].schedule)


def limit_task(
    task: TaskAdapter, above: float | None = None, below: float | None = None
) -> TaskAdapter:
    """Returns a task that acts at the noise levels above < λ <= below alone, λ the log-SNR.

    λ = 2 ln(α/σ) falls with noise: for a flow it is 0 at time 0.5, and 2.2 at 0.25.

    Args:
        task: A task of subspaces alone (method lora, or an imported LoRA); stays as it is.
        above: λ of the noisier end; None: pure noise.
        below: λ of the cleaner end; None: no noise.

    Raises:
        DiffScalerError: Nothing lies between, or the task has scales, shifts, a control or classes,
            which act at every noise level.
    """
    others = [part for part in parts_of(task.layers) if part != "subspace"]
    others += ["control"] * task.is_control + ["classes"] * bool(task.new_classes)
    if others or not task.layers:
        raise DiffScalerError(
            f"only hidden units can be limited to noise levels, and task {task.name!r} has "
            f"{', '.join(others) or 'none'}: take one of method lora, or give it a schedule"
        )
    low, high = (-math.inf if above is None else above), (math.inf if below is None else below)
    own: dict[str, UnitWindows] = {}
    for component in task.components:
        windows = task.component_windows(component)
        for name, tensors in task.component_layers(component).items():
            known = windows.get(name)
            own[f"{component}.{name}"] = limited(known, len(tensors["down"]), low, high)
    return task.with_info(windows=_facts_of(own))


def _combined_windows(
    tasks: Sequence[TaskAdapter], layers: Mapping[str, Mapping[str, Tensor]], relu: bool
) -> dict[str, Any]:
    """Returns when the units of a sum act, as the facts say it."""
    if not any(task.is_timed for task in tasks):
        return {}
    known = [
        {f"{c}.{n}": own for c in task.components for n, own in task.component_windows(c).items()}
        for task in tasks
    ]
    found: dict[str, UnitWindows] = {}
    for layer, tensors in layers.items():
        parts: list[UnitWindows | None] = []
        ranks: list[int] = []
        for task, own in zip(tasks, known, strict=True):
            rank = len(task.layers.get(layer, {}).get("down", ()))
            twice = 2 if relu and _activation(task) == "identity" else 1
            parts += [own.get(layer)] * twice
            ranks += [rank] * twice
        if "down" in tensors:
            found[layer] = joined(parts, ranks) or UnitWindows((), ((0, 1, sum(ranks)),))
    return {"windows": _facts_of(found)}


def _facts_of(windows: Mapping[str, UnitWindows]) -> dict[str, Any]:
    edges = united(*(own.edges for own in windows.values()))
    return gathered(edges, {name: on(edges, own) for name, own in windows.items()}, {}).facts


def scale_task(
    task: TaskAdapter,
    strength: float = 1.0,
    *,
    parts: Mapping[str, float] | None = None,
    layers: Mapping[str, float] | None = None,
) -> TaskAdapter:
    """Returns a task whose trained effect is multiplied: as a whole, per part, per layer.

    The control affiner of a control task is multiplied too, and new classes with the factor of the
    shift; a schedule stays.

    Args:
        task: The task; stays as it is.
        strength: Multiplies everything.
        parts: {part: factor} for "scale", "shift", "subspace"; absent parts 1.
        layers: {pattern: factor}, the first pattern that matches a layer's module name (a regular
            expression for the whole name, or a name ending) decides; no match: 1.

    Raises:
        UnknownNameError: No such part.
        DiffScalerError: A pattern matches no layer.
    """
    for part in parts or {}:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    _check_patterns(task, layers)
    factors = {part: strength * (parts or {}).get(part, 1.0) for part in PARTS}
    scaled: dict[str, dict[str, Tensor]] = {}
    for layer, tensors in task.layers.items():
        own = pattern_value(layer.partition(".")[2], layers, 1.0)
        scaled[layer] = _scaled(tensors, {part: f * own for part, f in factors.items()})
    return task.replace(layers=scaled, extras=_scaled_extras(task, factors))


def cast_task(task: TaskAdapter, dtype: torch.dtype) -> TaskAdapter:
    """Returns the task with all its tensors in another dtype."""
    return task.replace(
        layers={n: {k: t.to(dtype) for k, t in own.items()} for n, own in task.layers.items()},
        conditioning={name: tensor.to(dtype) for name, tensor in task.conditioning.items()},
        extras={name: tensor.to(dtype) for name, tensor in task.extras.items()},
    )


def _scaled(tensors: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    return {
        name: t
        if name not in _PART_OF or factors[_PART_OF[name]] == 1.0
        # in float32, so that a weak task in 16 bits does not lose its last digits
        else _wide(t) * factors[_PART_OF[name]]
        for name, t in tensors.items()
    }


def _scaled_extras(task: TaskAdapter, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns the tensors of a task's control affiner and new classes, multiplied."""
    return {
        name: _scaled({name.rpartition(".")[2]: tensor}, factors)[name.rpartition(".")[2]]
        for name, tensor in task.extras.items()
    }


def _added(
    layer: str, old: Mapping[str, Tensor] | None, new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if old is None:
        return dict(new)
    widths = {len(t) for own in (old, new) for name, t in own.items() if name != "down"}
    inputs = {tuple(own["down"].shape[1:]) for own in (old, new) if "down" in own}
    if len(widths) > 1 or len(inputs) > 1:
        raise DiffScalerError(
            f"the tasks have other shapes at {layer!r}, so they are of different bases; only tasks "
            f"of one base can be combined"
        )
    summed = {**old, **new}
    for name in ("scale", "shift"):
        if name in old and name in new:
            summed[name] = _wide(old[name]) + _wide(new[name])
    if "down" in old and "down" in new:
        summed["down"] = torch.cat([old["down"], new["down"]])
        summed["up"] = torch.cat([old["up"], new["up"]], dim=1)
    return summed


def _check_alike(tasks: Sequence[TaskAdapter]) -> None:
    if len(tasks) > 1 and any(task.is_control for task in tasks):
        raise DiffScalerError("a control task cannot be combined with others; stack them instead")
    if len({task.schedule for task in tasks}) > 1:
        raise DiffScalerError(
            "tasks with different schedules cannot be combined into one: give all of them the same "
            "schedule or none, or stack them instead"
        )
    families = {_base_fact(task, "family") for task in tasks if task.layers} - {None, "unknown"}
    if len(families) > 1:
        raise DiffScalerError(
            f"tasks of different bases cannot be combined: {sorted(map(str, families))}"
        )
    if len({bool(task.info.get("scale_includes_bias")) for task in _with_scale(tasks)}) > 1:
        raise DiffScalerError(
            "one task's scale multiplies the frozen bias (DiffFit), another's does not: "
            "their sum is no task without knowing the bias; stack them instead"
        )


def _check_patterns(task: TaskAdapter, layers: Mapping[str, float] | None) -> None:
    names = [layer.partition(".")[2] for layer in task.layers]
    for pattern in layers or {}:
        if not any(pattern_value(name, {pattern: True}, False) for name in names):
            raise DiffScalerError(
                f"pattern {shown(pattern)} matches none of the {len(names)} layers of task "
                f"{task.name!r}, for example {', '.join(names[:2]) or 'none'}"
            )


def _combined_info(
    tasks: Sequence[TaskAdapter], weights: Sequence[float], name: str | None, activation: str
) -> dict[str, Any]:
    methods = list(dict.fromkeys(str(task.info.get("method", "diffscaler")) for task in tasks))
    layered = [task for task in tasks if task.layers] or list(tasks)
    parts = dict.fromkeys(p for task in tasks for p in task.info.get("parts", ()))
    return {
        **layered[0].info,
        "name": name or "+".join(task.name for task in tasks),
        "method": methods[0] if len(methods) == 1 else "diffscaler",
        "parts": list(parts),
        "activation": activation,
        "gain": 1.0,
        "scale_includes_bias": any(
            task.info.get("scale_includes_bias") for task in _with_scale(tasks)
        ),
        "base": _combined_base(layered),
        "combined_from": [
            {"name": task.name, "weight": weight}
            for task, weight in zip(tasks, weights, strict=True)
        ],
        "training": None,
    }


def _combined_prompts(tasks: Sequence[TaskAdapter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns all stored prompts by name, or those of the first task if they do not fit."""
    stored = [task for task in tasks if "context" in task.conditioning]
    if not stored:
        return {}, {"prompts": []}
    keys = stored[0].conditioning.keys()
    alike = all(
        task.conditioning.keys() == keys
        and all(
            t.shape[1:] == stored[0].conditioning[k].shape[1:] for k, t in task.conditioning.items()
        )
        for task in stored
    )
    stored = stored if alike else stored[:1]
    names: dict[str, tuple[TaskAdapter, int]] = {}
    for task in stored:
        for i, prompt in enumerate(task.prompts):
            names.setdefault(prompt, (task, i))
    dtypes = {
        key: functools.reduce(torch.promote_types, (t.conditioning[key].dtype for t in stored))
        for key in keys
    }
    tensors = {
        key: torch.stack([task.conditioning[key][i].to(dtypes[key]) for task, i in names.values()])
        for key in keys
    }
    return tensors, {"prompts": list(names)}


def _combined_classes(
    tasks: Sequence[TaskAdapter], weights: Sequence[float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns all tasks' new classes, one after the other, and what the facts say of classes.

    Raises:
        DiffScalerError: Two have one name, or they belong to different tables.
    """
    known: dict[str, int] = {}
    for task in tasks:
        known |= {n: i for n, i in task.classes.items() if n not in task.new_classes}
    bringing = [(t, w) for t, w in zip(tasks, weights, strict=True) if t.new_classes]
    if not bringing:
        return {}, {"classes": known} if known else {}
    names = [name for task, _ in bringing for name in task.new_classes]
    doubled = {name for name in names if names.count(name) > 1 or name in known}
    table = bringing[0][0].info["class_table"]
    held = [_shapes_of_classes(task) for task, _ in bringing]
    if doubled or any(own != held[0] for own in held):
        reason = f"both have {first_names(sorted(doubled))}" if doubled else "their tables differ"
        raise DiffScalerError(
            f"the classes of {' and '.join(repr(task.name) for task, _ in bringing)} cannot be "
            f"combined, as {reason}; stack the tasks instead"
        )
    own = [_scaled_extras(task, dict.fromkeys(PARTS, weight)) for task, weight in bringing]
    extras = {name: torch.cat([_wide(rows[name]) for rows in own]) for name in own[0]}
    numbers = {name: table["size"] + i for i, name in enumerate(names)}
    return extras, {"classes": known | numbers, "class_table": dict(table)}


def _shapes_of_classes(task: TaskAdapter) -> tuple[Any, ...]:
    table = task.info["class_table"]
    widths = {name: t.shape[1] for name, t in task.extras.items() if name.startswith(CLASSES)}
    return (table["size"], table["start"], widths)


def _combined_base(tasks: Sequence[TaskAdapter]) -> dict[str, Any]:
    """Returns the first known base; its fingerprint only where the tasks have the same targets."""
    known = [task for task in tasks if _base_fact(task, "family") not in (None, "unknown")]
    base = dict((known or list(tasks))[0].info.get("base") or {})
    if len({_base_fact(task, "fingerprint") for task in tasks}) > 1:
        base.pop("fingerprint", None)
        base["targets"] = len({layer for task in tasks for layer in task.layers})
    return base


def _base_fact(task: TaskAdapter, fact: str) -> Any:
    return (task.info.get("base") or {}).get(fact)


def _with_scale(tasks: Sequence[TaskAdapter]) -> list[TaskAdapter]:
    return [t for t in tasks if any("scale" in tensors for tensors in t.layers.values())]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _activation(task: TaskAdapter) -> str:
    """The activation of a task's subspaces; a task without any does not care, so "identity"."""
    has_subspace = any("down" in tensors for tensors in task.layers.values())
    return str(task.info.get("activation", "relu")) if has_subspace else "identity"
