"""Distances between two sets of features, (N, F) and (M, F). Pure maths in float64; knows no model.

"Real" is the reference, "made" what is judged. None of these looks at single pictures: they compare
two clouds of points, so both must come from one feature network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DiffScalerError

_ROWS = 1024  # of a table of distances held at a time


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """Returns the Fréchet distance of two sets, each taken as a Gaussian ("FID", arXiv:1706.08500).

    It falls with more pictures (about as 1/N), so only figures of equal numbers are comparable.

    Args:
        real: (N, F), N ≥ 2.
        made: (M, F), M ≥ 2.

    Raises:
        DiffScalerError: The features do not fit each other, are too few, or are not finite.
    """
    real, made = _checked(real, made, at_least=2)
    return frechet_of_gaussians(real.mean(0), covariance(real), made.mean(0), covariance(made))


def frechet_of_gaussians(mean: Tensor, cov: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Returns |m − m₂|² + tr(C + C₂ − 2 (C^½ C₂ C^½)^½) of Gaussians (Dowson and Landau, 1982).

    C^½ C₂ C^½ is symmetric and has the eigenvalues of C C₂, so that two symmetric eigenproblems do
    it: nothing complex, and singular covariances (fewer pictures than features) are as good.

    Args:
        mean: (F,), float64.
        cov: (F, F), symmetric, no negative eigenvalues.
        mean_2: As `mean`.
        cov_2: As `cov`.
    """
    root = _root(cov)
    between = torch.linalg.eigvalsh(_symmetric(root @ cov_2 @ root)).clamp_min(0).sqrt().sum()
    gap = (mean - mean_2).square().sum()
    return float((gap + cov.trace() + cov_2.trace() - 2 * between).clamp_min(0))


def covariance(features: Tensor) -> Tensor:
    """Returns the unbiased covariance (F, F) of features (N, F)."""
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_symmetric(cov))
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


@dataclass(frozen=True)
class Kernel:
    """A kernel distance over subsets: its mean and its spread (standard deviation)."""

    mean: float
    spread: float


def kernel_distance(
    real: Tensor, made: Tensor, *, subset: int | None = None, subsets: int = 50, seed: int = 0
) -> Kernel:
    """Returns the kernel distance ("KID", arXiv:1801.01401): unbiased, so fit for few pictures.

    The squared maximum mean discrepancy under the kernel (x · y / F + 1)³, over random subsets. It
    may fall below 0 where the sets are alike.

    Args:
        real: (N, F).
        made: (M, F).
        subset: Features of each set in a subset; None: half of the smaller set, at most 1,000.
        subsets: How many.
        seed: Of the choice.

    Raises:
        DiffScalerError: As above, or a subset is larger than a set.
    """
    real, made = _checked(real, made, at_least=4)
    few = min(len(real), len(made))
    size = min(1000, few // 2) if subset is None else subset
    if not 2 <= size <= few or subsets < 1:
        raise DiffScalerError(f"{subsets} subsets of {size} cannot be drawn from {few} features")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        rows = [torch.randperm(len(s), generator=generator)[:size] for s in (real, made)]
        found.append(mean_discrepancy(real[rows[0]], made[rows[1]]))
    values = torch.tensor(found, dtype=torch.float64)
    return Kernel(float(values.mean()), float(values.std(unbiased=False)))


def mean_discrepancy(x: Tensor, y: Tensor) -> float:
    """Returns the unbiased MMD² of (N, F) and (M, F) (arXiv:0805.2368, Eq. 4), cubic kernel."""
    size = x.shape[1]

    def within(z: Tensor) -> Tensor:
        kernel = (z @ z.T / size + 1) ** 3
        return (kernel.sum() - kernel.trace()) / (len(z) * (len(z) - 1))

    return float(within(x) + within(y) - 2 * ((x @ y.T / size + 1) ** 3).mean())


@dataclass(frozen=True)
class Manifolds:
    """How two sets overlap, each taken as balls round its points, up to the k-th neighbour.

    Attributes:
        precision: Share of what was made that lies in a ball of the real: looks real.
        recall: Share of the real that lies in a ball of what was made: could be made.
        density: Mean number of real balls round what was made, over k; about 1 for equal sets, and,
            unlike precision, not raised by one outlier's large ball. May exceed 1.
        coverage: Share of real balls with something made in them: variety.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(real: Tensor, made: Tensor, k: int = 5) -> Manifolds:
    """Returns precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    Args:
        real: (N, F), N > k.
        made: (M, F), M > k.
        k: Which neighbour's distance is a ball's radius.

    Raises:
        DiffScalerError: As above.
    """
    if k < 1:
        raise DiffScalerError(f"k must be at least 1, got {k}")
    real, made = _checked(real, made, at_least=k + 1)
    radius, radius_made = _radii(real, k), _radii(made, k)
    balls = torch.zeros(len(made))  # real balls round each made one
    recalled, covered = 0, 0
    for rows, distances in _distances(real, made):
        inside = distances <= radius[rows, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distances <= radius_made).any(1).sum())
    return Manifolds(
        precision=float((balls > 0).double().mean()),
        recall=recalled / len(real),
        density=float(balls.double().mean() / k),
        coverage=covered / len(real),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    """Returns each point's distance to its k-th neighbour; the nearest is the point itself."""
    near = [distances.kthvalue(k + 1, 1).values for _, distances in _distances(points, points)]
    return torch.cat(near)


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (some rows of a, their distances to all of b)."""
    for start in range(0, len(a), _ROWS):
        rows = slice(start, min(start + _ROWS, len(a)))
        # By differences: by products, a point's distance to itself would not be 0.
        yield rows, torch.cdist(a[rows], b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(real: Tensor, made: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise DiffScalerError(
            f"features are (N, F) and (M, F), not {tuple(real.shape)} and {tuple(made.shape)}"
        )
    if min(len(real), len(made)) < at_least:
        raise DiffScalerError(
            f"at least {at_least} pictures on each side are needed, not {len(real)} real and "
            f"{len(made)} made"
        )
    if not bool(torch.isfinite(real).all() and torch.isfinite(made).all()):
        raise DiffScalerError("features hold NaN or Inf")
    return real.double(), made.double()
