"""K-means of features. Arithmetic; knows no pictures.

Ours in few lines: scikit-learn's and scipy's would be the only thing here that needs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..training.randomness import generator_for


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found.

    Attributes:
        labels: Which cluster each picture is in, (N,), the largest cluster first.
        centres: (K, F), of standardised features.
        spread: Mean squared distance from a picture's own centre, as a share of that from the mean
            of all pictures: 0 tells clusters as small as points, 1 none at all.
    """

    labels: Tensor
    centres: Tensor
    spread: float


def k_means(
    features: Tensor, parts: int, *, seed: int = 0, starts: int = 8, steps: int = 100
) -> Clusters:
    """Returns the best of several runs of Lloyd's k-means from k-means++ starts.

    Args:
        features: (N, F); each is standardised first, so that none outweighs the others.
        parts: K.
        seed: Of the starts.
        starts: How many runs.
        steps: Most iterations of each.

    Raises:
        DiffScalerError: Fewer distinct pictures than parts.
    """
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-12)
    distinct = len(torch.unique(x, dim=0))
    if parts < 1 or distinct < parts:
        raise DiffScalerError(f"{distinct} distinct pictures cannot be cut into {parts} parts")
    best: tuple[float, Tensor, Tensor] | None = None
    for start in range(starts):
        labels, centres = _lloyd(x, _start(x, parts, generator_for(seed, "k-means", start)), steps)
        error = float((x - centres[labels]).square().sum())
        if best is None or error < best[0]:
            best = error, labels, centres
    assert best is not None
    error, labels, centres = best
    order = torch.bincount(labels, minlength=parts).argsort(descending=True, stable=True)
    whole = float(x.square().sum())
    return Clusters(order.argsort()[labels], centres[order], error / whole if whole else 0.0)


def _start(x: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """Returns k-means++ centres: each new one far from those there are."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    while len(chosen) < parts:
        nearest = torch.cdist(x, x[chosen]).square().min(1).values
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    return x[chosen]


def _lloyd(x: Tensor, centres: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    labels = torch.cdist(x, centres).argmin(1)
    for _ in range(steps):
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=len(centres)).unsqueeze(1)
        # a cluster that lost its last picture takes the one farthest from its own centre
        far = x[(x - centres[labels]).square().sum(1).argmax()]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), far)
        new = torch.cdist(x, centres).argmin(1)
        if torch.equal(new, labels):
            break
        labels = new
    return labels, centres
