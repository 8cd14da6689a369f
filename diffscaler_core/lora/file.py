"""One LoRA file: where its layers lie, and their tensors as a task would have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import TaskFileError, first_names, reason_of
from ..families import FAMILIES
from ..file_rules import check_finite
from ..header import Header
from ..layouts import own_units, slice_rows, swap_halves
from ..targets import as_target, resolve
from ..tensor_file import read_tensors
from .alpha import Scaling, scalings
from .names import LAYERS_PER_BLOCK, LORA_NAMES, PREFIXES, Place, places, split_prefix

#: Stored dtype -> the dtype the task keeps, which holds every value of it.
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float16,
    "F8_E5M2": torch.float16,
}
#: Other dtypes that an alpha may have.
_NUMBERS = ("F64", "I64", "I32", "I16", "I8", "U8")
#: ModelSpec entries of a LoRA file that are as true of the task.
_MODELSPEC = (
    *("title", "author", "description", "license", "date", "thumbnail", "tags", "trigger_phrase"),
    *("usage_hint",),
)


@dataclass(frozen=True)
class Layer:
    """One layer of a file: where it lies, and the keys of its tensors."""

    named: str
    prefix: str
    place: Place
    keys: Mapping[str, str]


@dataclass(frozen=True)
class LoraFile:
    """A file being read: its path and header, and what the base's blocks are like."""

    path: Path
    header: Header
    layers_per_block: int

    def placed(self, keys: Mapping[str, Mapping[str, str]]) -> tuple[str, list[Layer]]:
        """Returns (family or "unknown", every layer with its place)."""
        split = {name: split_prefix(_plain(name)) for name in keys}
        fits: dict[str, dict[str, Place]] = {}
        missing: dict[str, list[str]] = {}
        for family in LORA_NAMES:
            own = {
                name: places(family, PREFIXES[prefix], self.layers_per_block).get(rest)
                for name, (prefix, rest) in split.items()
            }
            missing[family] = [name for name, place in own.items() if place is None]
            if not missing[family]:
                fits[family] = {name: place for name, place in own.items() if place is not None}
        if fits:
            family, chosen = self._choice(fits)
        else:
            family, chosen = "unknown", self._as_they_are(split, missing)
        return family, [Layer(n, split[n][0], chosen[n], keys[n]) for n in keys]

    def _choice(self, fits: Mapping[str, dict[str, Place]]) -> tuple[str, dict[str, Place]]:
        """Returns the family among those whose names fit, as far as the file tells."""
        hints = [
            self.header.metadata.get(k, "")
            for k in ("modelspec.architecture", "ss_base_model_version")
        ]
        hinted = [
            family
            for family in fits
            if any(h and h.startswith(LORA_NAMES[family].hints) for h in hints)
        ]
        if len(fits) == 1 or len(hinted) == 1:
            family = (hinted or list(fits))[0]
            return family, fits[family]
        first, *others = fits.values()
        if any(other != first for other in others):
            raise TaskFileError(
                f"{self.path.name!r} fits the names of {', '.join(fits)} alike, where they mean "
                f"different layers; import it with base="
            )
        return "unknown", first

    def _as_they_are(
        self, split: Mapping[str, tuple[str, str]], missing: Mapping[str, list[str]]
    ) -> dict[str, Place]:
        """Returns diffusers' names as the file has them, for families without a table here."""
        own_naming = ("transformer.", "transformer_2.", "unet.", "base_model.model.")
        closest = min(missing, key=lambda family: len(missing[family]))
        partly = len(missing[closest]) < len(split)
        if partly or not all(prefix.startswith(own_naming) for prefix, _ in split.values()):
            raise TaskFileError(
                f"{self.path.name!r} names {len(missing[closest])} of {len(split)} layers as no "
                f"{FAMILIES[closest].title} does, the family that fits best: "
                f"{first_names(missing[closest])}; families known by these names: "
                f"{', '.join(LORA_NAMES)}"
            )
        return {name: Place(rest, (rest,), (1,)) for name, (_, rest) in split.items()}

    def layers(
        self,
        found: list[Layer],
        family: str,
        base: nn.Module | None,
        tensors: Mapping[str, Tensor],
    ) -> tuple[dict[str, dict[str, Tensor]], float]:
        """Returns the task's layers and its gain."""
        scaling = scalings(self.path, self.header.metadata)
        read: list[tuple[Layer, dict[str, Tensor], float]] = []
        for layer in found:
            own = {what: tensors[key] for what, key in layer.keys.items()}
            scale = self._scale(layer, own, scaling)
            own = self._parts(layer, own, scale, _kernel(family, layer, base))
            if own:
                read.append((layer, own, scale))
        scales = Counter(scale for _, own, scale in read if "down" in own and scale)
        gain = scales.most_common(1)[0][0] if scales else 1.0
        layers: dict[str, dict[str, Tensor]] = {}
        for layer, own, scale in read:
            if "up" in own:
                own["up"] = scaled(own["up"], scale / gain)
            component = _component(layer, family)
            for name, part in self._split(layer, own, base):
                if layers.setdefault(f"{component}.{name}", part) is not part:
                    raise TaskFileError(
                        f"{self.path.name!r} is mixed: it holds {name!r} twice, under two names"
                    )
        if not layers:
            raise TaskFileError(f"{self.path.name!r} changes nothing: all it holds is zero")
        return layers, gain

    def acting(
        self, keys: Mapping[str, dict[str, str]], tensors: Mapping[str, Tensor]
    ) -> dict[str, dict[str, str]]:
        """Returns the layers without differences that are all zero.

        ComfyUI's trainer stores one for every bias and every norm, which a task could not adapt.

        Raises:
            TaskFileError: A difference of a whole weight, or no layer is left.
        """
        whole = [own["diff"] for own in keys.values() if "diff" in own]
        whole = [key for key in whole if bool(tensors[key].any())]
        if whole:
            raise TaskFileError(
                f"{self.path.name!r} changes {len(whole)} whole weights (.diff), which no low-rank "
                f"task does exactly: {first_names(whole)}; `diffscaler extract` fits a task to "
                f"such a model and says how well"
            )
        acts = {"down", "up"}
        left = {
            name: own
            for name, own in keys.items()
            if acts & own.keys()
            or any(bool(tensors[k].any()) for w, k in own.items() if w != "alpha")
        }
        if not left:
            raise TaskFileError(f"{self.path.name!r} changes nothing: all it holds is zero")
        return left

    def tensors(self, keys: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
        """Returns the tensors of some layers by key, in a dtype that holds every value.

        Raises:
            TaskFileError: Another dtype, NaN or Inf, or a broken file.
        """
        wanted = [key for own in keys.values() for key in own.values()]
        odd = [
            f"{key} ({dtype})"
            for key in wanted
            if str(dtype := self.header.entries[key].get("dtype")) not in _DTYPES
            and not (key.endswith(".alpha") and str(dtype) in _NUMBERS)
        ]
        if odd:
            raise TaskFileError(
                f"{self.path.name!r} holds {first_names(odd)}; a task stores {', '.join(_DTYPES)} "
                f"without loss, and no others"
            )
        try:
            tensors = read_tensors(self.path, self.header, wanted)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise TaskFileError(f"{self.path.name!r} is broken: {reason_of(error)}") from error
        tensors = {
            key: t.to(_DTYPES.get(self.header.entries[key]["dtype"], torch.float64))
            for key, t in tensors.items()
        }
        check_finite(self.path.name, tensors)
        return tensors

    def _scale(self, layer: Layer, own: Mapping[str, Tensor], scaling: Scaling) -> float:
        """Returns alpha / rank of a layer, or what stands for it in PEFT's files."""
        rank = (len(own["down"]) if "down" in own and own["down"].ndim else 1) or 1
        if "alpha" not in own:
            return scaling.of(layer.prefix, split_prefix(layer.named)[1], rank)
        if own["alpha"].numel() != 1:
            raise TaskFileError(f"{self.path.name!r}: alpha of {layer.named!r} is no single number")
        return float(own["alpha"]) / rank

    def _parts(
        self, layer: Layer, own: Mapping[str, Tensor], scale: float, kernel: tuple[int, ...] | None
    ) -> dict[str, Tensor]:
        """Returns a layer's D, U and shift, with the shapes a task gives them."""
        label = f"{self.path.name!r}: {layer.named!r}"
        if "shift" in own and "up_bias" in own:
            raise TaskFileError(f"{label} has two shifts")
        if ("down" in own) != ("up" in own):
            raise TaskFileError(f"{label} has {'down' if 'down' in own else 'up'} alone")
        parts: dict[str, Tensor] = {}
        if "down" in own:
            down, up = own["down"], own["up"]
            sound = down.ndim >= 2 and up.ndim >= 2 and down.numel() and up.numel()
            if not sound or up.shape[1] != len(down) or up[0, 0].numel() != 1:
                raise TaskFileError(
                    f"{label} is no down and up: {tuple(down.shape)} and {tuple(up.shape)}"
                )
            parts["down"] = _unflattened(down, kernel)
            parts["up"] = up.flatten(1)
        if "shift" in own or "up_bias" in own:
            shift = own["shift"] if "shift" in own else scaled(own["up_bias"], scale)
            if bool(shift.any()):  # ComfyUI's trainer stores one for every bias
                parts["shift"] = shift.flatten()
        if len({len(t) for n, t in parts.items() if n != "down"}) > 1:
            raise TaskFileError(f"{label} has an up and a shift of different lengths")
        return parts

    def _split(
        self, layer: Layer, own: dict[str, Tensor], base: nn.Module | None
    ) -> list[tuple[str, dict[str, Tensor]]]:
        """Returns (diffusers name, tensors) of each part of a layer."""
        place = layer.place
        rows = len(next(t for n, t in own.items() if n != "down"))
        if _is_swapped(self.path.name, layer, own, rows, base):
            own = swap_halves(own)
        if len(place.names) == 1:
            return [(place.names[0], own)]
        unit, rest = divmod(rows, sum(place.sizes))
        if rest or ("down" in own and own["down"].shape[1] != unit):
            raise TaskFileError(
                f"{self.path.name!r}: {layer.named!r} has {rows} rows, which do not divide into "
                f"{', '.join(place.names)}"
            )
        parts, start = [], 0
        for name, size in zip(place.names, place.sizes, strict=True):
            part = own_units(own, slice_rows(own, start, size * unit))
            part = {n: t for n, t in part.items() if n != "shift" or bool(t.any())}
            start += size * unit
            if part:
                parts.append((name, part))
        return parts

    def modelspec(self) -> dict[str, str]:
        """Returns those of the header's ModelSpec entries that are as true of the task."""
        found = {key: self.header.metadata.get(f"modelspec.{key}") for key in _MODELSPEC}
        return {key: value for key, value in found.items() if value}

    def title(self) -> str:
        """Returns what the file calls itself."""
        keys = ("modelspec.title", "ss_output_name")
        return next(
            (self.header.metadata[k] for k in keys if self.header.metadata.get(k)), self.path.stem
        )


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """Returns tensor · scale, in its own dtype where that is exact, else rounded to float32."""
    if scale == 1.0:
        return tensor
    exact = tensor.double() * scale
    own = exact.to(tensor.dtype)
    return own if torch.equal(own.double(), exact) else exact.float()


def _plain(name: str) -> str:
    """Returns a name as today's diffusers writes it: older ones had the attention's processor."""
    if ".processor." not in name:
        return name
    return re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))


