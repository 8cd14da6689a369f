"""Tasks on a ComfyUI model while they are trained: parameters under diffusers' names.

ComfyUI fuses some layers that diffusers keeps apart (q, k, v). What is trained is diffusers' form:
a fused layer's affiner is put together from its parts' parameters whenever it is read, so the same
numbers are trained in both hosts and the files are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.affiner import PARTS, Affiner, affiner_from
from ..diffscaler_core.layouts import Placement, fuse_rows, swap_halves
from ..diffscaler_core.task import CONTROL
from ..diffscaler_core.windows import UnitWindows, joined
from .carrier import Carrier, is_running
from .keymap import native_controls, native_layers, rows_of, task_placements

_BASE = -1  # no task's index


class PlacedAffiner(nn.Module):
    """A native layer's affiner, put together from those of the layers that lie in it.

    Reads like an `Affiner`. Each of its tensors is computed when it is asked for, with gradients.

    Args:
        parts: Where each layer lies, and its affiner.
        out_features: C_out of the native layer.
    """

    def __init__(self, parts: Sequence[tuple[Placement, Affiner]], out_features: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(affiner for _, affiner in parts)
        self.places = [place for place, _ in parts]
        self.out_features = out_features
        first = parts[0][1]
        self.activation, self.gain = first.activation, first.gain
        self.scale_includes_bias = first.scale_includes_bias
        own = [affiner for _, affiner in parts]
        self.windows = joined([a.windows for a in own], [a.rank for a in own])

    @property
    def scale(self) -> Tensor | None:
        """a, (C_out,), 0 where no layer lies; or None."""
        return self._joined("scale").get("scale")

    @property
    def shift(self) -> Tensor | None:
        """b, (C_out,), 0 where no layer lies; or None."""
        return self._joined("shift").get("shift")

    @property
    def down(self) -> Tensor | None:
        """The Ds one below the other, (ΣR, C_in, *k), or None."""
        downs = [part.down for part in self._affiners() if part.down is not None]
        return torch.cat(downs) if downs else None

    @property
    def up(self) -> Tensor | None:
        """The Us on the block diagonal, (C_out, ΣR), or None."""
        return self._joined("down", "up").get("up")

    @property
    def rank(self) -> int:
        """ΣR."""
        return sum(part.rank for part in self._affiners())

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are present, by their names in the file."""
        return self._joined(*("scale", "shift", "down", "up"))

    def _affiners(self) -> list[Affiner]:
        return [cast(Affiner, part) for part in self.parts]

    def _joined(self, *names: str) -> dict[str, Tensor]:
        parts = []
        for place, affiner in zip(self.places, self._affiners(), strict=True):
            own = {name: t for name in names if (t := getattr(affiner, name)) is not None}
            parts.append((place.start, swap_halves(own) if place.swapped else own))
        return fuse_rows(parts, self.out_features)


