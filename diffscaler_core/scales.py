"""Watching that no 1 + scale comes near 0, where `affiner_grad` could not divide by it.

All layers of a model are looked at together, once after each change of the parameters, so that a
GPU is asked once per step and not once per layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

#: Where |1 + scale| is below this, the scale's gradient comes from y itself. Our choice: it bounds
#: by 4 how much the rounding of what is kept is magnified.
SMALLEST = 0.25


class Scaled(Protocol):
    """A layer with scales."""

    @property
    def version(self) -> int:
        """A number that grows with every in-place change of a parameter."""
        ...

    def scales(self) -> list[Tensor]:
        """Returns the tasks' scales on this layer."""
        ...


class ScaleWatch:
    """What is known of the scales of one model's layers; shared by all its stacks."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Scaled, tuple[int, bool]] = (
            weakref.WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[type[ScaleWatch], tuple[()]]:
        return (ScaleWatch, ())  # copies and pickles look anew

    def is_safe(self, layer: Scaled) -> bool:
        """Says whether no 1 + scale of this layer is near 0."""
        version, verdict = self._known.get(layer, (-1, True))
        if version == layer.version:
            return verdict
        changed = [one for one, (then, _) in self._known.items() if then != one.version]
        self._look(changed if layer in self._known else [*changed, layer])
        return self._known[layer][1]

    def _look(self, layers: Sequence[Scaled]) -> None:
        whole = _far_from_zero([scale for layer in layers for scale in layer.scales()])
        for layer in layers:
            self._known[layer] = (layer.version, whole or _far_from_zero(layer.scales()))


@torch.no_grad()
def _far_from_zero(scales: Sequence[Tensor]) -> bool:
    if not scales:
        return True
    flat = torch.cat([scale.to(scales[0].device) for scale in scales])
    return bool(((1 + flat).abs() >= SMALLEST).all())
