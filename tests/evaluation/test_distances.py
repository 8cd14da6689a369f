"""Closed forms, the same sums written differently, and what must not change them."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffscaler_core import DiffScalerError
from diffscaler_core.evaluation import (
    frechet_distance,
    frechet_of_gaussians,
    kernel_distance,
    manifolds,
)
from diffscaler_core.evaluation.distances import covariance, mean_discrepancy


def normal(count, size, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * scale + shift


def random_covariance(size, rank, seed):
    root = normal(size, rank, seed)
    return root @ root.T


def rotation(size, seed):
    return torch.linalg.qr(normal(size, size, seed))[0]


def test_frechet_of_gaussians_in_one_dimension():
    one = torch.ones(1, 1, dtype=torch.float64)
    found = frechet_of_gaussians(one[0] * 3, one * 4, one[0], one * 25)
    assert found == pytest.approx((3 - 1) ** 2 + (2 - 5) ** 2)


def test_frechet_of_commuting_covariances_is_that_of_their_axes():
    turn = rotation(6, 1)
    a, b = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    means = normal(2, 6, 3)
    found = frechet_of_gaussians(
        means[0], turn @ a.diag() @ turn.T, means[1], turn @ b.diag() @ turn.T
    )
    expected = (means[0] - means[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_frechet_of_any_covariances_is_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(3):
        a, b = random_covariance(7, 9, seed), random_covariance(7, 12, seed + 10)
        mean, other = normal(2, 7, seed + 20)
        root = linalg.sqrtm(a.numpy() @ b.numpy())
        expected = np.trace(a.numpy() + b.numpy() - 2 * root.real)
        expected += float((mean - other).square().sum())
        assert frechet_of_gaussians(mean, a, other, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("real", "made"), [(40, 30), (5, 30), (4, 3)])
def test_frechet_with_singular_covariances_is_a_nuclear_norm(real, made):
    # With centred rows A and B, tr (C^½ C₂ C^½)^½ is the sum of singular values of A Bᵀ.
    x, y = normal(real, 12, 1), normal(made, 12, 2, 1.7, 0.3)
    a = (x - x.mean(0)) / math.sqrt(real - 1)
    b = (y - y.mean(0)) / math.sqrt(made - 1)
    shared = np.linalg.svd((a @ b.T).numpy(), compute_uv=False).sum()
    spread = a.square().sum() + b.square().sum()
    expected = float((x.mean(0) - y.mean(0)).square().sum() + spread) - 2 * shared
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_covariance_is_numpys():
    x = normal(20, 5, 4)
    np.testing.assert_allclose(covariance(x), np.cov(x.numpy().T), rtol=1e-12)


def test_frechet_of_large_samples_is_that_of_their_gaussians():
    # N(0, 1) against N(½, 4) in 3 dimensions: 3 · ¼ + 3 · (1 − 2)²
    found = frechet_distance(normal(200_000, 3, 1), normal(200_000, 3, 2, 2.0, 0.5))
    assert found == pytest.approx(3.75, rel=0.02)


@pytest.mark.parametrize("distance", [frechet_distance, lambda a, b: kernel_distance(a, b).mean])
def test_more_of_the_same_is_nearer_than_something_else(distance):
    a, again, other = normal(300, 8, 1), normal(300, 8, 2), normal(300, 8, 3, 1.0, 1.0)
    assert distance(a, again) < 0.2 * distance(a, other)


def test_equal_sets_are_no_distance_apart():
    x = normal(50, 9, 5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    few = normal(4, 9, 5)  # singular
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    same = manifolds(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


def test_nothing_depends_on_the_order_or_on_the_axes():
    x, y, turn = normal(60, 8, 1), normal(70, 8, 2, 1.5, 0.4), rotation(8, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(4))
    for a, b in ((x[order], y), (x @ turn, y @ turn), (x + 5, y + 5)):
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(x, y), rel=1e-9)
        assert manifolds(a, b) == manifolds(x, y)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    # The kernel knows the origin, so only turning leaves it as it is.
    assert mean_discrepancy(x @ turn, y @ turn) == pytest.approx(mean_discrepancy(x, y), rel=1e-9)
    assert mean_discrepancy(x[order], y) == pytest.approx(mean_discrepancy(x, y), rel=1e-9)


def test_features_may_have_any_precision():
    x, y = normal(60, 8, 1), normal(70, 8, 2, 1.5)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(frechet_distance(x, y), rel=1e-5)


def test_kernel_distance_is_its_sums_written_out():
    x, y = normal(6, 3, 1), normal(5, 3, 2, 1.0, 0.5)

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    within = [
        sum(k(z[i], z[j]) for i, j in itertools.permutations(range(len(z)), 2))
        / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    across = sum(k(a, b) for a in x for b in y) / 30
    assert mean_discrepancy(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased():
    # Means of 400 sets of 8: of one distribution they scatter round 0, as a biased one would not.
    found = [mean_discrepancy(normal(8, 4, 2 * i), normal(8, 4, 2 * i + 1)) for i in range(400)]
    values = torch.tensor(found)
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(len(found))


def test_kernel_distance_of_whole_sets_has_no_spread_and_a_seed_fixes_the_subsets():
    x, y = normal(40, 4, 1), normal(40, 4, 2, 1.0, 0.5)
    whole = kernel_distance(x, y, subset=40, subsets=3)
    assert whole.mean == pytest.approx(mean_discrepancy(x, y), rel=1e-12)
    assert whole.spread == pytest.approx(0, abs=1e-12)
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1)
    assert kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)
    assert kernel_distance(x, y).spread > 0


def by_loops(real, made, k):
    """Precision, recall, density, coverage, point by point."""

    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    radii, radii_made = ([radius(s, i) for i in range(len(s))] for s in (real, made))
    inside = [[math.dist(r, m) <= radii[i] for m in made] for i, r in enumerate(real)]
    precision = sum(any(row[j] for row in inside) for j in range(len(made))) / len(made)
    recall = sum(
        any(math.dist(r, m) <= radii_made[j] for j, m in enumerate(made)) for r in real
    ) / len(real)
    density = sum(map(sum, inside)) / (k * len(made))
    return precision, recall, density, sum(map(any, inside)) / len(real)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_manifolds_are_what_loops_say(k):
    real, made = normal(40, 3, k), normal(30, 3, k + 50, 1.3, 0.4)
    found = manifolds(real, made, k)
    expected = by_loops(real.tolist(), made.tolist(), k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected)
    assert 0 < found.precision < 1


def test_manifolds_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    made = torch.tensor([[0.5], [10.0], [11.0]])
    found = manifolds(real, made, k=1)  # balls of radius 1 round the real ones
    assert found.precision == pytest.approx(1 / 3)
    assert found.density == pytest.approx(2 / 3)  # 0.5 lies in the balls of 0 and of 1
    assert found.coverage == pytest.approx(2 / 4)
    assert found.recall == 1  # 0.5's neighbour is 9.5 away: the outlier's ball holds all


def test_one_outlier_fools_precision_but_hardly_density():
    real, far = normal(200, 4, 1), normal(100, 4, 2, 1.0, 30.0)
    outlier = torch.full((1, 4), 25.0, dtype=torch.float64)
    fooled = manifolds(torch.cat([real, outlier]), far)
    assert manifolds(real, far).precision == 0
    assert fooled.precision > 0.9
    assert fooled.density <= 1 / 5


def test_a_generator_of_one_picture_is_precise_but_covers_nothing():
    real = normal(200, 4, 1)
    stuck = real[:1] + normal(200, 4, 2) * 1e-3
    found = manifolds(real, stuck)
    assert found.precision > 0.95
    assert found.recall < 0.05
    assert found.coverage < 0.1


def test_distances_by_parts_are_the_same(monkeypatch):
    real, made = normal(50, 4, 1), normal(60, 4, 2)
    whole = manifolds(real, made)
    monkeypatch.setattr("diffscaler_core.evaluation.distances._ROWS", 7)
    assert manifolds(real, made) == whole


@pytest.mark.parametrize(
    ("real", "made", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), r"\(5, 3\) and \(5, 4\)"),
        (torch.zeros(5), torch.zeros(5), r"\(5,\)"),
        (torch.zeros(1, 3), torch.zeros(5, 3), "1 real and 5 made"),
        (torch.full((9, 3), math.nan), torch.zeros(9, 3), "NaN"),
    ],
)
@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, manifolds])
def test_what_cannot_be_measured_is_refused(measure, real, made, message):
    with pytest.raises(DiffScalerError, match=message):
        measure(real, made)


def test_too_large_subsets_and_no_neighbours_are_refused():
    x = normal(9, 3, 1)
    with pytest.raises(DiffScalerError, match="50 subsets of 10 cannot be drawn from 9"):
        kernel_distance(x, x, subset=10)
    with pytest.raises(DiffScalerError, match="k must be at least 1"):
        manifolds(x, x, k=0)
