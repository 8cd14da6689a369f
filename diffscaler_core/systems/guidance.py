"""Sampling led by differentiable losses, in all of a picture or a part of it. Knows no host.

At each step the losses look at the predicted clean picture, and the prediction is moved down their
gradient. The mechanism is that of guided latent sampling as in LDFaceNet (arXiv:2408.02078) and
the classifier guidance before it (arXiv:2105.05233, Eq. 14), without anything about faces:

    ε' = ε + σ·ρ_t·∇L,    ρ_t = ρ·|F| / |∇L|   per picture,

with F the base's prediction. Ours: the step is taken on the velocity (v, or a flow's own), which is
finite at every noise, also where α = 0 and a step on ε would change x0 without bound:

    u' = u + κ,  x0' = x0 − σ·κ,  ε' = ε + α·κ,    κ = ρ·σ·|u|·∇L / |∇L|

which leaves x_t = α·x0 + σ·ε what it is. ρ is thus the share of the prediction that guidance may
change, at full noise; the change of x0 falls as σ².

∇L is taken at x_t, through the base (exact; about three times the time of a step), or at the
predicted x0, as if the base's prediction moved along with x_t (cheap).

Shapes: B batch; latents (B, C, h, w); losses (B,).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..training.denoiser import Condition, Denoiser
from ..training.objective import combine, spread
from ..training.preview import predicted, sampling_times
from .guidance_losses import GuidanceLoss, total

#: Latents (B, C, …) -> losses (B,), differentiable.
Criterion = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Guide:
    """How losses lead sampling.

    Attributes:
        losses: What pictures are led to.
        rho: ρ of the module docstring; 0: plain sampling, to the bit.
        exact: True: the gradient goes through the base; False: it is taken at the predicted x0.
        start: Guidance begins at this time, 0..1; 1 is pure noise.
        end: It ends below this time.
    """

    losses: Sequence[GuidanceLoss]
    rho: float = 0.2
    exact: bool = False
    start: float = 1.0
    end: float = 0.0

    def acts(self, time: float) -> bool:
        """Says whether anything is done at a time."""
        return bool(self.losses) and self.rho != 0 and self.end <= time <= self.start


def direction(gradient: Tensor) -> Tensor:
    """Returns ∇L / |∇L| per row; 0 where there is none. Raises where it is not finite."""
    if not bool(torch.isfinite(gradient).all()):
        raise DiffScalerError("a guidance loss has a gradient that is not finite")
    rows = gradient.float().flatten(1)
    length = rows.norm(dim=1, keepdim=True)
    unit: Tensor = rows / length.clamp(min=1e-30)
    return unit.view_as(gradient)


def push(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, gradient: Tensor, rho: float, kind: str
) -> tuple[Tensor, Tensor]:
    """Returns (x0', ε') of the module docstring; α·x0' + σ·ε' is what it was.

    Args:
        x0: Predicted clean samples, (B, C, …).
        noise: Predicted noise.
        alpha: α, (B,).
        sigma: σ, (B,).
        gradient: ∇L, like x0.
        rho: ρ.
        kind: "v" or "flow": how the base mixes noise.
    """
    u = combine(kind, x0, noise, alpha, sigma)
    a, s = spread(alpha, x0), spread(sigma, x0)
    length = spread(u.float().flatten(1).norm(dim=1), x0)
    kappa = rho * s * length * direction(gradient)
    return x0 - s * kappa, noise + a * kappa


def gradient_at(criterion: Criterion, x0: Tensor) -> Tensor:
    """Returns ∇L at the predicted clean samples, like x0."""
    with torch.enable_grad():
        leaf = x0.detach().requires_grad_()
        (found,) = torch.autograd.grad(criterion(leaf).sum(), leaf, allow_unused=True)
    return torch.zeros_like(x0) if found is None else found


def gradient_through(
    criterion: Criterion, predict: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ∇L at noisy samples, through the prediction, and (x0, ε) there."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        x0, noise = predict(leaf)
        (found,) = torch.autograd.grad(criterion(x0).sum(), leaf, allow_unused=True)
    gradient = torch.zeros_like(x) if found is None else found
    return gradient, x0.detach(), noise.detach()


@torch.no_grad()
def sample_guided(
    denoiser: Denoiser,
    guide: Guide,
    condition: Condition,
    null: Condition,
    noise: Tensor,
    *,
    steps: int = 20,
    guidance: float = 3.5,
    shift: float = 3.0,
    source: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Returns clean latents shaped like `noise`, led by losses; else as `sample_latents`.

    With a mask, only the part under it is drawn: around it, at each step, lies the source with this
    step's noise, and at the end the source itself.

    Args:
        denoiser: The base, held still; tasks attached to it take part.
        guide: The losses, and how they lead.
        condition: One row per sample.
        null: The null prompt.
        noise: Standard normal.
        steps: Predictions.
        guidance: Classifier-free guidance, beside this one.
        shift: Of a flow's times.
        source: Latents of a picture to start from, or to keep outside the mask.
        mask: Where it may change, to be broadcast against the latents, 0..1.
        strength: The time to start from, 0..1; below 1 from the source with noise.

    Raises:
        DiffScalerError: A mask or a strength without a source, or a loss that fails.
    """
    if source is None and (mask is not None or strength < 1):
        raise DiffScalerError("a mask, or a strength below 1, needs a source picture")
    objective, noise = denoiser.objective, noise.to(denoiser.device)
    kept = None if source is None else source.to(noise)
    where = None if mask is None else mask.to(noise)
    kind = "flow" if objective.is_flow else "v"

    def criterion(x0: Tensor) -> Tensor:
        return total(guide.losses, x0, denoiser.decode or (lambda latents: latents))

    times = sampling_times(objective, steps, shift, noise.device, strength)
    _, alpha, sigma = objective.at(times[0].expand(len(noise)))
    x = noise
    if kept is not None and strength < 1:
        x = spread(alpha, x) * kept + spread(sigma, x) * noise
    for now, after in itertools.pairwise(times):
        _, alpha, sigma = objective.at(now.expand(len(x)))
        if kept is not None and where is not None:
            around = spread(alpha, x) * kept + spread(sigma, x) * noise
            x = where * x + (1 - where) * around

        def predict(x: Tensor, now: Tensor = now) -> tuple[Tensor, Tensor]:
            return predicted(denoiser, x, now, condition, null, guidance)

        if not guide.acts(float(now)):
            x0, eps = predict(x)
        else:
            if guide.exact:
                gradient, x0, eps = gradient_through(criterion, predict, x)
            else:
                x0, eps = predict(x)
                gradient = gradient_at(criterion, x0)
            if where is not None:
                gradient = where * gradient
            x0, eps = push(x0, eps, alpha, sigma, gradient, guide.rho, kind)
        if after == 0:
            break
        _, alpha, sigma = objective.at(after.expand(len(x)))
        x = spread(alpha, x) * x0 + spread(sigma, x) * eps
    return x0 if kept is None or where is None else where * x0 + (1 - where) * kept