def layers_per_block(base: nn.Module | None) -> int:
    """Returns how many residual blocks each level of a U-Net has; as published if base is None."""
    layers = getattr(getattr(base, "config", None), "layers_per_block", LAYERS_PER_BLOCK)
    return layers if isinstance(layers, int) else LAYERS_PER_BLOCK


def _kernel(family: str, layer: Layer, base: nn.Module | None) -> tuple[int, ...] | None:
    """Returns the kernel of the layer's convolution, () of a Linear, None if nobody knows."""
    name = layer.place.names[0]
    if base is not None:
        module = resolve(base, name)
        target = None if module is None else as_target(name, module)
        return None if target is None else target.kernel
    for pattern, kernel in (LORA_NAMES[family].kernels if family in LORA_NAMES else {}).items():
        if re.fullmatch(pattern, name):
            return kernel
    return None


def _unflattened(down: Tensor, kernel: tuple[int, ...] | None) -> Tensor:
    """Returns a D with its kernel's dimensions; ComfyUI's trainer stores it flat."""
    size = 1
    for length in kernel or ():
        size *= length
    if kernel is None or down.ndim == 2 + len(kernel) or down[0].numel() % size:
        return down
    return down.reshape(len(down), -1, *kernel)


def _is_swapped(
    file: str, layer: Layer, own: Mapping[str, Tensor], rows: int, base: nn.Module | None
) -> bool:
    if layer.place.swap != "if_two":
        return layer.place.swap == "always"
    target = None
    if base is not None and (module := resolve(base, layer.place.names[0])) is not None:
        target = as_target(layer.place.names[0], module)
    width = own["down"].shape[1] if "down" in own else target.in_features if target else None
    if width is None:
        raise TaskFileError(
            f"{file!r}: how the rows of {layer.named!r} lie depends on its columns, which a shift "
            f"alone does not show; import it with base="
        )
    return rows == 2 * width


def _component(layer: Layer, family: str) -> str:
    if layer.prefix == "transformer_2.":
        return "transformer_2"
    if family in FAMILIES:
        return "unet" if "UNet" in FAMILIES[family].classes[0] else "transformer"
    is_unet = layer.prefix.startswith("unet.") or "up_blocks." in layer.place.native
    return "unet" if is_unet else "transformer"
