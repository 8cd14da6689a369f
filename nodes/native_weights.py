"""The weights of a ComfyUI MODEL as its LoRAs and patches make them, under diffusers' names.

Each is computed when it is asked for; the model is neither loaded nor changed. Layers that ComfyUI
fuses are read in parts, as diffusers has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management as management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from torch import Tensor

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.extraction import extract_task
from ..diffscaler_core.layouts import Placement, swap_halves
from .keymap import PREFIX, component_of, diffusers_model, placements
from .patching import tasks_on

#: Copies of the largest weight that an extraction holds at a time, about.
_COPIES = 8


def extracted(
    tuned: ModelPatcher, base: ModelPatcher, settings: Mapping[str, Any], node: str | None = None
) -> tuple[TaskAdapter, str]:
    """Returns what two models differ in as a task, and a report of what it keeps.

    Args:
        tuned: The fine-tuned model.
        base: What it was made from.
        settings: Of `extract_task`.
        node: The node's id, None outside a server.

    Raises:
        MismatchError: The models are not of one architecture and size.
        DiffScalerError: As in `NativeWeights` and `extract_task`.
        InterruptProcessingException: The user pressed stop.
    """
    bar = comfy.utils.ProgressBar(1, node_id=node)

    def show(done: int, count: int, name: str) -> None:
        bar.update_absolute(done, count)
        management.throw_exception_if_processing_interrupted()

    with torch.inference_mode(False), torch.no_grad():
        after, before = NativeWeights(tuned, "the tuned model"), NativeWeights(base, "the base")
        before.make_room()
        found = extract_task(
            after,
            before,
            component=component_of(base.model),
            device=before.device,
            on_tensor=show,
            **settings,
        )
    return found.task, found.report.text()


class NativeWeights:
    """The weights of one MODEL, as `extract_task` reads them.

    Args:
        model: Any diffusion model, with its LoRAs and weight patches.
        title: What messages call it.

    Raises:
        DiffScalerError: Something on it that its weights do not show: tasks, a bypassed LoRA.
    """

    def __init__(self, model: ModelPatcher, title: str) -> None:
        _refuse(model, title)
        self.title = title
        self.shape_model = diffusers_model(model.model)
        self.device = model.load_device
        self._entries = dict(_entries(model))
        self._places: dict[str, tuple[str, Placement | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._last: tuple[str, Tensor] | None = None
        for name, place in placements(model.model).items():
            for leaf in ("weight", "bias"):
                self._add(f"{name}.{leaf}", f"{place.module}.{leaf}", place)
        covered = {key for key, _ in self._places.values()}
        for key in self._entries:
            if key not in covered:
                self._add(key.removeprefix(PREFIX), key, None)

    def make_room(self) -> None:
        """Frees memory for the work where the model runs."""
        largest = max(map(math.prod, self.shapes.values()), default=0)
        management.free_memory(_COPIES * 4 * largest, self.device)

    def read(self, name: str) -> Tensor:
        """Returns one tensor, (C_out, C_in, *kernel), (C_out,) or any other, float32."""
        key, place = self._places[name]
        if self._last is None or self._last[0] != key:
            self._last = (key, self._patched(key))
        tensor = self._last[1]
        if place is None:
            return tensor
        size = len(tensor) - place.start if place.size is None else place.size
        part = tensor[place.start : place.start + size]
        return swap_halves({"weight": part})["weight"] if place.swapped else part

    def _add(self, name: str, key: str, place: Placement | None) -> None:
        if key not in self._entries:
            return
        shape = tuple(self._entries[key].weight.shape)
        if place is not None:
            size = shape[0] - place.start if place.size is None else place.size
            shape = (size, *shape[1:])
        self._places[name] = (key, place)
        self.shapes[name] = shape

    def _patched(self, key: str) -> Tensor:
        """Returns a native weight with all its patches, as loading the model would compute it."""
        weight, convert, patches = self._entries[key]
        wide = torch.float32 if weight.dtype.is_floating_point else weight.dtype
        copied = management.cast_to_device(weight, self.device, wide, copy=True)
        plain = copied if convert is None else convert(copied, inplace=True)
        patched = comfy.lora.calculate_weight(patches, plain, key) if patches else plain
        if patched.shape != weight.shape:
            raise DiffScalerError(
                f"a patch on {self.title} makes {key!r} {tuple(patched.shape)} instead of "
                f"{tuple(weight.shape)}; a task cannot change a layer's size"
            )
        return patched  # type: ignore[no-any-return]


class _Entry(NamedTuple):
    """A native weight as it is without patches, how it becomes plain numbers, and its patches."""

    weight: Tensor
    convert: Callable[..., Tensor] | None
    patches: list[Any]


def _entries(model: ModelPatcher) -> Iterator[tuple[str, _Entry]]:
    """Yields every native weight; the other tensors of quantised ones are parts of them.

    As `ModelPatcher.get_key_patches` does, which knows no quantised layers.
    """
    for key in model.model_state_dict(PREFIX):
        try:
            weight, _, convert = get_key_weight(model.model, key)
        except AttributeError:
            continue
        if key in model.backup:  # the model is loaded, with these or other patches
            weight = model.backup[key].weight
        if key in model.hook_backup:
            weight = model.hook_backup[key][0]
        if isinstance(weight, Tensor):
            yield key, _Entry(weight, convert, model.patches.get(key, []))


def _refuse(model: Any, title: str) -> None:
    """Refuses a model that does more than its weights say."""
    if tasks_on(model):
        names = ", ".join(repr(entry.task.name) for entry in tasks_on(model))
        raise DiffScalerError(
            f"{title} runs tasks ({names}), which are not in its weights: connect the model "
            f"without them; DiffScalerCombineTasks adds tasks"
        )
    if model.injections:
        raise DiffScalerError(
            f"{title} runs {', '.join(map(str, model.injections))} beside its weights, such as a "
            f"LoRA in bypass mode: load the LoRA by the plain loader"
        )
    if model.weight_wrapper_patches:
        raise DiffScalerError(
            f"{title} has {len(model.weight_wrapper_patches)} weights that are computed anew in "
            f"every call, so there is nothing to compare: connect it without that node"
        )
