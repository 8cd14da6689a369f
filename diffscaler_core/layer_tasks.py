"""One adapted layer and its tasks' affiners, as everything that lays them out knows it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .affiner import Affiner, ConvGeometry
from .forms import Form
from .kin import kin_of
from .regional_forms import Place, Question, Regional


@dataclass(eq=False)
class Layer:
    """One adapted layer.

    Attributes:
        name: Its name, for messages.
        affiners: A task's slot -> its affiner here.
        bias: The layer's own bias, float32, (C_out,), or None where no scale asks for it.
        geometry: The layer's convolution geometry, None for a Linear.
        start: Where its channels begin among those of all layers.
        width: C_out; 0 while nobody knows.
        place: Where compiled code runs it, once there is any.
        compiled: Its tasks, laid out for that code.
        asked: What compiled code asks regions for, once there is any.
        compiled_regional: What they answered.
        kin: The layers that are given the same tensor, itself among them, in order; often none.
        was_live: Its parameters were trained since its tasks were laid out.
    """

    name: str
    affiners: dict[int, Affiner]
    bias: Tensor | None
    geometry: ConvGeometry | None
    start: int = 0
    width: int = 0
    place: Place | None = None
    compiled: Form | None = None
    asked: Question | None = None
    compiled_regional: Regional | None = None
    kin: tuple[Layer, ...] = ()
    was_live: bool = False

    def measure(self) -> int:
        """Returns C_out, as the affiners show it."""
        for affiner in self.affiners.values():
            for tensor in (affiner.scale, affiner.shift, affiner.up):
                if tensor is not None:
                    return int(tensor.shape[0])
        return 0


def version_of(tensors: Sequence[Tensor]) -> int:
    """Returns a number that grows with every in-place change of one of the tensors."""
    return sum([t._version for t in tensors if not t.is_inference()])


class TaskVectors:
    """The tasks' scales, shifts and bias corrections, each as one vector of all layers.

    Args:
        layers: Of the model; more may come.

    Attributes:
        channels: ΣC_out over all layers, once `measure` has counted.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._known: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        self._sizes: dict[int, int] = {}
        self.channels = 0

    def __getstate__(self) -> dict[str, object]:
        """Leaves out what was computed: a copy computes it again."""
        return {**self.__dict__, "_known": {}}

    def measure(self) -> bool:
        """Finds each layer's place among all channels, and its kin; says whether one has moved."""
        start = 0
        moved = False
        for layer in self._layers:
            width = layer.measure()
            moved |= (layer.start, layer.width) != (start, width)
            layer.start, layer.width = start, width
            start += width
        self.channels = start
        linear = {layer.name: layer for layer in self._layers if layer.geometry is None}
        kin = kin_of(linear)
        for layer in self._layers:
            layer.kin = tuple(linear[name] for name in kin.get(layer.name, ()))
        return moved

    def of(self, slot: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a task's a, b and −a ⊙ b̂ on all layers, each (ΣC_out,), in float32 (or 64)."""
        key = (slot, device)
        if key not in self._known:
            own = [layer.affiners.get(slot) for layer in self._layers]
            scale = self._flat([None if a is None else a.scale for a in own], device)
            shift = self._flat([None if a is None else a.shift for a in own], device)
            counts = [a is not None and not a.scale_includes_bias for a in own]
            biases = zip(self._layers, counts, strict=True)
            bias = self._flat([one.bias if count else None for one, count in biases], device)
            self._known[key] = (scale, shift, bias.mul_(scale).neg_())
        return self._known[key]

    def largest(self, slots: Sequence[int]) -> int:
        """Returns the bytes of the largest of these tasks, as its parameters have them."""
        return max(self._bytes_of(slot) for slot in slots)

    def _bytes_of(self, slot: int) -> int:
        if slot not in self._sizes:
            own = [layer.affiners[slot] for layer in self._layers if slot in layer.affiners]
            self._sizes[slot] = sum(p.nbytes for affiner in own for p in affiner.parameters())
        return self._sizes[slot]

    def forget(self, but: Collection[int] = ()) -> None:
        """Drops what was computed, but for the tasks named."""
        for key in [key for key in self._known if key[0] not in but]:
            del self._known[key]
        if not but:
            self._sizes.clear()

    def tensors(self) -> list[Tensor]:
        """Returns what is held."""
        return [t for known in self._known.values() for t in known]

    def _flat(self, parts: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Returns one vector of all layers, (ΣC_out,), 0 where a layer has none; a copy."""
        there = [part for part in parts if part is not None]
        wide = any(part.dtype == torch.float64 for part in there)
        dtype = torch.float64 if wide else torch.float32
        zeros = torch.zeros(max((x.width for x in self._layers), default=0), device=device)
        filled = [
            zeros[: layer.width] if part is None else part.detach().to(device, dtype)
            for layer, part in zip(self._layers, parts, strict=True)
        ]
        return torch.cat(filled) if filled else zeros.to(dtype)
