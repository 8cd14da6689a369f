"""Several checkpoints of one task as their mean. No model needed.

The mean of parameters means something only where the parameters mean the same: along one run, or
between runs from one start that stayed near each other. Two runs from different random D have
hidden units that correspond to nothing in each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import DiffScalerError, MismatchError, first_names
from .task import TaskAdapter, flat

#: Where the Ds of two tasks point less alike than this (cosine over all layers), they are of
#: different runs. Our choice: checkpoints of one run are far above, different seeds near 0.
SMALLEST_COSINE = 0.5
#: Facts without which parameters do not mean the same, and what holds where nothing is said.
_FACTS = {
    **{"activation": "relu", "gain": 1.0, "scale_includes_bias": False},
    **{"classes": None, "windows": None},
}


@torch.no_grad()
def average_tasks(
    tasks: Sequence[TaskAdapter], weights: Sequence[float] | None = None, name: str | None = None
) -> TaskAdapter:
    """Returns the task whose every parameter is the mean of the tasks' own.

    For identity subspaces of different runs the products U D can be averaged instead:
    `resize_task(combine_tasks(tasks, [1 / n] * n), rank)`.

    Args:
        tasks: Checkpoints of one task: same layers, parts and ranks.
        weights: Of each, made to sum up to 1; default: all alike.
        name: The new task's name; default: the first one's.

    Raises:
        MismatchError: They differ in layers, shapes or facts, or are of different runs.
        DiffScalerError: Fewer than two, another number of weights, or weights that sum up to 0.
    """
    if len(tasks) < 2:
        raise DiffScalerError(f"an average needs two tasks or more, got {len(tasks)}")
    weights = [1.0] * len(tasks) if weights is None else list(weights)
    total = sum(weights)
    if len(weights) != len(tasks) or not abs(total) > 0:
        raise DiffScalerError(
            f"{len(tasks)} tasks and the weights {weights}: need one for each, and a sum that is "
            f"not 0"
        )
    shares = [weight / total for weight in weights]
    for other in tasks[1:]:
        _check(tasks[0], other)
    layers = {
        layer: {part: _mean([t.layers[layer][part] for t in tasks], shares) for part in own}
        for layer, own in tasks[0].layers.items()
    }
    first = tasks[0]
    sources = zip(tasks, shares, strict=True)
    facts = {"averaged_from": [{"name": t.name, "weight": share} for t, share in sources]}
    return first.replace(
        layers=layers,
        extras={n: _mean([t.extras[n] for t in tasks], shares) for n in first.extras},
        conditioning={
            n: _mean([t.conditioning[n] for t in tasks], shares) for n in first.conditioning
        },
    ).with_info(**facts, **({} if name is None else {"name": name}))


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Returns the weighted mean, summed in float64, in the first tensor's dtype."""
    total = sum(share * t.double() for share, t in zip(shares, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def _check(first: TaskAdapter, other: TaskAdapter) -> None:
    """Refuses tasks whose parameters do not mean the same.

    Raises:
        MismatchError: One line that says in what they differ.
    """
    names = f"{first.name!r} and {other.name!r}"
    shapes = [_shapes(task) for task in (first, other)]
    every = shapes[0].keys() | shapes[1].keys()
    differ = [name for name in every if shapes[0].get(name) != shapes[1].get(name)]
    if differ:
        raise MismatchError(
            f"{names} differ in {len(differ)} tensors, first {first_names(sorted(differ))}: an "
            f"average needs checkpoints of one task; combine_tasks adds tasks of any ranks"
        )
    for fact, usual in _FACTS.items():
        if first.info.get(fact, usual) != other.info.get(fact, usual):
            raise MismatchError(f"{names} differ in their {fact}, so their parameters mean others")
    if first.prompts != other.prompts:
        raise MismatchError(f"{names} store other prompts, so these have no mean")
    cosine = _cosine(first, other)
    if cosine < SMALLEST_COSINE:
        raise MismatchError(
            f"{names} are no checkpoints of one run: their D agree by {cosine:.2f} only (cosine), "
            f"so a mean of their hidden units is neither; combine them at 1/n each instead"
        )


def _shapes(task: TaskAdapter) -> dict[str, tuple[int, ...]]:
    named = flat(task.layers)
    named |= {f"conditioning.{name}": tensor for name, tensor in task.conditioning.items()}
    return {name: tuple(tensor.shape) for name, tensor in (named | dict(task.extras)).items()}


def _cosine(first: TaskAdapter, other: TaskAdapter) -> float:
    """Returns how alike the tasks' Ds point, over all layers; 1 without any."""
    dot = norms = others = 0.0
    for name, own in first.layers.items():
        if "down" in own:
            one, two = own["down"].double(), other.layers[name]["down"].double()
            dot += float((one * two).sum())
            norms, others = norms + float(one.square().sum()), others + float(two.square().sum())
    return dot / (norms * others) ** 0.5 if norms and others else 1.0
