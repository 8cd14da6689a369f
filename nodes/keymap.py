"""ComfyUI's own key maps turned into ours: a task's diffusers names on a ComfyUI model, and back.

Both ways are exact. Layers that ComfyUI fuses (q, k, v in one Linear) are combined on the block
diagonal, layers whose halves change places are permuted; D, which is per input, only moves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.utils
from torch import Tensor, nn

from ..diffscaler_core.errors import MismatchError, first_names, shown
from ..diffscaler_core.families import TokenForm, token_form
from ..diffscaler_core.hollow import hollow_model
from ..diffscaler_core.layouts import (
    Placement,
    Tensors,
    fuse_rows,
    own_units,
    slice_rows,
    swap_halves,
)
from ..diffscaler_core.matching import fits
from ..diffscaler_core.targets import Target, all_targets
from ..diffscaler_core.task import TaskAdapter
from ..diffscaler_core.windows import UnitWindows, joined
from .keymap_tables import ARCHITECTURES, Architecture

PREFIX = "diffusion_model."


_UNKNOWN = Architecture("", ())


def architecture_of(model: Any) -> Architecture:
    """Returns the row of ARCHITECTURES for a ComfyUI `BaseModel`, an empty one if there is none."""
    config = model.model_config.unet_config
    for row in ARCHITECTURES:
        same = all(config.get(key) == value for key, value in row.where.items())
        if type(model).__name__ in row.classes and same:
            return row
    return _UNKNOWN


def placements(model: Any) -> dict[str, Placement]:
    """Returns where each layer lies in a ComfyUI model, by the name diffusers gives it.

    A native layer that no table names keeps its own name; so do all of an unknown architecture.

    Args:
        model: A `BaseModel` (with `.diffusion_model` and `.model_config.unet_config`).
    """
    native = {target.name: target for target in all_targets(model.diffusion_model)}
    row = architecture_of(model)
    found = dict(_from_table(model, row, native))
    covered = {placement.module for placement in found.values()}
    for name, target in native.items():
        if PREFIX + name not in covered:
            found.update(_from_rules(row, target))
    return found


def native_row_layout(model: Any, native_module: str) -> str:
    """Returns how the batch lies in a native layer's leading dimensions (see `AffinerStack`).

    Args:
        model: A `BaseModel`.
        native_module: The layer's name, with or without "diffusion_model.".
    """
    name = native_module.removeprefix(PREFIX)
    for pattern, layout in architecture_of(model).row_layouts.items():
        if re.fullmatch(pattern, name):
            return layout
    return "batch"


def native_token_form(model: Any) -> TokenForm | None:
    """Returns how the patch embedding of a ComfyUI model sees latents; None if nobody knows."""
    row = architecture_of(model)
    form = token_form(row.diffusers)
    return form if form is None or not row.tokens else form._replace(kind=row.tokens)


def is_reference_first(model: Any) -> bool:
    """Says whether a model embeds reference pictures before its latents, by the same layer."""
    return architecture_of(model).reference_first


def component_of(model: Any) -> str:
    """Returns the component a task calls this model: "unet" or "transformer"."""
    return "unet" if "num_res_blocks" in model.model_config.unet_config else "transformer"


def native_layers(
    task: TaskAdapter, model: Any, component: str | None = None
) -> dict[str, dict[str, Tensor]]:
    """Returns a task's affiners for the layers of a ComfyUI model. All or nothing.

    A task whose `info["naming"]` is "native" names ComfyUI's layers itself (without
    "diffusion_model.").

    Args:
        task: The task.
        model: A `BaseModel`; its weights are neither read nor changed.
        component: Which component of the task this model is; None: its only one, or if it has
            several, "unet" for a U-Net, else "transformer".

    Returns:
        "diffusion_model.<module>" -> {"scale", "shift", "down", "up"}, shaped for that module.

    Raises:
        MismatchError: A layer has no counterpart here, or one of another shape; or two layers of
            the task would fill the same rows.
    """
    component = component or _component_for(task, model)
    layers = task.component_layers(component)
    targets = {PREFIX + t.name: t for t in all_targets(model.diffusion_model)}
    places = task_placements(task, model)
    missing = [name for name in layers if name not in places]
    wrong: list[str] = []
    parts: dict[str, list[tuple[int, Tensors]]] = {}
    for name, tensors in layers.items():
        place = places.get(name)
        if place is None:
            continue
        shape = _shape(place, targets)
        if not fits(tensors, shape):
            wrong.append(f"{name} is {'x'.join(map(str, shape))}")
            continue
        moved = swap_halves(tensors) if place.swapped else dict(tensors)
        parts.setdefault(place.module, []).append((place.start, moved))
    _check(task, model, component, len(layers), missing, wrong + _doubled(parts))
    return {name: _joined(own, targets[name].out_features) for name, own in parts.items()}


def native_windows(
    task: TaskAdapter, model: Any, component: str | None = None
) -> dict[str, UnitWindows]:
    """Returns when the hidden units of a ComfyUI model's layers act, as `native_layers` has them.

    Layers whose units always act are left out.
    """
    component = component or _component_for(task, model)
    windows, places = task.component_windows(component), task_placements(task, model)
    parts: dict[str, list[tuple[UnitWindows | None, int]]] = {}
    for name, tensors in task.component_layers(component).items() if windows else ():
        own = (windows.get(name), len(tensors.get("down", ())))
        parts.setdefault(places[name].module, []).append(own)
    found = {name: joined(*zip(*own, strict=True)) for name, own in parts.items()}
    return {name: own for name, own in found.items() if own is not None}


def native_controls(
    task: TaskAdapter, model: Any, component: str | None = None
) -> dict[str, dict[str, Tensor]]:
    """Returns a task's control affiner for the patch embedding of a ComfyUI model.

    Arguments and names are those of `native_layers`; empty for a task without control.

    Raises:
        MismatchError: The model has no such embedding, or one of another shape.
    """
    component = component or _component_for(task, model)
    controls = task.control_layers(component)
    targets = {PREFIX + t.name: t for t in all_targets(model.diffusion_model)}
    places = task_placements(task, model) if controls else {}
    missing = [name for name in controls if name not in places]
    wrong = []
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensors in controls.items():
        if name in places:
            shape = _shape(places[name], targets)
            if not fits(tensors, shape) or shape != targets[places[name].module].shape:
                wrong.append(f"{name} is {'x'.join(map(str, shape))}")
            found[places[name].module] = dict(tensors)
    _check(task, model, component, len(controls), missing, wrong)
    return found


def task_placements(task: TaskAdapter, model: Any) -> dict[str, Placement]:
    """Returns where each layer lies in a ComfyUI model, by the name a task gives it."""
    if task.info.get("naming") != "native":
        return placements(model)
    names = (target.name for target in all_targets(model.diffusion_model))
    return {name: Placement(PREFIX + name) for name in names}


def rows_of(model: Any) -> dict[str, int]:
    """Returns "diffusion_model.<module>" -> C_out of each adaptable layer of a ComfyUI model."""
    return {PREFIX + t.name: t.out_features for t in all_targets(model.diffusion_model)}


def diffusers_layers(layers: Mapping[str, Tensors], model: Any) -> dict[str, dict[str, Tensor]]:
    """Returns affiners of native layers under diffusers' names, fused layers taken apart; exact.

    Each part of a fused layer gets its rows of a, b and U, and the hidden units its rows use. Units
    that no row uses yet (a new task's U is 0) go to every part.

    Args:
        layers: "diffusion_model.<module>" -> {"scale", "shift", "down", "up"}.
        model: The `BaseModel` they were trained on.

    Raises:
        MismatchError: No adaptable layer of this model, or one that diffusers does not have.
    """
    targets = {PREFIX + t.name: t for t in all_targets(model.diffusion_model)}
    places = placements(model)
    foreign = layers.keys() - {place.module for place in places.values()}
    if foreign:
        raise MismatchError(
            f"diffusers has no name for {len(foreign)} layers of this {_title(model)}: "
            f"{first_names(sorted(foreign))}"
        )
    named: dict[str, dict[str, Tensor]] = {}
    for name, place in places.items():
        if place.module in layers:
            tensors = layers[place.module]
            size = _shape(place, targets)[0]
            if size < targets[place.module].out_features:
                tensors = own_units(tensors, slice_rows(tensors, place.start, size))
            named[name] = swap_halves(tensors) if place.swapped else dict(tensors)
    return named


def diffusers_model(model: Any) -> nn.Module:
    """Returns a hollow model with diffusers' class and layer names and shapes, on the meta device.

    `new_task` and `find_targets` work on it as on the real one, so presets and the base's
    fingerprint agree with a task made in diffusers.
    """
    name = architecture_of(model).diffusers or type(model.diffusion_model).__name__
    return hollow_model(name, diffusers_targets(model))


def diffusers_targets(model: Any) -> list[Target]:
    """Returns a native model's adaptable layers under diffusers' names."""
    native = {PREFIX + t.name: t for t in all_targets(model.diffusion_model)}
    found = []
    for name, place in placements(model).items():
        size, width, *kernel = _shape(place, native)
        has_bias = native[place.module].has_bias
        found.append(Target(name, size, width, tuple(kernel), has_bias))
    return found


def _component_for(task: TaskAdapter, model: Any) -> str:
    return task.components[0] if len(task.components) == 1 else component_of(model)


def _shape(place: Placement, native: Mapping[str, Target]) -> tuple[int, ...]:
    """Returns (C_out, C_in, *kernel) of the layer that lies there."""
    out, *rest = native[place.module].shape
    return (out - place.start if place.size is None else place.size, *rest)


def _from_table(
    model: Any, row: Architecture, native: Mapping[str, Target]
) -> Iterator[tuple[str, Placement]]:
    """Yields what ComfyUI's own table says of layers this model has."""
    if not row.table:
        return
    table = getattr(comfy.utils, row.table)(model.model_config.unet_config)
    for key, value in table.items():
        name = key.removesuffix(".weight")
        if isinstance(value, str):
            value = (value, None)
        path, rows, *function = value
        module = path.removesuffix(".weight")
        if name == key or module not in native or re.fullmatch(row.foreign, name):
            continue
        _, start, size = rows or (0, 0, None)
        yield name, Placement(PREFIX + module, start, size, bool(function))


def _from_rules(row: Architecture, target: Target) -> Iterator[tuple[str, Placement]]:
    """Yields what our rules say of a native layer; by default it keeps its name."""
    number = re.search(r"(?<=\.)\d+(?=\.)", target.name)
    general = target.name
    if number and general not in row.rules:
        general = f"{general[: number.start()]}*{general[number.end() :]}"
    names = row.rules.get(general, target.name)
    if isinstance(names, str):
        names = () if re.fullmatch(row.foreign, names) else (names,)
    start = 0
    for name, size in zip(names, _sizes(target, len(names)), strict=True):
        place = Placement(PREFIX + target.name, start, size, general in row.swapped)
        yield name.replace("*", number[0] if number else "*"), place
        start += size or 0


def _sizes(target: Target, parts: int) -> Sequence[int | None]:
    """Returns how many rows each part of a fused layer has; attention is as wide as its input."""
    out, width = target.out_features, target.in_features
    if parts <= 1:
        return (None,) * parts
    if parts == 2:  # k, v
        return (out // 2, out // 2)
    if parts == 3:  # q, k, v; fewer heads in k and v where queries are grouped
        return (width, (out - width) // 2, (out - width) // 2)
    return (width, width, width, out - 3 * width)  # q, k, v, MLP


def _joined(parts: Sequence[tuple[int, Tensors]], out_features: int) -> dict[str, Tensor]:
    (_, first), *others = parts
    if not others and all(len(t) == out_features for n, t in first.items() if n != "down"):
        return dict(first)
    return fuse_rows(parts, out_features)


def _doubled(parts: Mapping[str, Sequence[tuple[int, Tensors]]]) -> list[str]:
    starts = {module: {start for start, _ in own} for module, own in parts.items()}
    twice = [module for module, own in parts.items() if len(own) > len(starts[module])]
    return [f"{module} (two layers, one place)" for module in twice]


def _check(
    task: TaskAdapter, model: Any, component: str, count: int, missing: list[str], wrong: list[str]
) -> None:
    problems = []
    if not count and component not in task.components and task.components:
        problems.append(f"it adapts {', '.join(task.components)}, this is a {shown(component)}")
    if missing:
        problems.append(f"{len(missing)} layers missing, first {first_names(missing)}")
    if wrong:
        problems.append(f"{len(wrong)} of another shape, first {first_names(wrong)}")
    if not problems:
        return
    base = task.info.get("base") or {}
    made_for = f"{base.get('family', 'an unknown base')} ({base.get('class', 'unknown class')})"
    raise MismatchError(
        f"task {task.name!r}, made for {made_for} with {count or len(task.layers)} layers, "
        f"does not fit this {_title(model)}: {'; '.join(problems)}; "
        f"apply it to the base it was made for"
    )


def _title(model: Any) -> str:
    known = architecture_of(model).diffusers
    unknown = "an architecture whose names DiffScaler does not know"
    return f"{type(model.model_config).__name__} ({known or unknown})"
