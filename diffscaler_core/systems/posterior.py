"""How experts are mixed: the equation, and which of them count. Pure tensors; knows no model.

"Decentralized Diffusion Models" (arXiv:2501.05450): with the data cut into parts S_k, the field of
all data is the experts' fields, weighted by how likely x_t came from each part,

    u_t(x) = Σ_k p(k | x_t = x, t) v_k(x, t)
    p(k | x, t) = |S_k| p_t(x | S_k) / Σ_j |S_j| p_t(x | S_j)

exactly, for whatever is predicted by a mean: ε, v, x0 or a flow. Of the posterior the paper keeps
all, the largest (which does best there, at one model's cost), the two largest, or a nucleus.

Shapes: B rows, K parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import unknown

#: Probability that a nucleus holds.
NUCLEUS = 0.9


def exact_posterior(
    x_t: Tensor, parts: Sequence[Tensor], alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """Returns p(k | x_t, t), (B, K), where the parts are few enough to be summed over.

    Args:
        x_t: (B, …).
        parts: Each part's clean samples, (N_k, …).
        alpha: α of that time.
        sigma: σ, above 0.
    """
    flat = x_t.flatten(1)
    logs = [
        torch.logsumexp(-torch.cdist(flat, alpha * own.flatten(1)).square() / (2 * sigma**2), 1)
        for own in parts
    ]
    return torch.stack(logs, 1).softmax(1)


def _largest(posterior: Tensor, count: int) -> Tensor:
    best = posterior.topk(min(count, posterior.shape[1]), dim=1).indices
    return posterior * torch.zeros_like(posterior).scatter_(1, best, 1.0)


def _nucleus(posterior: Tensor) -> Tensor:
    ordered, places = posterior.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered  # the first is always kept
    kept = ordered * (before < NUCLEUS)
    return torch.zeros_like(posterior).scatter_(1, places, kept)


#: Mode -> what it keeps of a posterior (B, K), before it is scaled to sum to 1 again.
MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "top1": lambda posterior: _largest(posterior, 1),
    "top2": lambda posterior: _largest(posterior, 2),
    "full": lambda posterior: posterior,
    "nucleus": _nucleus,
}


def weights_of(posterior: Tensor, mode: str = "top1") -> Tensor:
    """Returns how much each expert counts in each row, (B, K), rows summing to 1.

    Args:
        posterior: p(k | x_t, t), (B, K).
        mode: A name in MODES.

    Raises:
        UnknownNameError: No such mode.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    kept = MODES[mode](posterior)
    return kept / kept.sum(1, keepdim=True)


def mixed(predictions: Tensor, weights: Tensor) -> Tensor:
    """Returns Σ_k w_k v_k, (B, …).

    Args:
        predictions: v_k(x_t, t), (K, B, …).
        weights: (B, K).
    """
    by_part = weights.T.to(predictions)
    return (predictions * by_part.reshape(*by_part.shape, *[1] * (predictions.ndim - 2))).sum(0)
