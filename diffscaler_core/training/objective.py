"""What a denoiser is trained to say. Pure functions on tensors; knows no model.

One parameterisation for all: a noisy sample is x_t = α·x0 + σ·ε, and every kind of prediction is
p = c·x0 + d·ε with its own (c, d). Training targets and conversions between kinds follow from these
two lines, so that no formula is written twice.

Clocks: t in 0..1, where 1 is pure noise; the model's own timestep (`Objective.at`); and log-SNR,
λ = 2 ln(α/σ), which means the same on every base and is what ranges of noise are given in.

Shapes: B batch; samples (B, …); t, α, σ, λ (B,) or scalars broadcast against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import unknown
from ..windows import even_edges
from .config import TIMESTEPS, WEIGHTINGS
from .progress import BANDS

#: Kind -> (c, d) of p = c·x0 + d·ε, as functions of (α, σ).
#: x0, epsilon: DDPM (arXiv:2006.11239). v: progressive distillation (arXiv:2202.00512).
#: flow: rectified flow as in SD3 (arXiv:2403.03206); flow_reversed is its negative.
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

    Finite at both ends for v and the flows. Not finite: x0 from epsilon at α = 0 (pure noise says
    nothing of the data), and ε from x0 at σ = 0 (clean data says nothing of the noise).
    """
    alpha, sigma = spread(alpha, x_t), spread(sigma, x_t)
    c, d = _coefficients(kind, alpha, sigma)
    determinant = alpha * d - sigma * c
    # What is predicted outright is taken as it is: the solution would be 0/0 at that kind's end.
    x0 = prediction if kind == "x0" else (d * x_t - sigma * prediction) / determinant
    noise = prediction if kind == "epsilon" else (alpha * prediction - c * x_t) / determinant
    return x0, noise


