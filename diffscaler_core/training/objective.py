"""What a denoiser is trained to say. Pure functions on tensors; knows no model.

One parameterisation for all: a noisy sample is x_t = α·x0 + σ·ε, and every kind of prediction is
p = c·x0 + d·ε with its own (c, d). Training targets and conversions between kinds follow from these
two lines, so that no formula is written twice.

Shapes: B batch; samples (B, …); t, α, σ (B,) or scalars broadcast against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import unknown
from .config import TIMESTEPS, WEIGHTINGS

#: Kind -> (c, d) of p = c·x0 + d·ε, as functions of (α, σ).
#: x0, epsilon: DDPM (arXiv:2006.11239), Eq. 15 and 14. v: arXiv:2202.00512, Appendix D.
#: flow: rectified flow as in SD3 (arXiv:2403.03206), Eq. 13; flow_reversed is its negative.
KINDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]]] = {
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
    "flow_reversed": lambda alpha, sigma: (1.0, -1.0),
}


def combine(kind: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns what a model of that kind is to predict, shaped like x0."""
    c, d = _coefficients(kind, spread(alpha, x0), spread(sigma, x0))
    return c * x0 + d * noise


def separate(
    kind: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (x0, ε) from a prediction: the two lines of the module docstring, solved.

    Where a kind says nothing about one of them (x0 at σ = 0, ε at α = 0), that one is not finite.
    """
    alpha, sigma = spread(alpha, x_t), spread(sigma, x_t)
    c, d = _coefficients(kind, alpha, sigma)
    determinant = alpha * d - sigma * c
    x0 = (d * x_t - sigma * prediction) / determinant
    noise = (alpha * prediction - c * x_t) / determinant
    return x0, noise


def convert(
    prediction: Tensor, old: str, new: str, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Returns a prediction of kind `old` as one of kind `new`."""
    x0, noise = separate(old, prediction, x_t, alpha, sigma)
    return combine(new, x0, noise, alpha, sigma)


@dataclass(frozen=True)
class Objective:
    """What one base predicts, and how its clock runs.

    Attributes:
        kind: A name in KINDS.
        timestep_scale: For flow: the model's timestep at full noise (at no noise, if reversed).
        alphas_cumprod: ᾱ of a DDPM scheduler, (T,); None for flow.
        learned_sigma: True: the second half of the output channels is a variance (Improved DDPM,
            arXiv:2102.09672); training uses the first half only and leaves the variance as it is.
    """

    kind: str
    timestep_scale: float = 1000.0
    alphas_cumprod: Tensor | None = None
    learned_sigma: bool = False

    def __post_init__(self) -> None:
        """Refuses a kind nobody knows."""
        if self.kind not in KINDS:
            raise unknown("objective", self.kind, KINDS)

    @property
    def is_flow(self) -> bool:
        """True: noise and data are mixed on a straight line; False: by a DDPM schedule."""
        return self.alphas_cumprod is None

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (timestep for the model, α, σ), each (B,), for times t (B,) in 0..1.

        Flow: α = 1 − t, σ = t (arXiv:2403.03206, Eq. 13). DDPM: α = √ᾱ, σ = √(1 − ᾱ)
        (arXiv:2006.11239, Eq. 4) at the integer step ⌊t·T⌋, at most T − 1.
        """
        if self.alphas_cumprod is None:
            clock = 1 - t if self.kind == "flow_reversed" else t
            return clock * self.timestep_scale, 1 - t, t
        table = self.alphas_cumprod.to(t.device, torch.float32)
        step = (t * len(table)).long().clamp(max=len(table) - 1)
        return step, table[step].sqrt(), (1 - table[step]).sqrt()

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (timestep, x_t) for clean samples, noise, and times t (B,) in 0..1."""
        timestep, alpha, sigma = self.at(t)
        return timestep, spread(alpha, x0) * x0 + spread(sigma, x0) * noise

    def mean(self, output: Tensor) -> Tensor:
        """Returns the part of the model's output that is the prediction, (B, C, …)."""
        return output.chunk(2, dim=1)[0] if self.learned_sigma else output

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor, weighting: str = "none"
    ) -> Tensor:
        """Returns the weighted mean squared error per sample, (B,), in float32."""
        _, alpha, sigma = self.at(t)
        target = combine(self.kind, x0, noise, alpha, sigma)
        error = F.mse_loss(self.mean(output).float(), target.float(), reduction="none")
        return error.flatten(1).mean(1) * loss_weights(weighting, self.kind, alpha, sigma)


def draw_times(
    count: int,
    scheme: str = "logit_normal",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    uniform_share: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns times in 0..1 (1 is pure noise), (count,), drawn on the CPU.

    logit_normal: sigmoid of a normal (arXiv:2403.03206, Eq. 19). shift: t' = s·t / (1 + (s − 1)·t)
    (same, Eq. 23).

    Args:
        count: How many.
        scheme: "uniform" or "logit_normal".
        mean: Of the normal; positive leans to noise.
        std: Of the normal.
        shift: s; 1 changes nothing, more leans to noise.
        uniform_share: Share of times drawn uniformly all the same, so that no time is left out.
        generator: Random source.
    """
    if scheme not in TIMESTEPS:
        raise unknown("timestep scheme", scheme, TIMESTEPS)
    t = torch.rand(count, generator=generator)
    if scheme == "logit_normal":
        logits = torch.randn(count, generator=generator) * std + mean
        t = torch.where(torch.rand(count, generator=generator) < uniform_share, t, logits.sigmoid())
    return shifted(t, shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Returns times moved towards noise: s·t / (1 + (s − 1)·t) (arXiv:2403.03206, Eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def loss_weights(
    scheme: str, kind: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0
) -> Tensor:
    """Returns one loss weight per sample, (B,).

    min_snr: min(SNR, γ) in x0's metric, divided by SNR for epsilon, by SNR + 1 for v
    (arXiv:2303.09556, Sec. 3.4). cosmap: 2 / (π (1 − 2t + 2t²)) (arXiv:2403.03206, Eq. 21).

    Raises:
        UnknownNameError: No such scheme, or min_snr with a flow.
    """
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if scheme != "min_snr":
        raise unknown("weighting", scheme, WEIGHTINGS)
    if kind not in ("epsilon", "v", "x0"):
        raise unknown(f"weighting for {kind}:", scheme, ("none", "cosmap"))
    if kind == "v":  # SNR + 1 = 1 / σ² where α² + σ² = 1
        return torch.minimum(alpha**2, gamma * sigma**2)
    if kind == "epsilon":
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)
    return (alpha**2 / sigma**2).clamp(max=gamma)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Returns values (B,) or scalar shaped to broadcast against `like` (B, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1)) if values.ndim else values


def _coefficients(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
    if kind not in KINDS:
        raise unknown("objective", kind, KINDS)
    return KINDS[kind](alpha, sigma)
