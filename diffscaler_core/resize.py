"""A task with other ranks. No model needed.

An identity subspace is a matrix U D: its best approximation of a smaller rank is known, and how far
off that is. A relu subspace is no matrix, and what a hidden unit does depends on the layer's
inputs, which nobody has here: units are dropped by ‖u‖·‖d‖, the most one can add for an input of
length 1. That order is our own heuristic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .affiner import init_affiner
from .errors import DiffScalerError
from .task import TaskAdapter, layer_generator, rank_facts


@dataclass(frozen=True)
class Resized:
    """A task of other ranks, and what that cost.

    Attributes:
        task: The task.
        errors: Layer -> for an identity subspace ‖U D − U' D'‖ / ‖U D‖, exact; for relu the share
            of √Σ(‖u‖·‖d‖)² that was dropped, no error but a hint.
        is_exact: Whether the errors are errors.
    """

    task: TaskAdapter
    errors: Mapping[str, float]
    is_exact: bool

    @property
    def worst(self) -> float:
        """The largest of the errors, 0 without layers."""
        return max(self.errors.values(), default=0.0)


@torch.no_grad()
def resize_task(
    task: TaskAdapter, rank: int | None = None, *, energy: float | None = None, seed: int = 0
) -> Resized:
    """Returns the task with another rank in every layer that has a subspace.

    Smaller: an identity subspace becomes the nearest one of that rank; of a relu subspace the units
    that can do least are dropped, those that do nothing first. Larger: units are added that do
    nothing yet (U = 0, D random), so the task stays what it was and can be trained on. A control
    affiner keeps its rank.

    Args:
        task: The task; stays as it is.
        rank: R of every layer; None: as `energy` says.
        energy: Keep no more units than hold this share of Σσ² (of Σ(‖u‖·‖d‖)² for relu); with
            `rank`, of that rank at most, and nothing is added.
        seed: Of the new units' D.

    Raises:
        DiffScalerError: Neither is given, one is no rank or no share, or nothing has a subspace.
    """
    if rank is None and energy is None:
        raise DiffScalerError("say which rank, or which share of the energy to keep")
    if rank is not None and rank < 1:
        raise DiffScalerError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise DiffScalerError(f"energy is a share above 0 and at most 1, got {energy}")
    if not any("down" in tensors for tensors in task.layers.values()):
        raise DiffScalerError(f"task {task.name!r} has no subspace, so it has no rank to change")
    if task.is_timed:
        raise DiffScalerError(
            f"the hidden units of task {task.name!r} act at different noise levels, so its rank "
            f"cannot be changed: train it at another rank"
        )
    linear = str(task.info.get("activation", "relu")) == "identity"
    layers: dict[str, dict[str, Tensor]] = {}
    errors: dict[str, float] = {}
    for name, tensors in task.layers.items():
        own = dict(tensors)
        if "down" in own:
            dtype = own["down"].dtype
            ordered = _by_singular_value(own) if linear else _by_norm(own)
            kept = _count(ordered.worth, rank, energy)
            small = _cut(ordered, kept)
            if rank is not None and energy is None and rank > len(own["down"]):
                small = _grown(small, rank, seed, name)
            errors[name] = _lost(ordered.worth, kept)
            own |= {part: t.to(dtype).contiguous() for part, t in small.items()}
            if not len(own["down"]):  # every unit did nothing
                del own["down"], own["up"]
        layers[name] = own
    resized = task.replace(layers={name: own for name, own in layers.items() if own})
    return Resized(resized.with_info(ranks=rank_facts(resized.layers)), errors, linear)


@dataclass(frozen=True)
class _Units:
    """A subspace's hidden units, the most important first.

    Attributes:
        down: D, (R, C_in, *k), float32 or float64.
        up: U, (C_out, R).
        worth: What each counts for, (R,), falling.
    """

    down: Tensor
    up: Tensor
    worth: Tensor


def _by_singular_value(tensors: Mapping[str, Tensor]) -> _Units:
    """Returns an identity subspace turned so that its units are U D's singular vectors."""
    down, up = _wide(tensors["down"]), _wide(tensors["up"])
    left, small = torch.linalg.qr(up)
    right, other = torch.linalg.qr(down.flatten(1).mT)
    u, values, v = torch.linalg.svd(small @ other.mT, full_matrices=False)
    root = values.sqrt()
    turned = (v * root[:, None]) @ right.mT
    return _Units(turned.unflatten(1, down.shape[1:]), left @ (u * root), values)


def _by_norm(tensors: Mapping[str, Tensor]) -> _Units:
    """Returns a relu subspace's units ordered by ‖u‖·‖d‖."""
    down, up = _wide(tensors["down"]), _wide(tensors["up"])
    worth = up.norm(dim=0) * down.flatten(1).norm(dim=1)
    order = worth.argsort(descending=True, stable=True)
    return _Units(down[order], up[:, order], worth[order])


def _count(worth: Tensor, rank: int | None, energy: float | None) -> int:
    """Returns how many units stay; those that do nothing never do."""
    floor = torch.finfo(worth.dtype).eps * float(worth[:1].sum())
    count = int((worth > floor).sum())
    if energy is not None:
        held = worth.double().square().cumsum(0)
        enough = held >= energy * held[-1] * (1 - 1e-12)
        count = min(count, int(enough.int().argmax()) + 1)
    return count if rank is None else min(count, rank)


def _cut(units: _Units, count: int) -> dict[str, Tensor]:
    return {"down": units.down[:count], "up": units.up[:, :count]}


def _grown(tensors: Mapping[str, Tensor], rank: int, seed: int, layer: str) -> dict[str, Tensor]:
    """Returns a subspace of a larger rank that does the same."""
    down, up = tensors["down"], tensors["up"]
    rank = min(rank, max(len(down), math.prod(down.shape[1:]), len(up)))
    # another source than a new task's: its first rows are what these units started from
    source = layer_generator(seed, f"{layer} from {len(down)}")
    fresh = init_affiner(
        ("subspace",), len(up), down.shape[1], down.shape[2:], rank - len(down), source
    )
    return {
        "down": torch.cat([down, fresh["down"].to(down)]),
        "up": torch.cat([up, fresh["up"].to(up)], dim=1),
    }


def _lost(worth: Tensor, kept: int) -> float:
    whole = float(worth.double().norm())
    return float(worth[kept:].double().norm()) / whole if whole else 0.0


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
