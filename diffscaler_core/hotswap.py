"""Putting another task's numbers into tensors that are attached already: no new graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .affiner import Affiner
from .attach import Attachment
from .errors import MismatchError, first_names
from .task import TaskAdapter


def check_hotswap(
    attachment: Attachment, name: str, old: TaskAdapter, new: TaskAdapter, component: str
) -> None:
    """Raises unless `new`'s tensors fit into those of the attached task `name`.

    A smaller rank fits (padding with zeros is exact), absent parts and layers fit (zeros); nothing
    that is larger, or that the attached task does not have, does.

    Raises:
        MismatchError: It does not fit; the attachment is as it was.
    """
    for fact, default in (("activation", "relu"), ("scale_includes_bias", False)):
        values = old.info.get(fact, default), new.info.get(fact, default)
        if values[0] != values[1]:
            raise MismatchError(
                f"task {new.name!r} cannot be swapped in for {name!r}: its {fact} is "
                f"{values[1]!r}, not {values[0]!r}; load it under a new name"
            )
    layers = new.component_layers(component)
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
    layers = new.component_layers(component)
    gain = float(new.info.get("gain", 1.0))
    for layer, affiner in _affiners(attachment, name).items():
        own = layers.get(layer, {})
        for part, room in affiner.tensors().items():
            room.zero_()
            if part in own:
                # the attached gain is baked into compiled code; U carries the difference
                factor = gain / affiner.gain if part == "up" and affiner.gain else 1.0
                room[tuple(map(slice, own[part].shape))].copy_(own[part].float() * factor)


def _has_room(part: str, room: Tensor, tensor: Tensor) -> bool:
    rank = {"down": 0, "up": 1}.get(part)
    return room.ndim == tensor.ndim and all(
        have >= want if i == rank else have == want
        for i, (have, want) in enumerate(zip(room.shape, tensor.shape, strict=True))
    )


def _affiners(attachment: Attachment, name: str) -> Mapping[str, Affiner]:
    slot = attachment.names.index(name)
    return {
        stack.name: stack.affiners[stack.slots.index(slot)]  # type: ignore
        for stack in attachment.stacks
        if slot in stack.slots  # type: ignore[operator]
    }
