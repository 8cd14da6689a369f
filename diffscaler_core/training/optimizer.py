"""Which parameters move how fast: groups, learning-rate schedule, running mean."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig

#: Parameter name's end -> the setting that is its learning rate.
_RATES = {"scale": "lr_scale_shift", "shift": "lr_scale_shift", "down": "lr", "up": "lr"}


def make_optimizer(
    attachment: nn.Module, prompts: nn.Module, config: TrainingConfig
) -> torch.optim.Optimizer:
    """Returns AdamW over a task's parameters, in groups that remember their `full_lr`."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in attachment.named_parameters():
        groups.setdefault(_RATES[name.rpartition(".")[2]], []).append(parameter)
    learned = [p for p in prompts.parameters() if p.requires_grad]
    if learned:
        groups["lr_prompts"] = learned
    settings: list[dict[str, Any]] = [
        {
            "params": params,
            "lr": getattr(config, rate),
            "full_lr": getattr(config, rate),
            # prompts and affine parts have no reason to be small; only matrices decay
            "weight_decay": config.weight_decay if rate == "lr" else 0.0,
        }
        for rate, params in groups.items()
    ]
    return torch.optim.AdamW(settings, betas=(0.9, 0.99))


def rate_at(step: int, config: TrainingConfig) -> float:
    """Returns the factor on all learning rates at a step (0-based): warm-up, then the schedule.

    Cosine: SGDR without restarts (arXiv:1608.03983, Eq. 5), from 1 down to 0.01.
    """
    rising = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return rising
    done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return rising * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


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
        for mean, parameter in zip(self.mean, params, strict=True):
            mean.lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def swapped(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Puts the mean into the parameters for as long as the context lasts."""
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for parameter, mean in zip(params, self.mean, strict=True):
                parameter.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(params, kept, strict=True):
                    parameter.copy_(own)
