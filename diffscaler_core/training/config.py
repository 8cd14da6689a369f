"""TrainingConfig: all that a run can be told, with defaults that work. Saved with the task."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..affiner import ACTIVATIONS
from ..auto_rank import AUTO, parsed_budget
from ..errors import DiffScalerError, shown, unknown
from ..methods import GAMMA_BLOCKS, METHODS
from ..task import CONTROL_EMBEDDINGS
from ..windows import ALPHA, BETA, MOST_RANGES

SCHEDULES = ("cosine", "linear", "constant", "cosine_restarts")
PRECISIONS = ("no", "bf16", "fp16")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
PROMPT_SOURCES = ("auto", "stored", "learned", "encoded", "labels", "none")
TIMESTEPS = ("auto", "uniform", "logit_normal")
WEIGHTINGS = ("none", "min_snr", "cosmap", "chain")
PERTURBATIONS = ("off", "uniform", "gaussian")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one task is trained.

    What to adapt:
        name: The task's name.
        method: A name in METHODS.
        activation: Of the subspaces: "method" (its own), or a name in `affiner.ACTIVATIONS`.
        gamma_blocks: For "difffit": which blocks have γ; a name in `methods.GAMMA_BLOCKS`.
        experts: How many ranges of noise the hidden units are shared out among, each range having
            its own; 1: all act at every noise level. See `windows.py`.
        time_route: True: a window slides over the hidden units, from clean to noise.
        route_alpha: How late it slides: α.
        route_beta: The share of the units in it: β.
        rank: R of every subspace; "auto": chosen per layer from the pictures (`auto_rank.py`).
        rank_budget: For "auto", how much may be spent: 8: as many numbers as rank 8 everywhere;
            "0.4%": that share of the base's, for scales, shifts and subspaces; "20k", "1.5M": so
            many for those.
        targets: A preset, a regular expression, or a list of names.
        exclude: Targets to leave out.

    How long and how fast:
        steps: Optimiser steps.
        batch: Pictures per step, of all devices together.
        accumulate: Parts a batch is computed in, one after the other: less memory, same result.
        lr: Learning rate of the subspaces (D and U). Small bases learn best at 3e-3 to 1e-2 (as
            the pocket base does); the default is for bases of full size.
        lr_scale_shift: Of scales and shifts.
        lr_prompts: Of learned prompts and new classes.
        optimizer: "adamw"; if installed "adamw8bit" (bitsandbytes) or "prodigy" (prodigyopt, which
            finds each kind of parameter's step size itself: the rates above are not used).
        schedule: "cosine" (down to a hundredth), "linear", "constant", or "cosine_restarts", each
            after `warmup` steps.
        warmup: Steps over which the rates rise to full.
        restarts: For "cosine_restarts": how many arcs.
        weight_decay: AdamW's, on subspaces only.
        beta1, beta2: AdamW's.
        clip: Largest norm of the gradient; 0 does not clip.
        ema: Decay of the running mean of the parameters that is saved in their place; 0: none.

    What is shown:
        drop: Share of prompts replaced by the null prompt, for classifier-free guidance.
        prompts: Where prompts come from; see `conditioning.prompts_for`.
        prompt_noise: What tells new learned prompts apart at the start.
        perturb: Noise on the prompts' embeddings: "off", "uniform", "gaussian"; see
            `conditioning.perturbation`.
        perturb_gamma: Its size.
        timesteps: "logit_normal", "uniform", or "auto": the first for a flow, the second for a
            DDPM; see `objective.draw_times`.
        timestep_mean, timestep_std, timestep_shift, timestep_uniform: Its settings.
        weighting: Loss weighting; see `objective.loss_weights`.
        snr_gamma: For "min_snr": the cap.
        chain_tau: For "chain": how fast the weight grows with noise.
        prior_weight: Weight of the prior pictures' loss, if there are any.
        prior_share: Share of each batch that prior pictures take.

    What helps beside the loss:
        repa: Picture encoder whose features of the clean pictures an early block is drawn towards
            (arXiv:2410.06940; see `alignment.py`): "off", or as `load_encoder` takes it: "pocket",
            a file, a folder, a name on the Hub. Of another, given as a function: what to call it.
        repa_block: Which block, from 1; 0: one as early as the paper's (8 of 28).
        repa_weight: λ; 0: as if it were off.
        repa_until: Share of the steps after which the term ends; that it does is ours.
        repa_width: Width of the projector; 0: four times the block's, at most 2048.
        debias: λ of hidden groups (arXiv:2412.08480; see `debias.py`); 0: the usual mean loss.
        debias_groups: How many groups are looked for among the pictures of each prompt.

    At another resolution (see `resolution.py`):
        at_resolution: Times the base's own resolution that the pictures have: its positions are
            stretched that far; 1: they stay.

    Control (see `control.py`):
        control: What the control pictures show ("edges", …); "": the task takes none.
        control_rank: R of the control affiner; 0: as many as a patch has numbers.
        control_activation: Of its subspace.
        control_embedding: A name in `task.CONTROL_EMBEDDINGS`.
        control_drop: Share of control pictures left out, so that the task does well without.
        lr_control: Learning rate of the control affiner.

    What is looked at on the way:
        validate_every: Steps between validations; 0: only at the end (if there is data for it).
        validation_share: Share of the pictures kept from training for validation.
        validation_times: Times per validation picture.
        sample_every: Steps between sample grids; 0: only at the end.
        sample_steps, guidance: How samples are drawn.

    How it runs:
        save_every: Steps between checkpoints; 0: only when the run ends or is interrupted.
        keep: Checkpoints kept.
        precision: "no", "bf16" or "fp16": what the base computes in, by autocast.
        checkpointing: Recompute activations in the backward pass: less memory, slower.
        shard: Split the base's weights over the processes of a distributed launch (FSDP): less
            memory on each, same result.
        seed: The same seed, data and machine give the same numbers, on any number of devices.
    """

    name: str = "task"
    method: str = "diffscaler"
    activation: str = "method"
    gamma_blocks: str = "first_half"
    experts: int = 1
    time_route: bool = False
    route_alpha: float = ALPHA
    route_beta: float = BETA
    rank: int | str = 8
    rank_budget: int | str = 8
    targets: str | Sequence[str] = "blocks"
    exclude: str | Sequence[str] | None = None

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-3
    lr_scale_shift: float = 3e-3
    lr_prompts: float = 1e-2
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 20
    restarts: int = 1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.0

    drop: float = 0.1
    prompts: str = "auto"
    prompt_noise: float = 0.02
    perturb: str = "off"
    perturb_gamma: float = 1.0
    timesteps: str = "auto"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    timestep_shift: float = 1.0
    timestep_uniform: float = 0.1
    weighting: str = "none"
    snr_gamma: float = 5.0
    chain_tau: float = 1.0
    prior_weight: float = 1.0
    prior_share: float = 0.5

    repa: str = "off"
    repa_block: int = 0
    repa_weight: float = 0.5
    repa_until: float = 0.5
    repa_width: int = 0
    debias: float = 0.0
    debias_groups: int = 2

    at_resolution: float = 1.0

    control: str = ""
    control_rank: int = 0
    control_activation: str = "identity"
    control_embedding: str = "affiner"
    control_drop: float = 0.1
    lr_control: float = 3e-3

    validate_every: int = 0
    validation_share: float = 0.0
    validation_times: int = 8
    sample_every: int = 0
    sample_steps: int = 20
    guidance: float = 3.5

    save_every: int = 100
    keep: int = 2
    precision: str = "no"
    checkpointing: bool = False
    shard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before anything is loaded."""
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise unknown(field, getattr(self, field), known)
        parsed_budget(self.rank_budget)
        for field, (low, high) in LIMITS.items():
            value = getattr(self, field)
            if (field, value) == ("rank", AUTO):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise DiffScalerError(f"{field} must be a number, got {shown(value)}")
            if not low <= value <= high:
                raise DiffScalerError(f"{field} must be {_between(low, high)}, got {value}")
        for field in POSITIVE:
            if not getattr(self, field) > 0:
                raise DiffScalerError(f"{field} must be above 0, got {getattr(self, field)}")
        if (self.experts > 1 or self.time_route) and self.rank == AUTO:
            raise DiffScalerError(
                "rank 'auto' looks at all noise levels at once: give experts or time_route a rank"
            )
        if self.experts > 1 and self.time_route:
            raise DiffScalerError(
                "experts and time_route both share hidden units out among noise levels: choose one"
            )
        if self.batch % self.accumulate:
            raise DiffScalerError(
                f"accumulate {self.accumulate} must divide the batch of {self.batch}"
            )


_MUCH = float("inf")
#: Settings that must be above 0.
POSITIVE = (
    "at_resolution",
    "lr",
    "lr_scale_shift",
    "lr_prompts",
    "lr_control",
    "route_alpha",
    "route_beta",
    "timestep_std",
    "timestep_shift",
)
#: Setting -> the names it may have.
CHOICES: dict[str, Collection[str]] = {
    "method": METHODS,
    "activation": ("method", *ACTIVATIONS),
    "gamma_blocks": GAMMA_BLOCKS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "timesteps": TIMESTEPS,
    "weighting": WEIGHTINGS,
    "prompts": PROMPT_SOURCES,
    "perturb": PERTURBATIONS,
    "control_activation": ACTIVATIONS,
    "control_embedding": CONTROL_EMBEDDINGS,
}
#: Setting -> (smallest, largest).
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, _MUCH),
    "batch": (1, _MUCH),
    "rank": (1, _MUCH),
    "experts": (1, MOST_RANGES),
    "route_beta": (0, 1),
    "accumulate": (1, _MUCH),
    "restarts": (1, _MUCH),
    "keep": (1, _MUCH),
    "validation_times": (1, _MUCH),
    "sample_steps": (1, _MUCH),
    "warmup": (0, _MUCH),
    "save_every": (0, _MUCH),
    "validate_every": (0, _MUCH),
    "sample_every": (0, _MUCH),
    "clip": (0, _MUCH),
    "weight_decay": (0, _MUCH),
    "snr_gamma": (0, _MUCH),
    "chain_tau": (0, _MUCH),
    "perturb_gamma": (0, _MUCH),
    "prior_weight": (0, _MUCH),
    "prior_share": (0, 0.9),
    "repa_block": (0, _MUCH),
    "repa_weight": (0, _MUCH),
    "repa_until": (0, 1),
    "repa_width": (0, _MUCH),
    "debias": (0, _MUCH),
    "debias_groups": (2, 64),
    "validation_share": (0, 0.9),
    "guidance": (0, _MUCH),
    "drop": (0, 1),
    "control_rank": (0, _MUCH),
    "control_drop": (0, 0.9),
    "ema": (0, 1),
    "beta1": (0, 1),
    "beta2": (0, 1),
    "timestep_uniform": (0, 1),
}


def _between(low: float, high: float) -> str:
    return f"at least {low:g}" if high == _MUCH else f"{low:g} to {high:g}"
