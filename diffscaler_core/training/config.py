"""TrainingConfig: all that a run can be told, with defaults that work. Saved with the task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..errors import DiffScalerError, unknown
from ..methods import METHODS
from .conditioning import SOURCES
from .objective import TIMESTEPS, WEIGHTINGS

SCHEDULES = ("cosine", "constant")
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one task is trained.

    What to adapt:
        name: The task's name.
        method: A name in METHODS.
        rank: R of every subspace.
        targets: A preset, a regular expression, or a list of names.
        exclude: Targets to leave out.

    How long and how fast:
        steps: Optimiser steps.
        batch: Pictures per step.
        lr: Learning rate of the subspaces (D and U). Small bases learn best at 3e-3 to 1e-2 (as
            the pocket base does); the default is for bases of full size.
        lr_scale_shift: Of scales and shifts.
        lr_prompts: Of learned prompts.
        schedule: "cosine" (down to a hundredth) or "constant", both after `warmup` steps.
        warmup: Steps over which the rates rise to full.
        weight_decay: AdamW's.
        clip: Largest norm of the gradient; 0 does not clip.
        ema: Decay of the running mean of the parameters that is saved in their place; 0: none.

    What is shown:
        drop: Share of prompts replaced by the null prompt, for classifier-free guidance.
        prompts: Where prompts come from; see `conditioning.prompts_for`.
        prompt_noise: What tells new learned prompts apart at the start.
        timesteps: "logit_normal", "uniform", or "auto": the first for a flow, the second for a
            DDPM; see `objective.draw_times`.
        timestep_mean, timestep_std, timestep_shift, timestep_uniform: Its settings.
        weighting: Loss weighting; see `objective.loss_weights`.

    How it runs:
        precision: "no", or "bf16": the base computes in bfloat16 by autocast.
        checkpointing: Recompute activations in the backward pass: less memory, slower.
        seed: The same seed, data and machine give the same numbers.
    """

    name: str = "task"
    method: str = "diffscaler"
    rank: int = 8
    targets: str | Sequence[str] = "blocks"
    exclude: str | Sequence[str] | None = None
    steps: int = 1000
    batch: int = 8
    lr: float = 1e-3
    lr_scale_shift: float = 3e-3
    lr_prompts: float = 1e-2
    schedule: str = "cosine"
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    drop: float = 0.1
    prompts: str = "auto"
    prompt_noise: float = 0.02
    timesteps: str = "auto"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 1.0
    timestep_uniform: float = 0.1
    weighting: str = "none"
    precision: str = "no"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before anything is loaded."""
        tables: dict[str, Collection[str]] = {
            "method": METHODS,
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
            "timesteps": ("auto", *TIMESTEPS),
            "weighting": WEIGHTINGS,
            "prompts": SOURCES,
        }
        for field, known in tables.items():
            if getattr(self, field) not in known:
                raise unknown(field, getattr(self, field), known)
        for field in ("steps", "batch", "rank"):
            if getattr(self, field) < 1:
                raise DiffScalerError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("lr", "lr_scale_shift", "lr_prompts", "timestep_std", "timestep_shift"):
            if not getattr(self, field) > 0:
                raise DiffScalerError(f"{field} must be above 0, got {getattr(self, field)}")
        for field in ("drop", "ema", "timestep_uniform"):
            if not 0 <= getattr(self, field) <= 1:
                raise DiffScalerError(f"{field} must lie in 0..1, got {getattr(self, field)}")
