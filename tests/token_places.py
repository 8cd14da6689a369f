"""Compares `Regions.gates` with where a real model has its tokens: change a place, see what moves.

For that nothing in the model may mix tokens: attention gives every token its own query and value
(the caller sees to it), `unmix` does the rest. Then one changed place of the latents changes its
own tokens in every layer of the model, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Places of the latents that are tried, at most.
TRIED = 6

Change = Callable[[Tensor], Tensor]
Slice = tuple[slice, slice]


def unmix(model: nn.Module) -> None:
    """Takes normalisation over places away, and all of a kernel but its middle."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
        if getattr(module, "padding", None) == (1, 1) and getattr(module, "kernel_size", 0):
            middle = torch.zeros(3, 3)
            middle[1, 1] = 1
            module.weight.data *= middle


class Watched:
    """A model whose layers' outputs are kept.

    Args:
        layers: By name.
        run: Runs the model on its latents, changed by a function: the first of them has two rows.
    """

    def __init__(self, layers: Mapping[str, nn.Module], run: Callable[[Change], None]) -> None:
        self.layers, self._run = layers, run

    def outputs(self, change: Change = lambda x: x) -> dict[tuple[str, int], Tensor]:
        """Returns what each call of each layer gave: (name, number of the call) -> output."""
        kept: dict[tuple[str, int], Tensor] = {}

        def keep(name: str, y: Tensor) -> None:
            kept[name, sum(known == name for known, _ in kept)] = y.clone()

        handles = [
            module.register_forward_hook(lambda _, args, y, name=name: keep(name, y))
            for name, module in self.layers.items()
        ]
        self._run(change)
        for handle in handles:
            handle.remove()
        return kept


def places_of(layout: Any) -> list[Slice]:
    """Returns blocks of latents that no layer resolves further, all over the picture."""
    step = 2 if layout.kind == "unet" else layout.patch
    rows, columns = range(0, layout.height, step), range(0, layout.width, step)
    every = [(slice(i, i + step), slice(j, j + step)) for i in rows for j in columns]
    return every[:: -(-len(every) // TRIED)]


def compare(
    watched: Watched,
    layout: Any,
    regions: Any,
    geometry: Mapping[str, Any],
    row_layout: Callable[[str], str],
) -> dict[str, int]:
    """Returns how many tokens of the picture each layer has, in both rows together.

    Args:
        watched: The model.
        layout: What is tested.
        regions: The class `Regions`.
        geometry: Layer -> its convolution's geometry.
        row_layout: Layer -> how its output holds rows.

    Raises:
        AssertionError: A gate is not 1 where the place's tokens are, 0 at other tokens of the
            picture, and the mask's mean at tokens that are not of the picture.
    """
    plain = watched.outputs()
    everywhere = watched.outputs(lambda x: x + 1)
    ever = {key: _moved(y, everywhere[key], geometry[key[0]]) for key, y in plain.items()}
    for (name, _), own in ever.items():
        if layout.role(name) == "list":  # filled up with copies of the last token, to be replaced
            own &= torch.arange(len(own)) % layout.filled < layout.image_tokens
    places = places_of(layout)
    for pair in zip(places, places[1:] + places[:1], strict=True):  # the first row's, the second's
        mask = torch.zeros(2, 1, layout.height, layout.width)
        for row, (i, j) in enumerate(pair):
            mask[row, 0, i, j] = 1
        mean = mask.mean(dim=(1, 2, 3))
        assert mean[0] == mean[1]
        made = regions({1: mask}, layout, 2)
        changed = watched.outputs(lambda x, pair=pair: _changed(x, pair))
        for key, y in plain.items():
            name, now = key[0], _moved(y, changed[key], geometry[key[0]])
            gates = made.gates(name, y, geometry[name], row_layout(name))
            without, own = gates.unbind(-1 if geometry[name] is None else 1)
            assert bool((without == 1).all()), key  # the task that has no mask
            own = own.reshape(-1) if y.ndim == 2 else own
            seen = ever[key]
            assert torch.equal(own.expand_as(now)[seen], now[seen].to(y)), key
            assert torch.allclose(own.expand_as(now)[~seen], mean[0].to(y), atol=1e-6), key
    found: dict[str, int] = {}
    for (name, _), own in ever.items():
        found[name] = max(found.get(name, 0), int(own.sum()))
    return found


def _moved(before: Tensor, after: Tensor, geometry: Any) -> Tensor:
    return (before != after).any(-1 if geometry is None else 1)


def _changed(x: Tensor, pair: tuple[Slice, Slice]) -> Tensor:
    x = x.clone()
    for row, (i, j) in enumerate(pair):
        x[row, ..., i, j] += 1
    return x
