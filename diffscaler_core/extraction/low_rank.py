"""One layer's change written as scale and identity subspace: tensors in, tensors out.

    W' ≈ (1 + a) ⊙ W + U D,    a_i = ⟨W_i, Δ_i⟩ / ⟨W_i, W_i⟩ the least squares of a row,  Δ = W' − W

Letters: m rows (C_out), n columns (C_in times the kernel), R rank, q singular values looked at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Up to this many rows or columns the singular values are computed exactly. Our choice.
EXACT = 512
#: Columns beyond the rank, and power iterations, of the randomised decomposition. Our choice; with
#: these the slowly falling spectra of fine-tuned weights come within a thousandth of the optimum.
_BEYOND, _ITERATIONS = 16, 3


class LowRank(NamedTuple):
    """What stands for one layer's change.

    Attributes:
        scale: a, (m,), or None.
        down: D, (R, n), or None.
        up: U, (m, R), or None.
        left: ‖Δ‖² that stays undone at each rank, (q + 1,); the rank above is one of them.
        error: ‖Δ − a ⊙ W − U D‖² of the tensors above.
    """

    scale: Tensor | None
    down: Tensor | None
    up: Tensor | None
    left: Tensor
    error: float


def row_scale(weight: Tensor, change: Tensor) -> Tensor:
    """Returns a, (m,), with the least ‖change − a ⊙ weight‖; 0 for rows of zeros.

    Args:
        weight: W, (m, n).
        change: Like W.
    """
    power = weight.square().sum(1)
    return torch.where(power > 0, (weight * change).sum(1) / power.clamp_min(_TINY), 0.0)


def truncated_svd(
    matrix: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first singular triples, U (m, q), S (q,), V (q, n) with q at most `count`.

    Randomised subspace iteration (arXiv:0909.4061, Alg. 4.4 and 5.1) for large matrices, exact for
    small ones. The same generator gives the same numbers on the same device.

    Args:
        matrix: (m, n), float32 or float64.
        count: How many are wanted.
        generator: Random source, on the CPU.
    """
    small = min(matrix.shape)
    width = min(small, count + _BEYOND)
    if small <= EXACT or 2 * width >= small:
        up, values, down = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
        basis = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(matrix.mT @ basis)[0]
            basis = torch.linalg.qr(matrix @ basis)[0]
        up, values, down = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        up = basis @ up
    return up[:, :count], values[:count], down[:count]


def fit_change(
    weight: Tensor,
    change: Tensor,
    rank: int,
    look: int,
    with_scale: bool,
    generator: torch.Generator,
) -> LowRank:
    """Returns scale and subspace that come near a layer's change.

    Tried are the scale first and the subspace for what it leaves, and the subspace first; the
    better is kept, its scale fitted once more to what the subspace leaves. (A LoRA's change needs
    no scale, a change of row lengths no subspace: each is found as what it is.)

    Args:
        weight: W, (m, n), float32 or float64.
        change: Δ, like W.
        rank: R; 0: no subspace.
        look: At how many singular values to look, at least R.
        with_scale: False: no scale.
        generator: Random source of the decompositions, on the CPU.
    """
    noise = _rounding(weight, change)
    nothing = min(weight.shape) * noise**2  # errors below are all the same: the smaller rank wins
    best: LowRank | None = None
    lefts = []
    scales = [row_scale(weight, change), None] if with_scale else [None]
    for scale in scales:
        rest = change if scale is None else change - scale[:, None] * weight
        if look:
            up, values, down = truncated_svd(rest, look, generator)
        else:
            up, values, down = rest.new_zeros(len(rest), 0), rest.new_zeros(0), rest[:0]
        # summed on the CPU, as not every device knows float64
        spent = torch.cat([torch.zeros(1).double(), values.cpu().double().square().cumsum(0)])
        lefts.append((squared(rest) - spent).clamp_min(0))
        kept = int((values[:rank] > noise).sum())  # units below hold nothing
        root = values[:kept].sqrt()
        up, down = up[:, :kept] * root, down[:kept] * root[:, None]
        rest = change - up @ down
        if with_scale:
            scale = row_scale(weight, rest)
            rest = rest - scale[:, None] * weight
        error = squared(rest)
        if best is None or (max(error, nothing), kept) < (max(best.error, nothing), _rank(best)):
            some = scale is not None and bool((scale.abs() > 64 * _eps(scale)).any())
            best = LowRank(scale if some else None, down, up, lefts[-1], error)
    assert best is not None
    return best._replace(left=torch.stack(lefts).amin(0))


def squared(tensor: Tensor) -> float:
    """Returns a tensor's squared norm."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


_TINY = 1e-30


def _rank(found: LowRank) -> int:
    return 0 if found.down is None else len(found.down)


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps


def _rounding(weight: Tensor, change: Tensor) -> float:
    """Returns about how large a singular value is that rounding W, W' and a decomposition makes."""
    m, n = weight.shape
    moved = squared(change)
    size = math.sqrt((squared(weight) + moved) / weight.numel())
    return _eps(weight) * (size * (math.sqrt(m) + math.sqrt(n)) + math.sqrt(max(m, n) * moved))
