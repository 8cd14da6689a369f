"""Which parameters move how fast: optimisers, learning rates and their schedules, running mean."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiffScalerError
from ..task import CONTROL
from .config import TrainingConfig

Groups = list[dict[str, Any]]

#: Before the names of parameters that are no task's (see `baselines.py`); they move at `lr`.
WEIGHTS = "weights/"
#: Before the names of what is trained beside a task and is no part of it (see `aligner.py`).
BESIDE = "beside/"
#: Parameter name's end -> the setting that is its learning rate.
_RATES = {
    "scale": "lr_scale_shift",
    "shift": "lr_scale_shift",
    "down": "lr",
    "up": "lr",
    "context": "lr_prompts",
    "pooled": "lr_prompts",
    "rows": "lr_prompts",
}


def make_optimizers(
    parameters: Mapping[str, nn.Parameter], config: TrainingConfig
) -> list[torch.optim.Optimizer]:
    """Returns the optimisers of one task, with groups that remember their `full_lr`.

    Args:
        parameters: "….scale", "….down", "prompts.context", … -> parameter.
        config: The run's settings.

    Raises:
        DiffScalerError: The optimiser's library is not installed, or knows no such device.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(_rate_of(name), []).append(parameter)
    settings: Groups = [
        {
            "params": params,
            "lr": getattr(config, rate),
            "full_lr": getattr(config, rate),
            # prompts and affine parts have no reason to be small; only matrices decay
            "weight_decay": config.weight_decay if rate == "lr" else 0.0,
        }
        for rate, params in groups.items()
    ]
    return _MAKERS[config.optimizer](settings, config)


def _rate_of(name: str) -> str:
    if name.startswith((WEIGHTS, BESIDE)):
        return "lr"
    return "lr_control" if name.startswith(CONTROL) else _RATES[name.rpartition(".")[2]]


def _adamw(groups: Groups, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    on_gpu = groups[0]["params"][0].device.type == "cuda"
    betas = (config.beta1, config.beta2)
    return [torch.optim.AdamW(groups, betas=betas, fused=on_gpu or None)]


def _adamw8bit(groups: Groups, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:
        raise _missing("adamw8bit", "bitsandbytes") from error
    return [AdamW8bit(groups, betas=(config.beta1, config.beta2))]


def _prodigy(groups: Groups, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Prodigy (arXiv:2306.06101) estimates one step size; so each kind of parameter gets its own.

    Its learning rate then is a factor on that estimate, 1 as its authors advise.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise _missing("prodigy", "prodigyopt") from error
    betas = (config.beta1, config.beta2)
    return [
        Prodigy([{**group, "lr": 1.0, "full_lr": 1.0}], betas=betas, safeguard_warmup=True)
        for group in groups
    ]


def _missing(name: str, package: str) -> DiffScalerError:
    return DiffScalerError(f"optimizer {name!r} needs {package}; run: pip install {package}")


_MAKERS: dict[str, Callable[[Groups, TrainingConfig], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
}


def rate_at(step: int, config: TrainingConfig) -> float:
    """Returns the factor on all learning rates at a step (0-based): warm-up, then the schedule.

    A function of the step alone, so that a resumed run needs no scheduler's state. Cosine: SGDR
    (arXiv:1608.03983, Eq. 5) from 1 down to 0.01, once or `restarts` times; linear: to 0.01.
    """
    rising = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return rising * (0.01 + 0.99 * _FALLS[config.schedule](min(1.0, done), config.restarts))


def _arc(done: float, restarts: int = 1) -> float:
    within = done if done == 1 else (done * restarts) % 1
    return 0.5 * (1 + math.cos(math.pi * within))


#: Schedule -> how much is left of the rate when a share of the steps is done.
_FALLS: dict[str, Callable[[float, int], float]] = {
    "constant": lambda done, restarts: 1.0,
    "linear": lambda done, restarts: 1 - done,
    "cosine": lambda done, restarts: _arc(done),
    "cosine_restarts": _arc,
}


class Ema:
    """The running mean of parameters, with a short memory at the start.

    Args:
        params: The parameters; copied, never changed.
        decay: How much of the mean is kept per step; less at first: (1 + n) / (10 + n).
    """

    def __init__(self, params: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.mean = [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], step: int) -> None:
        """Moves the mean towards the parameters after step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, list(params), 1 - decay)

    @contextlib.contextmanager
    def swapped(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Puts the mean into the parameters for as long as the context lasts."""
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            torch._foreach_copy_(list(params), self.mean)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(params), kept)
