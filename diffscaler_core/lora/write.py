"""Tasks into LoRA files that stock loaders read, exactly, or a refusal with the reason.

An identity subspace is a LoRA, a shift a difference of the bias; a scale is a difference of the
whole weight, (1 + a) ⊙ W − W, which needs the base's W. What depends on its input by more than a
matrix (a relu subspace, a control, a schedule, new classes) no LoRA file can hold.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import DiffScalerError, MismatchError, first_names, unknown
from ..families import FAMILIES
from ..files import safetensors_path, write_file
from ..layouts import fuse_rows, swap_halves
from ..matching import match_layers
from ..targets import as_target, bias_of
from ..task import TaskAdapter
from .file import layers_per_block, scaled
from .names import LORA_NAMES, Place, flat, own_places

logger = logging.getLogger(__name__)

#: Naming -> where it is read, for people.
NAMINGS: dict[str, str] = {
    "diffusers": "diffusers and PEFT; ComfyUI for transformers",
    "kohya": "ComfyUI, kohya's tools; diffusers for U-Nets and Flux",
    "comfyui": "ComfyUI; diffusers for Flux",
}

Layers = dict[str, dict[str, Tensor]]


def export_lora(
    task: TaskAdapter, path: str | Path, naming: str = "diffusers", *, base: nn.Module | None = None
) -> Path:
    """Writes what a task does as a LoRA file; the file is there whole or not at all.

    Args:
        task: A task of identity subspaces, shifts and scales.
        path: Where to; must end in `.safetensors`.
        naming: A key of NAMINGS.
        base: The denoiser, in diffusers' class. Needed for scales (their difference is a ⊙ W, in
            W's dtype), and where the task alone does not tell a layer's columns.

    Raises:
        DiffScalerError: The task does what no LoRA file can, or not in this naming; the message
            says what and why.
        TaskFileError: Another ending, or the disk refuses.
    """
    path = safetensors_path(path)
    tensors = lora_tensors(task, naming, base=base)
    family = FAMILIES.get(str((task.info.get("base") or {}).get("family")))
    metadata = {
        **{f"modelspec.{key}": value for key, value in task.modelspec.items()},
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.modelspec if family else 'unknown'}/lora",
        "modelspec.implementation": "diffscaler",
        "modelspec.title": task.name,
    }
    return write_file(path, save(tensors, metadata))


@torch.no_grad()
def lora_tensors(
    task: TaskAdapter, naming: str = "diffusers", *, base: nn.Module | None = None
) -> dict[str, Tensor]:
    """Returns what `export_lora` writes: key -> tensor, as `pipe.load_lora_weights` takes it too.

    Raises:
        DiffScalerError: As in `export_lora`.
    """
    if naming not in NAMINGS:
        raise unknown("naming", naming, NAMINGS)
    _check(task)
    export = _Export(task, naming, base)
    layers = (
        export.dense()
        if any("scale" in own for own in task.layers.values())
        else {name: dict(own) for name, own in task.layers.items()}
    )
    named = export.peft(layers) if naming == "diffusers" else export.native(layers)
    # copies, as safetensors refuses tensors that share memory, and those of one task may
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in sorted(named.items())}


def _check(task: TaskAdapter) -> None:
    """Refuses what is no change of weights."""
    spaces = [own for own in task.layers.values() if "down" in own]
    reasons = []
    if spaces and task.info.get("activation", "relu") != "identity":
        reasons.append(
            f"{len(spaces)} of its layers have a {task.info.get('activation', 'relu')} subspace, "
            f"which is no matrix (a `lora` task has identity ones)"
        )
    if task.is_timed:
        reasons.append("its hidden units act at different noise levels, and weights at all")
    if task.is_control:
        reasons.append("it takes a control picture")
    elif task.extras:  # new classes' rows are among them; the base's own need no place
        reasons.append(f"it holds more than layers: {first_names(task.extras)}")
    if task.schedule is not None:
        reasons.append("it has a schedule, and weights act in every step")
    if not task.layers:
        reasons.append("it adapts no layer")
    if reasons:
        raise DiffScalerError(
            f"task {task.name!r} cannot become a LoRA file: {'; '.join(reasons)}; a task file "
            f"(save_task) holds all of it"
        )
    if task.conditioning:
        logger.warning(
            "task %r: its stored prompts are left out; a LoRA file has no place for them", task.name
        )


@dataclass(frozen=True)
class _Export:
    """One task on its way into a naming."""

    task: TaskAdapter
    naming: str
    base: nn.Module | None

    @property
    def gain(self) -> float:
        """s: what multiplies U D."""
        return float(self.task.info.get("gain", 1.0))

    def dense(self) -> Layers:
        """Returns the layers with each scale as the difference of its whole weight, "diff"."""
        if self.naming == "diffusers":
            raise DiffScalerError(
                f"task {self.task.name!r} scales {self._count('scale')} layers, a difference of "
                f"whole weights, which diffusers' LoRA loaders do not read; fuse_diffscaler puts "
                f"it into the model, and the namings kohya and comfyui can hold it"
            )
        if self.base is None:
            raise DiffScalerError(
                f"task {self.task.name!r} scales {self._count('scale')} layers: the difference "
                f"a ⊙ W needs the weights W; give base="
            )
        layers: Layers = {}
        modules = self._modules()
        for name, own in self.task.layers.items():
            layers[name] = _as_difference(name, modules[name], own, self.task, self.gain)
        return layers

    def peft(self, layers: Layers) -> dict[str, Tensor]:
        """Returns PEFT's keys: `lora_A`, `lora_B`, and `lora_B.bias` on all if any has a shift."""
        named: dict[str, Tensor] = {}
        biased = any("shift" in own for own in layers.values())
        for name, own in layers.items():
            down, up = own.get("down"), own.get("up")
            if down is None or up is None:  # PEFT has no shift without a LoRA
                down, up = self._nothing(name, own["shift"])
            up = scaled(up, self.gain)
            named[f"{name}.lora_A.weight"] = down
            named[f"{name}.lora_B.weight"] = up.view(*up.shape, *(1,) * (down.ndim - 2))
            if biased:
                named[f"{name}.lora_B.bias"] = own.get("shift", up.new_zeros(len(up)))
        return named

    def native(self, layers: Layers) -> dict[str, Tensor]:
        """Returns kohya's or ComfyUI's keys, with the layers that lie in one there put together."""
        named: dict[str, Tensor] = {}
        for name, own in self._spelt(self._placed(layers)):
            if "diff" in own:
                named[f"{name}.diff"] = own["diff"]
            if "down" in own:
                down, up = own["down"], own["up"]
                named[f"{name}.lora_down.weight"] = down
                named[f"{name}.lora_up.weight"] = up.view(*up.shape, *(1,) * (down.ndim - 2))
                named[f"{name}.alpha"] = _number(self.gain * len(down))
            if "shift" in own:
                named[f"{name}.diff_b"] = own["shift"]
        return named

    def _placed(self, layers: Layers) -> list[tuple[Place, dict[str, Tensor]]]:
        """Returns the native layers, in the rows' own order."""
        family = self._family()
        if len(self.task.components) > 1:
            raise DiffScalerError(
                f"task {self.task.name!r} adapts {', '.join(self.task.components)}, and the naming "
                f"{self.naming!r} knows one model; use 'diffusers'"
            )
        table = own_places(family, layers_per_block(self.base))
        own = {name.partition(".")[2]: tensors for name, tensors in layers.items()}
        foreign = [name for name in own if name not in table]
        if foreign:
            raise DiffScalerError(
                f"{len(foreign)} layers have no name in {FAMILIES[family].title}'s first code: "
                f"{first_names(foreign)}; use the naming 'diffusers'"
            )
        self._check_biases({name for name, tensors in own.items() if "shift" in tensors})
        parts: dict[Place, dict[str, dict[str, Tensor]]] = {}
        for name, tensors in own.items():
            place = self._upsampler(name, own) or table[name]
            parts.setdefault(place, {})[name] = tensors
        return [(place, self._fused(place, of)) for place, of in parts.items()]

    def _check_biases(self, shifted: set[str]) -> None:
        """Refuses shifts on layers without a bias, as `.diff_b` changes the bias there is."""
        biasless = LORA_NAMES[self._family()].biasless
        without = {name for name in shifted if biasless and re.fullmatch(biasless, name)}
        if self.base is not None:
            component = self.task.components[0]
            modules: dict[str, Any] = self._modules()
            without = {n for n in shifted if modules[f"{component}.{n}"].bias is None}
        if without:
            raise DiffScalerError(
                f"task {self.task.name!r} shifts {len(without)} layers that have no bias, where "
                f"the naming {self.naming!r} can add none: {first_names(sorted(without))}; use the "
                f"naming 'diffusers'"
            )

    def _fused(self, place: Place, parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns one native layer's tensors of those of its parts."""
        if len(place.names) == 1:
            own = next(iter(parts.values()))
            return swap_halves(own) if self._is_swapped(place, own) else own
        rows = {n: len(next(t for k, t in own.items() if k != "down")) for n, own in parts.items()}
        multiples = dict(zip(place.names, place.sizes, strict=True))
        units = {rows[name] / multiples[name] for name in rows}
        if len(units) > 1:
            raise DiffScalerError(
                f"the layers {first_names(parts)} do not lie in one {place.native!r}: {rows}"
            )
        unit, start = int(units.pop()), 0
        laid: list[tuple[int, dict[str, Tensor]]] = []
        for name, size in multiples.items():
            if name in parts:
                laid.append((start, parts[name]))
            start += size * unit
        diffs = [(at, own.pop("diff")) for at, own in laid if "diff" in own]
        fused = fuse_rows(laid, start)
        if diffs:
            fused["diff"] = diffs[0][1].new_zeros(start, *diffs[0][1].shape[1:])
            for at, diff in diffs:
                fused["diff"][at : at + len(diff)] = diff
            if "down" in fused:  # ComfyUI reads one of the two per layer
                product = self.gain * fused["up"].float() @ fused.pop("down").float()
                del fused["up"]
                fused["diff"] = (fused["diff"].float() + product).to(fused["diff"].dtype)
        return fused

    def _spelt(
        self, placed: list[tuple[Place, dict[str, Tensor]]]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yields each layer's name in the file; kohya's tools call a U-Net's as diffusers does."""
        for place, own in placed:
            if self.naming == "comfyui":
                yield f"diffusion_model.{place.native}", own
            else:
                is_unet = self._family() == "unet2d_condition"
                yield f"lora_unet_{flat(place.names[0] if is_unet else place.native)}", own

    def _upsampler(self, name: str, layers: Mapping[str, Any]) -> Place | None:
        """Returns where the first upsampler of a U-Net lies: behind an attention, if there is one.

        Its level has none in the published U-Nets of four levels, and has one in those of three.
        """
        if name != "up_blocks.0.upsamplers.0.conv" or self._family() != "unet2d_condition":
            return None
        if self.base is not None:
            behind = len(getattr(self.base.get_submodule("up_blocks.0"), "attentions", ())) > 0
        elif any(other.startswith("up_blocks.0.attentions") for other in layers):
            behind = True
        elif any(other.startswith("up_blocks.3.") for other in layers):
            behind = False
        elif self.naming == "kohya":
            return None  # it is called by diffusers' name anyway
        else:
            raise DiffScalerError(
                f"whether {name!r} lies behind an attention cannot be told from this task alone; "
                f"give base="
            )
        block = layers_per_block(self.base)
        return Place(f"output_blocks.{block}.{1 + behind}.conv", (name,), (1,))

    def _is_swapped(self, place: Place, own: Mapping[str, Tensor]) -> bool:
        if place.swap != "if_two":
            return place.swap == "always"
        rows = len(next(t for k, t in own.items() if k != "down"))
        if "down" in own:
            return rows == 2 * own["down"].shape[1]
        return rows == 2 * self._window(place.names[0])[0]

    def _nothing(self, name: str, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a subspace that adds nothing, for a layer with a shift alone."""
        window = self._window(name.partition(".")[2])
        return shift.new_zeros(1, *window), shift.new_zeros(len(shift), 1)

    def _window(self, name: str) -> tuple[int, ...]:
        """Returns (C_in, *kernel) of a layer."""
        if self.base is None:
            raise DiffScalerError(
                f"how many columns {name!r} has cannot be told from its shift alone; give base="
            )
        component = self.task.components[0]
        target = as_target(name, self._modules()[f"{component}.{name}"])
        assert target is not None  # it has been matched
        return target.shape[1:]

    def _modules(self) -> dict[str, nn.Module]:
        """Returns the base's module of every layer of the task."""
        assert self.base is not None
        if len(self.task.components) > 1:
            raise MismatchError(
                f"task {self.task.name!r} adapts {', '.join(self.task.components)}; export with a "
                f"base takes one model at a time"
            )
        component = self.task.components[0]
        own = self.task.component_layers(component)
        found = match_layers(self.base, {self.task.name: self.task}, {self.task.name: own})
        return {f"{component}.{name}": module for name, module in found.items()}

    def _family(self) -> str:
        family = str((self.task.info.get("base") or {}).get("family"))
        if family not in LORA_NAMES:
            family = _fitting(self.task)
        if family not in LORA_NAMES:
            raise DiffScalerError(
                f"the naming {self.naming!r} is known for {', '.join(LORA_NAMES)}, and task "
                f"{self.task.name!r} is of family {family!r}; use 'diffusers'"
            )
        return family

    def _count(self, part: str) -> int:
        return sum(part in own for own in self.task.layers.values())


def _fitting(task: TaskAdapter) -> str:
    """Returns the one family that has all of a task's layers, or what the task says."""
    names = [name.partition(".")[2] for name in task.layers]
    fits = [family for family in LORA_NAMES if own_places(family).keys() >= set(names)]
    return fits[0] if len(fits) == 1 else str((task.info.get("base") or {}).get("family"))


def _as_difference(
    name: str, module: Any, own: Mapping[str, Tensor], task: TaskAdapter, gain: float
) -> dict[str, Tensor]:
    """Returns a layer's tensors with the scale, and a subspace beside it, as "diff"."""
    if "scale" not in own or not bool(own["scale"].any()):
        return {part: t for part, t in own.items() if part != "scale"}
    weight = module.weight.detach()
    if not weight.dtype.is_floating_point or weight.is_meta or weight.dtype.itemsize < 2:
        raise DiffScalerError(
            f"the weight of {name!r} is quantised or offloaded; give a base= with plain weights"
        )
    scale = own["scale"].to(weight.device, torch.float32)
    diff = scale.view(-1, *(1,) * (weight.ndim - 1)) * weight.float()
    if "down" in own:  # ComfyUI reads one of the two per layer
        product = own["up"].float() @ own["down"].float().flatten(1)
        diff = diff + gain * product.to(weight.device).view_as(weight)
    parts = {"diff": diff.to(weight.dtype)}
    shift = own.get("shift")
    bias = bias_of(name, module) if task.info.get("scale_includes_bias") else None
    if bias is not None:
        extra = scale * bias.to(scale.device)
        shift = extra if shift is None else shift.to(extra.device, torch.float32) + extra
    if shift is not None:
        parts["shift"] = shift
    return parts


def _number(value: float) -> Tensor:
    """Returns one number as a tensor that holds it exactly."""
    narrow = torch.tensor(value, dtype=torch.float32)
    return narrow if narrow.item() == value else torch.tensor(value, dtype=torch.float64)