def log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns λ = 2 ln(α/σ): falls with noise; +∞ for clean data, −∞ for pure noise."""
    return 2 * (alpha.log() - sigma.log())


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

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns the times t in 0..1 at which λ has these values: `at`, backwards.

        Flow: λ = 2 ln((1 − t)/t), so t = sigmoid(−λ/2), exactly. DDPM: the middle of a step's span
        for that step's λ, straight lines in the angle atan(σ/α) between steps, and the middle of
        the first or last step's span beyond them.
        """
        if self.alphas_cumprod is None:
            return torch.sigmoid(-log_snr / 2)
        table = self.alphas_cumprod.to(log_snr.device, log_snr.dtype)
        # The angle rises with noise and stays finite where λ does not (zero terminal SNR).
        angles = torch.atan2((1 - table).sqrt(), table.sqrt())
        angle = torch.atan(torch.exp(-log_snr / 2)).clamp(angles[0], angles[-1])
        right = torch.searchsorted(angles, angle).clamp(1, len(angles) - 1)
        low, high = angles[right - 1], angles[right]
        return (right - 1 + (angle - low) / (high - low) + 0.5) / len(angles)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (timestep for the model, α, σ), each (B,), for times t (B,) in 0..1.

        Flow: α = 1 − t, σ = t (arXiv:2403.03206). DDPM: α = √ᾱ, σ = √(1 − ᾱ) (arXiv:2006.11239)
        at the integer step ⌊t·T⌋, at most T − 1.
        """
        if self.alphas_cumprod is None:
            clock = 1 - t if self.kind == "flow_reversed" else t
            return clock * self.timestep_scale, 1 - t, t
        table = self.alphas_cumprod.to(t.device, torch.float32)
        step = (t * len(table)).long().clamp(max=len(table) - 1)
        return step, table[step].sqrt(), (1 - table[step]).sqrt()

    def levels_of(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (α, σ), each (B,), at the model's timesteps (B,), as `at` gives them."""
        if self.alphas_cumprod is None:
            clock = timestep.float() / self.timestep_scale
            t = 1 - clock if self.kind == "flow_reversed" else clock
            return 1 - t, t
        table = self.alphas_cumprod.to(timestep.device, torch.float32)[timestep.long()]
        return table.sqrt(), (1 - table).sqrt()

    def log_snr_of(self, timestep: Tensor) -> Tensor:
        """Returns λ (B,) at the model's timesteps (B,), as `at` gives them."""
        alpha, sigma = self.levels_of(timestep)
        return log_snr(alpha.clamp(min=0), sigma.clamp(min=0))

    def range_edges(self, count: int) -> tuple[float, ...]:
        """Returns the edges, in λ, of N ranges of noise that are equally long in t; falling.

        Those of a DDPM lie half-way between two steps, so that every step is clear of them.
        """
        if self.alphas_cumprod is None:
            return even_edges(count)
        table = self.alphas_cumprod.double().cpu()
        levels = table.log() - (1 - table).log()
        steps = [max(1, i * len(table) // count) for i in range(1, count)]
        return tuple(round(float(levels[step - 1] + levels[step]) / 2, 6) for step in steps)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (timestep, x_t) for clean samples, noise, and times t (B,) in 0..1."""
        timestep, alpha, sigma = self.at(t)
        return timestep, spread(alpha, x0) * x0 + spread(sigma, x0) * noise

    def mean(self, output: Tensor) -> Tensor:
        """Returns the part of the model's output that is the prediction, (B, C, …)."""
        return output.chunk(2, dim=1)[0] if self.learned_sigma else output

    def loss(
        self,
        output: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        weighting: str = "none",
        *,
        gamma: float = 5.0,
        tau: float = 1.0,
    ) -> Tensor:
        """Returns the weighted mean squared error per sample, (B,), in float32."""
        _, alpha, sigma = self.at(t)
        target = combine(self.kind, x0, noise, alpha, sigma)
        error = F.mse_loss(self.mean(output).float(), target.float(), reduction="none")
        return error.flatten(1).mean(1) * self.weights(t, weighting, gamma=gamma, tau=tau).float()

    def weights(
        self,
        t: Tensor,
        weighting: str = "none",
        *,
        gamma: float = 5.0,
        tau: float = 1.0,
        retain: bool = False,
    ) -> Tensor:
        """Returns `loss_weights` at times t (B,), or for pictures to be retained."""
        _, alpha, sigma = self.at(t)
        return loss_weights(weighting, self.kind, alpha, sigma, gamma, t=t, tau=tau, retain=retain)


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

    logit_normal: sigmoid of a normal (arXiv:2403.03206, "logit-normal sampling"). shift: see
    `shifted`.

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
    """Returns times moved towards noise: s·t / (1 + (s − 1)·t).

    arXiv:2403.03206, "resolution-dependent shifting of timestep schedules".
    """
    return shift * t / (1 + (shift - 1) * t)


def shift_for(
    tokens: int,
    *,
    small: tuple[int, float] = (256, 0.5),
    large: tuple[int, float] = (4096, 1.15),
) -> float:
    """Returns the shift of a picture of so many tokens: more pixels need more noise.

    s = exp(μ), where μ runs on a straight line through two (tokens, μ); the defaults are FLUX.1's.
    This is diffusers' `calculate_shift` with the exponential `time_shift` of its
    FlowMatchEulerDiscreteScheduler, which the Flux, Qwen-Image and Lumina 2 pipelines sample with.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return math.exp(small[1] + slope * (tokens - small[0]))


def loss_weights(
    scheme: str,
    kind: str,
    alpha: Tensor,
    sigma: Tensor,
    gamma: float = 5.0,
    *,
    t: Tensor | None = None,
    tau: float = 1.0,
    retain: bool = False,
) -> Tensor:
    """Returns one loss weight per sample, (B,).

    cosmap: 2 / (π (1 − 2σ + 2σ²)) (arXiv:2403.03206, "CosMap"). chain: see `chain_weights`.

    min_snr: min(SNR, γ) on the error of x0 (arXiv:2303.09556), as weight on the error of what the
    base predicts. For epsilon and v that is the paper's: divided by SNR, by SNR + 1. The same step
    for a flow is ours: x0 = x_t − t·u, so an error in u is one of t times its size in x0, and the
    weight is t²·min(SNR, γ) with SNR = (1 − t)²/t².

    Args:
        scheme: A name in WEIGHTINGS.
        kind: A name in KINDS.
        alpha: α, (B,).
        sigma: σ, (B,).
        gamma: For min_snr: γ.
        t: For chain: times, (B,); None: σ, which is a flow's time.
        tau: For chain: τ.
        retain: For chain: True: these are pictures to be retained, not adapted to.

    Raises:
        UnknownNameError: No such scheme.
    """
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if scheme == "chain":
        return chain_weights(sigma if t is None else t, tau)[int(retain)]
    if scheme != "min_snr":
        raise unknown("weighting", scheme, WEIGHTINGS)
    if kind == "epsilon":
        return (gamma * sigma**2 / alpha**2).clamp(max=1.0)
    if kind == "x0":
        return (alpha**2 / sigma**2).clamp(max=gamma)
    # v: SNR + 1 = 1 / σ², where α² + σ² = 1. Flows: σ² · min(SNR, γ). The same in α and σ.
    return torch.minimum(alpha**2, gamma * sigma**2)


def chain_weights(t: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns loss weights (to adapt, to retain), each (B,): (1 + τ)·t^τ and (1 + τ)·(1 − t)^τ.

    Diff-Tuning (arXiv:2406.00773): what a base knows of nearly clean pictures serves every task,
    what it knows of noise must give way; so a task's pictures count the more the noisier they are,
    and pictures sampled from the base itself, which keep it from forgetting, the less. Theirs
    (train.py of thuml/Diffusion-Tuning): times of the task's pictures drawn in proportion to t^τ,
    those of the base's own to (1 − t)^τ, which are a fifth of the batch and weigh 0.1, with τ = 1.
    Ours: the same densities as weights, of mean 1 over all times. With times drawn uniformly the
    gradient is the same on average; with others, both act. τ = 0 weighs all times alike.
    """
    return (1 + tau) * t**tau, (1 + tau) * (1 - t) ** tau


def noise_band(t: Tensor) -> Tensor:
    """Returns which of progress.BANDS each time lies in, (B,) of int64; t = 1 is in the last."""
    return torch.stack([t >= edge for edge in BANDS[1:-1]]).sum(0)


def band_means(losses: Tensor, t: Tensor) -> Tensor:
    """Returns the mean loss per noise band, (len(BANDS) − 1,), NaN where no time fell.

    Nothing is read back from the device.
    """
    bands = torch.arange(len(BANDS) - 1, device=t.device)
    inside = (noise_band(t).unsqueeze(1) == bands).to(losses.dtype)
    return (losses.detach() @ inside) / inside.sum(0)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Returns values (B,) or scalar shaped to broadcast against `like` (B, …)."""
    return values.view(-1, *(1,) * (like.ndim - 1)) if values.ndim else values


def _coefficients(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
    if kind not in KINDS:
        raise unknown("objective", kind, KINDS)
    return KINDS[kind](alpha, sigma)
