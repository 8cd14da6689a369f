"""Putting another task's numbers into tensors that are attached already: no new graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .affiner import Affiner
from .attach import Attachment
from .classes import CLASSES, ROWS, ClassRows
from .errors import MismatchError, first_names
from .task import CONTROL, TaskAdapter


def check_hotswap(
    attachment: Attachment, name: str, old: TaskAdapter, new: TaskAdapter, component: str
) -> None:
    """Raises unless `new`'s tensors fit into those of the attached task `name`.

    A smaller rank fits (padding with zeros is exact), absent parts and layers fit (zeros); nothing
    that is larger, or that the attached task does not have, does.

    Raises:
        MismatchError: It does not fit; the attachment is as it was.
    """
    usual = {"activation": "relu", "scale_includes_bias": False, "windows": None}
    facts: list[tuple[str, Any, Any]] = [
        (fact, old.info.get(fact, default), new.info.get(fact, default))
        for fact, default in usual.items()
    ]
    tables = [task.info.get("class_table") or {} for task in (old, new)]
    facts.append(("count of new classes", len(old.new_classes), len(new.new_classes)))
    facts.append(("new classes' start", tables[0].get("start"), tables[1].get("start")))
    if old.is_control and new.is_control:
        known = (task.control_facts.get("activation", "relu") for task in (old, new))
        facts.append(("control's activation", *known))
    for fact, *values in facts:
        if values[0] != values[1]:
            raise MismatchError(
                f"task {new.name!r} cannot be swapped in for {name!r}: its {fact} is "
                f"{values[1]!r}, not {values[0]!r}; load it under a new name"
            )
    layers = _layers(new, component)
    affiners = _affiners(attachment, name)
    problems = [layer for layer in layers if layer not in affiners]
    for layer, affiner in affiners.items():
        room = affiner.tensors()
        for part, tensor in layers.get(layer, {}).items():
            if part not in room or not _has_room(part, room[part], tensor):
                problems.append(f"{layer}.{part}")
    if problems:
        raise MismatchError(
            f"task {new.name!r} cannot be swapped in for {name!r}: {len(problems)} tensors are not "
            f"there or too small, first {first_names(problems)}; load it under a new name before "
            f"torch.compile"
        )


@torch.no_grad()
def swap_tensors(attachment: Attachment, name: str, new: TaskAdapter, component: str) -> None:
    """Copies `new`'s tensors over those of the attached task `name`; see `check_hotswap`.

    Strengths must be set again afterwards, so that the folded copies follow.
    """
    layers = _layers(new, component)
    for layer, affiner in _affiners(attachment, name).items():
        own = layers.get(layer, {})
        facts = new.control_facts if layer.startswith(CONTROL) else new.info
        gain = float(facts.get("gain", 1.0))
        for part, room in affiner.tensors().items():
            room.zero_()
            if part in own:
                # the attached gain is baked into compiled code; U carries the difference
                before = affiner.gain if isinstance(affiner, Affiner) else 0.0
                factor = gain / before if part == "up" and before else 1.0
                room[tuple(map(slice, own[part].shape))].copy_(own[part].float() * factor)
    for stack in attachment.controls:
        stack.unsettle()  # type: ignore[operator]
    for stack in attachment.classes:
        stack.renew()  # type: ignore[operator]


def _has_room(part: str, room: Tensor, tensor: Tensor) -> bool:
    rank = {"down": 0, "up": 1}.get(part)
    return room.ndim == tensor.ndim and all(
        have >= want if i == rank else have == want
        for i, (have, want) in enumerate(zip(room.shape, tensor.shape, strict=True))
    )


def _layers(task: TaskAdapter, component: str) -> dict[str, Mapping[str, Tensor]]:
    """Returns a task's tensors on one model; those beside its layers under their prefixes."""
    control = {f"{CONTROL}{n}": own for n, own in task.control_layers(component).items()}
    classes = {f"{CLASSES}{n}": {ROWS: own} for n, own in task.class_rows(component).items()}
    return {**task.component_layers(component), **control, **classes}


def _affiners(attachment: Attachment, name: str) -> Mapping[str, Affiner | ClassRows]:
    slot = attachment.slot_of(name)
    stacks: list[tuple[str, Any]] = [("", stack) for stack in attachment.stacks]
    stacks += [(CONTROL, stack) for stack in attachment.controls]
    stacks += [(CLASSES, stack) for stack in attachment.classes]
    return {
        f"{prefix}{stack.name}": stack.affiner_of(slot)
        for prefix, stack in stacks
        if slot in stack.slots
    }
