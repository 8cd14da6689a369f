"""How a ComfyUI model mixes noise into pictures, as the trainer's `Objective`.

ComfyUI's samplers work with x = x0 + σ·ε (or, for a flow, the straight mix); the trainer with
x_t = α·x0 + σ·ε where α² + σ² = 1, or with the flow's mix. Both are one sample on different scales,
so that a task trained here and one trained in diffusers have learned from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling as host
import torch
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.training.objective import Objective, log_snr, spread

#: ComfyUI's class -> what the model says, the first that fits counts. EDM is v with the other sign.
_KINDS: tuple[tuple[str, str], ...] = (
    ("IMG_TO_IMG", ""),
    ("IMG_TO_IMG_FLOW", ""),
    ("X0", "x0"),
    ("EDM", "-v"),
    ("V_PREDICTION", "v"),
    ("V_PREDICTION_DDPM", "v"),
    ("EPS", "epsilon"),
    ("COSMOS_RFLOW", "flow"),
    ("CONST", "flow"),
)


@dataclass(frozen=True)
class Noise:
    """One model's way with noise.

    Attributes:
        objective: What the trainer is told.
        scale: The trainer's x0 is the model's latent times this.
        enter: (x_t (B, …), timestep (B,)) -> (x, sigma) as `apply_model` takes them.
        sign: The model's raw output times this is the objective's prediction.
    """

    objective: Objective
    scale: float
    enter: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    sign: float = 1.0


def noise_of(sampling: Any) -> Noise:
    """Returns the way of a model's `model_sampling`.

    Raises:
        DiffScalerError: It is no denoiser of pictures mixed with unit noise.
    """
    kind = next((k for name, k in _KINDS if isinstance(sampling, _class(name))), "")
    if not kind or getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise DiffScalerError(
            f"this model's sampling ({', '.join(c.__name__ for c in type(sampling).__bases__)}) "
            f"cannot be trained here; models of noise, of v, of x0 and flows can"
        )
    if kind == "flow":
        cosmos = isinstance(sampling, _class("COSMOS_RFLOW"))
        return Noise(Objective("flow", 1.0), 1.0, _enter_cosmos if cosmos else _enter_flow)
    return _diffusion(sampling, kind)


def starts_from_noise(sampling: Any) -> bool:
    """Says whether a model makes its pictures from noise, not from other pictures."""
    return not isinstance(sampling, (_class("IMG_TO_IMG"), _class("IMG_TO_IMG_FLOW")))


def is_mix(sampling: Any) -> bool:
    """Says how samplers hold samples: True (1 − σ)·x0 + σ·ε, False x0 + σ·ε.

    Cosmos is a flow whose samplers hold the latter.
    """
    return isinstance(sampling, host.CONST)


@dataclass(frozen=True, eq=False)
class UnitScale:
    """What takes samples of ComfyUI's samplers to the trainer's scale, where x = α·x0 + σ·ε.

    Attributes:
        kind: What of `objective.KINDS` keeps its scale there: "flow", or "v" of a diffusion.
        alpha: α, (B,).
        sigma: σ, (B,).
        grown: A sampler's x times this is the trainer's, (B,).
        data: The spread of the sampler's x0, where the trainer's is 1.
    """

    kind: str
    alpha: Tensor
    sigma: Tensor
    grown: Tensor
    data: float = 1.0


def unit_scale(sampling: Any, sigma: Tensor) -> UnitScale:
    """Returns the trainer's scale at noise levels (B,) as ComfyUI's samplers give them."""
    if is_mix(sampling):
        return UnitScale("flow", 1 - sigma, sigma, torch.ones_like(sigma))
    if isinstance(sampling, _class("COSMOS_RFLOW")):
        mixed = sigma / (1 + sigma)
        return UnitScale("flow", 1 - mixed, mixed, 1 - mixed)
    data = float(getattr(sampling, "sigma_data", 1.0))
    alpha = 1 / (1 + (sigma / data) ** 2).sqrt()
    return UnitScale("v", alpha, sigma / data * alpha, alpha / data, data)


def log_snr_of(sampling: Any, sigma: Tensor) -> Tensor:
    """Returns the log-SNR λ = 2 ln(α/σ) at noise levels as ComfyUI's samplers give them.

    Raises:
        DiffScalerError: It is no denoiser of pictures mixed with unit noise.
    """
    kind = next((k for name, k in _KINDS if isinstance(sampling, _class(name))), "")
    if not kind:
        raise DiffScalerError(
            f"cannot tell the noise level of this model's sampling "
            f"({', '.join(c.__name__ for c in type(sampling).__bases__)}), and a task here acts by "
            f"noise level"
        )
    unit = unit_scale(sampling, sigma.float())
    return log_snr(unit.alpha.clamp(min=0), unit.sigma)


def _enter_flow(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return x_t, t


def _enter_cosmos(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosmos' sigma is t / (1 − t), and its samples lie at x0 + sigma·ε."""
    sigma = t / (1 - t).clamp(min=1e-3)
    return x_t * spread(1 + sigma, x_t), sigma


def _diffusion(sampling: Any, kind: str) -> Noise:
    data = float(getattr(sampling, "sigma_data", 1.0))
    raw = isinstance(sampling, _class("V_PREDICTION_DDPM"))  # takes x_t as it is
    with torch.inference_mode(False):
        # .float() alone would hand an inference tensor on
        sigmas = torch.tensor(sampling.sigmas.cpu().tolist()) / data
    objective = Objective(kind.removeprefix("-"), alphas_cumprod=1 / (1 + sigmas**2))

    def enter(x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        sigma = sigmas.to(x_t.device)[step.long()]
        grown = x_t if raw else x_t * spread((sigma**2 + 1).sqrt() * data, x_t)
        return grown, sigma * data

    return Noise(objective, 1 / data, enter, -1.0 if kind[0] == "-" else 1.0)


def _class(name: str) -> Any:
    """Returns a class of ComfyUI's; older and newer versions may lack one."""
    return getattr(host, name, ())
