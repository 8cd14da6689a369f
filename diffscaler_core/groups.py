"""Groups: one batch made of K equal parts, one after the other, each running one task alone.

How several tasks train in one run, at strength 1 each. Linears run all groups in one batched
product of static shapes; ranks that differ are padded with zeros, which is exact. No group's rows
ever meet another's, so a NaN in one changes no bit of the others' outputs or gradients.

Shapes: K groups, N rows of one group (batch, tokens, … flattened), R the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import (
    ACTIVATIONS,
    Affiner,
    ConvGeometry,
    Folded,
    activated,
    apply_folded,
    corrected,
    fold_alone,
    windowed,
)


def fold_groups(
    affiners: Sequence[Affiner | None], bias: Tensor | None, device: torch.device
) -> list[Folded | None]:
    """Returns each group's affiner folded, at strength 1 and differentiable; None: the base."""
    known = {id(a): fold_alone(a, bias, device) for a in affiners if a is not None}
    return [None if a is None else known[id(a)] for a in affiners]


def stack_groups(groups: Sequence[Folded | None]) -> Folded:
    """Returns groups of a Linear as one, with zeros for what a group lacks.

    Its gain and offset are (K, 1, C_out), down (K, R, C_in), up (K, C_out, R), floor (K, 1, R).
    """
    there = [group for group in groups if group is not None]
    rank = max(0 if g.down is None else g.down.shape[0] for g in there)
    kinds = {group.linear for group in there if group.down is not None}
    return Folded(
        gain=_stacked([None if g is None else g.gain for g in groups], 1),
        offset=_stacked([None if g is None else g.offset for g in groups], 1),
        down=_stacked([None if g is None else _padded(g.down, 0, rank) for g in groups]),
        up=_stacked([None if g is None else _padded(g.up, 1, rank) for g in groups]),
        floor=_floors(groups, rank, there[0]) if len(kinds) > 1 else None,
        linear=kinds == {True},
        mask=None,
    )


def group_windows(windows: Sequence[Tensor | None] | None, stacked: Folded) -> Tensor | None:
    """Returns what the hidden units of stacked groups are multiplied with, (B, R); None: 1.

    Args:
        windows: Of each group, (1 or rows of a group, R of its own) or None; or None for all.
        stacked: From `stack_groups`.
    """
    if windows is None or stacked.down is None:
        return None
    rank, most = stacked.down.shape[1], max(len(own) for own in windows if own is not None)
    rows = []
    for own in windows:
        own = stacked.down.new_ones(1, rank) if own is None else own
        rows.append(F.pad(own, (0, rank - own.shape[1])).expand(most, -1))
    return torch.cat(rows)


def apply_stacked(x: Tensor, y: Tensor, folded: Folded, window: Tensor | None = None) -> Tensor:
    """Returns a Linear's output, every group corrected by its own task.

    Args:
        x: The layer's input, (…, C_in), rows of a group together.
        y: The layer's output, (…, C_out); not modified.
        folded: From `stack_groups`, on y's device and in y's dtype.
        window: From `group_windows`.
    """
    like = next(iter(folded.tensors()))
    y_groups = y.reshape(len(like), -1, y.shape[-1])
    correction = folded.offset
    if folded.down is not None and folded.up is not None:
        x_groups = x.to(y.device, y.dtype).reshape(len(like), -1, x.shape[-1])
        hidden = torch.bmm(x_groups, folded.down.transpose(1, 2))
        hidden = activated(hidden, folded.floor, folded.linear)
        if window is not None:
            by_row = hidden.reshape(len(window), -1, hidden.shape[-1])
            hidden = (by_row * window.to(hidden.dtype).unsqueeze(1)).view(hidden.shape)
        up = folded.up.transpose(1, 2)
        if correction is None:
            correction = torch.bmm(hidden, up)
        else:
            correction = torch.baddbmm(correction, hidden, up)
    return corrected(y_groups, folded.gain, correction).reshape(y.shape)


def apply_each(
    x: Tensor,
    y: Tensor,
    groups: Sequence[Folded | None],
    geometry: ConvGeometry,
    windows: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Returns a convolution's output, every group corrected by its own task.

    Args:
        x: The layer's input, (B, C_in, *size), B a multiple of the number of groups.
        y: The layer's output, (B, C_out, *size); not modified.
        groups: From `fold_groups`.
        geometry: The convolution's geometry.
        windows: Of each group, (1 or rows of a group, R) or None; None: all units act.
    """
    parts = []
    windows = [None] * len(groups) if windows is None else windows
    chunks = zip(x.chunk(len(groups)), y.chunk(len(groups)), groups, windows, strict=True)
    for x_own, y_own, folded, window in chunks:
        if folded is not None:
            window = window[0] if window is not None and len(window) == 1 else window
            repeats = 1 if window is None or window.ndim == 1 else len(y_own) // len(window)
            folded = windowed(folded, window).to(y.device, y.dtype)
            y_own = apply_folded(x_own, y_own, folded, geometry, repeats)
        parts.append(y_own)
    return torch.cat(parts)


def _stacked(tensors: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    """Returns the groups' tensors in one, with zeros for absent ones; None if all are absent.

    Args:
        tensors: One per group.
        dim: Where (counted after stacking) a dimension of 1 is put in; 0: nowhere.
    """
    like = next((t for t in tensors if t is not None), None)
    if like is None:
        return None
    stacked = torch.stack([torch.zeros_like(like) if t is None else t for t in tensors])
    return stacked.unsqueeze(dim) if dim else stacked


def _padded(tensor: Tensor | None, dim: int, rank: int) -> Tensor | None:
    """Returns D (dim 0) or U (dim 1) with zeros up to the largest rank."""
    if tensor is None or tensor.shape[dim] == rank:
        return tensor
    missing = rank - tensor.shape[dim]
    return F.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing))


def _floors(groups: Sequence[Folded | None], rank: int, like: Folded) -> Tensor:
    """Returns the smallest value each hidden unit lets through, (K, 1, R)."""
    device = next(iter(like.tensors())).device
    linear = [group is not None and group.linear for group in groups]
    lowest = [ACTIVATIONS["identity" if own else "relu"] for own in linear]
    return torch.tensor(lowest, device=device)[:, None, None].repeat(1, 1, rank)