class TrainableTasks:
    """Tasks on a model until `remove()`; the model runs them in every call.

    Args:
        model: ComfyUI's `BaseModel`, loaded.
        tasks: By name.
        component: The model's name in the tasks.
        device: Where the model runs.
        scale: The trainer's latents are the model's times this.

    Raises:
        MismatchError: A task does not fit; the model is untouched.
        DiffScalerError: Tasks are on it already.
    """

    def __init__(
        self,
        model: Any,
        tasks: Mapping[str, TaskAdapter],
        component: str,
        device: torch.device,
        scale: float = 1.0,
    ) -> None:
        if is_running(model):
            raise DiffScalerError("tasks are being trained on this model already")
        self.names = tuple(tasks)
        self._tasks, self._component, self._scale = dict(tasks), component, scale
        self._layers: dict[str, dict[str, Affiner]] = {}
        self._controls: dict[str, dict[str, Affiner]] = {}
        native = []
        for name, task in tasks.items():
            native_layers(task, model, component)  # says what does not fit
            native_controls(task, model, component)
            windows = task.component_windows(component)
            layers = task.component_layers(component)
            self._layers[name] = own = _affiners(layers, task.info, windows)
            self._controls[name] = control = _affiners(
                task.control_layers(component), task.control_facts
            )
            for affiner in (*own.values(), *control.values()):
                affiner.to(device)
            places = task_placements(task, model)
            controls = {places[layer].module: affiner for layer, affiner in control.items()}
            placed = _placed(own, task, model)
            native.append(SimpleNamespace(affiners=placed, controls=controls, carriers=set()))
        self._carrier = Carrier(model, cast(Any, native), check=False)
        weights = torch.ones(len(tasks), len(PARTS))
        self._carrier.set_time(torch.zeros(()))  # every batch says its own
        self._carrier.prepare(weights, device, model.get_dtype_inference())
        self._undo = ExitStack()
        self._undo.enter_context(self._carrier.running(model))

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Returns a task's parameters by their names in its file -> parameter, float32."""
        return {
            f"{prefix}{self._component}.{layer}.{part}": cast(nn.Parameter, parameter)
            for prefix, own in (("", self._layers[name]), (CONTROL, self._controls[name]))
            for layer, affiner in own.items()
            for part, parameter in affiner.tensors().items()
        }

    def requires_grad_(self, requires_grad: bool = True) -> TrainableTasks:
        """Makes copies of the parameters trainable; the attached tasks stay as they are."""
        for own in (*self._layers.values(), *self._controls.values()):
            for affiner in own.values():
                for parameter in affiner.parameters() if requires_grad else ():
                    parameter.data = parameter.data.clone()
                affiner.requires_grad_(requires_grad)
        self._carrier.unsettle()
        return self

    def set_groups(self, names: Sequence[str | None] | None) -> None:
        """Says which tasks the next batches run, as `Trainable.set_groups` does."""
        slots = None
        if names is not None:
            slots = [_BASE if name is None else self.names.index(name) for name in names]
        self._carrier.set_groups(slots)

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        """Gives the control tasks the next batch's pictures, as `Trainable.set_control` does."""
        if latents is not None and self._scale != 1:
            latents = latents / self._scale
        self._carrier.set_control(latents, kept)

    @property
    def is_timed(self) -> bool:
        """Says whether a task among them acts by noise level, so that `set_time` is needed."""
        return any(task.is_timed for task in self._tasks.values())

    def set_time(self, log_snr: Tensor) -> None:
        """Says at which noise level the next batch is, as `Trainable.set_time` does."""
        self._carrier.set_time(log_snr)

    def task(self, name: str | None = None) -> TaskAdapter:
        """Returns a task with its parameters as they are now (a copy on the CPU)."""
        name = self.names[0] if name is None else name
        now = self.parameters_of(name)
        extras = {
            n: now[n].detach().to("cpu", copy=True) if n in now else t
            for n, t in self._tasks[name].extras.items()
        }
        layers = {
            f"{self._component}.{layer}": {
                part: t.detach().to("cpu", copy=True) for part, t in affiner.tensors().items()
            }
            for layer, affiner in self._layers[name].items()
        }
        return self._tasks[name].replace(layers=layers, extras=extras)

    def remove(self) -> None:
        """Takes the tasks off; the model is bit for bit what it was. Idempotent."""
        self._undo.close()


def _affiners(
    layers: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    windows: Mapping[str, UnitWindows] | None = None,
) -> dict[str, Affiner]:
    known = windows or {}
    return {
        layer: affiner_from({p: t.float() for p, t in tensors.items()}, facts, known.get(layer))
        for layer, tensors in layers.items()
    }


def _placed(
    layers: Mapping[str, Affiner], task: TaskAdapter, model: Any
) -> dict[str, Affiner | PlacedAffiner]:
    """Returns the affiners of a task's layers by the names of the native layers they lie in."""
    places, sizes = task_placements(task, model), rows_of(model)
    parts: dict[str, list[tuple[Placement, Affiner]]] = {}
    for name, affiner in layers.items():
        parts.setdefault(places[name].module, []).append((places[name], affiner))
    placed: dict[str, Affiner | PlacedAffiner] = {}
    for module, own in parts.items():
        (place, affiner), *others = own
        whole = not others and not place.swapped and not place.start and place.size is None
        placed[module] = affiner if whole else PlacedAffiner(own, sizes[module])
    return placed
