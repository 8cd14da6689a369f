"""Moving an affiner between layers that differ only in how their output rows lie. Pure and exact.

One host keeps q, k and v as three Linears, another as one fused Linear; one orders an adaLN's rows
(shift, scale), another (scale, shift). An affiner follows: a, b and the rows of U are per output
row, D is per input.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Placement:
    """Where one layer of a task lies in the other host's model.

    Attributes:
        module: The other host's module path.
        start: First output row it fills there.
        size: How many rows; None: all from `start`.
        swapped: True: the two halves of its rows change places there (diffusers' AdaLayerNorm
            orders (scale, shift), the original code (shift, scale)).
        columns: (start, size) of the input columns it reads there, None for all.
    """

    module: str
    start: int = 0
    size: int | None = None
    swapped: bool = False
    columns: tuple[int, int] | None = None


def swap_halves(tensors: Tensors) -> dict[str, Tensor]:
    """Returns an affiner whose output rows' two halves changed places."""
    return {
        name: t if name == "down" else torch.cat(t.chunk(2)[::-1]) for name, t in tensors.items()
    }


def slice_rows(tensors: Tensors, start: int, size: int) -> dict[str, Tensor]:
    """Returns the affiner of some output rows alone; exact: a, b, U are sliced, D is copied."""
    return {
        name: t if name == "down" else t[start : start + size].clone()
        for name, t in tensors.items()
    }


def own_units(fused: Tensors, part: Tensors) -> dict[str, Tensor]:
    """Returns the affiner of some rows without the hidden units that only other rows use; exact.

    Units that no row uses (a new task's U is 0) stay.

    Args:
        fused: The affiner of all rows.
        part: What `slice_rows` made of it.
    """
    if "up" not in part:
        return dict(part)
    keep = part["up"].any(0) | ~fused["up"].any(0)
    if not keep.any():
        return {name: t for name, t in part.items() if name not in ("down", "up")}
    return {**part, "up": part["up"][:, keep], "down": part["down"][keep]}


def fuse_rows(parts: Sequence[tuple[int, Tensors]], out_features: int) -> dict[str, Tensor]:
    """Returns one affiner for a fused layer from those of its row ranges; exact.

    a and b are laid at their rows, the Ds stacked (ranks add up), the Us on the block diagonal;
    rows nobody fills stay unchanged.

    Args:
        parts: (first output row, affiner) of each.
        out_features: C_out of the fused layer.
    """
    fused: dict[str, Tensor] = {}
    for name in ("scale", "shift"):
        rows = [(start, t[name]) for start, t in parts if name in t]
        if rows:
            fused[name] = _zeros_like_all([t for _, t in rows], out_features)
            for start, values in rows:
                fused[name][start : start + len(values)] = values
    spaces = [(start, t["down"], t["up"]) for start, t in parts if "down" in t]
    if spaces:
        fused["down"] = torch.cat([down for _, down, _ in spaces])
        ups = [up for _, _, up in spaces]
        fused["up"] = _zeros_like_all(ups, out_features, len(fused["down"]))
        rank = 0
        for start, down, up in spaces:
            fused["up"][start : start + len(up), rank : rank + len(down)] = up
            rank += len(down)
    return fused


def _zeros_like_all(tensors: Sequence[Tensor], *size: int) -> Tensor:
    """Returns zeros in the dtype that holds every tensor's values exactly."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tensors[0].new_zeros(size, dtype=dtype)
