"""A few pictures from a base with whatever tasks are attached: what training looks at on the way.

One deterministic sampler serves every objective: a prediction is separated into (x0, ε) and mixed
again at the next, lower noise. For a flow that is Euler's step, for a DDPM it is DDIM
(arXiv:2010.02502, Eq. 12 with η = 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..task import TaskAdapter
from .conditioning import Prompts
from .data.batches import Batch
from .denoiser import Condition, Denoiser
from .objective import Objective, separate, shifted, spread


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    condition: Condition,
    null: Condition,
    noise: Tensor,
    *,
    steps: int = 20,
    guidance: float = 3.5,
    shift: float = 3.0,
) -> Tensor:
    """Returns clean latents shaped like `noise` (B, C, h, w).

    Args:
        denoiser: The base; tasks attached to its model take part.
        condition: One row per sample.
        null: The null prompt, one row per sample; what it lacks (a control) is the condition's.
        noise: Where sampling starts, standard normal.
        steps: How many predictions (twice as many rows with guidance).
        guidance: Classifier-free guidance (arXiv:2207.12598); 1: none.
        shift: Moves the flow's times towards noise; see `objective.shifted`.
    """
    objective, x = denoiser.objective, noise.to(denoiser.device)
    for now, after in itertools.pairwise(sampling_times(objective, steps, shift, x.device)):
        x0, eps = predicted(denoiser, x, now, condition, null, guidance)
        if after == 0:
            return x0
        _, alpha, sigma = objective.at(after.expand(len(x)))
        x = spread(alpha, x) * x0 + spread(sigma, x) * eps
    return x


def sampling_times(
    objective: Objective,
    steps: int,
    shift: float = 3.0,
    device: torch.device | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Returns the times that sampling visits, (steps + 1,), from noise to 0.

    Args:
        objective: Of the base.
        steps: How many predictions.
        shift: Moves a flow's times towards noise; see `objective.shifted`.
        device: Where they are made.
        strength: Where sampling starts, before the shift: 1 is pure noise.
    """
    times = torch.linspace(strength, 0, steps + 1, device=device)
    return shifted(times, shift) if objective.is_flow else times


def predicted(
    denoiser: Denoiser,
    x: Tensor,
    now: Tensor,
    condition: Condition,
    null: Condition,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns one prediction as (x0, ε), shaped like x (B, C, h, w); see `sample_latents`.

    Args:
        denoiser: The base.
        x: Noisy samples.
        now: Their time, a scalar in 0..1.
        condition: One row per sample.
        null: The null prompt.
        guidance: Classifier-free guidance; 1: none.
    """
    objective = denoiser.objective
    timestep, alpha, sigma = objective.at(now.expand(len(x)))
    if guidance != 1 and denoiser.guided and bool(condition):
        both = {k: torch.cat([null.get(k, v).to(v), v]) for k, v in condition.items()}
        output = denoiser(torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        without, with_prompt = objective.mean(output.float()).chunk(2)
        prediction = without + guidance * (with_prompt - without)
    else:
        prediction = objective.mean(denoiser(x, timestep, condition).float())
    return separate(objective.kind, prediction, x, alpha, sigma)


@torch.no_grad()
def sample_prompts(
    denoiser: Denoiser,
    prompts: Prompts,
    shape: Sequence[int],
    *,
    per_prompt: int = 1,
    seed: int = 0,
    **sampling: Any,
) -> list[Tensor]:
    """Returns pictures of every prompt, (3, H, W) in −1..1, prompt by prompt.

    Args:
        denoiser: The base, held still, with whatever tasks are attached.
        prompts: The prompts to show.
        shape: Of one latent, (C, h, w).
        per_prompt: Pictures per prompt.
        seed: Seed of the noise; the same seed starts each preview from the same noise.
        sampling: As in `sample_latents`.
    """
    prompts = prompts.place(denoiser.device)
    index = torch.arange(len(prompts.names)).repeat_interleave(per_prompt)
    noise = torch.randn(len(index), *shape, generator=torch.Generator().manual_seed(seed))
    pictures: list[Tensor] = []
    for rows in index.split(16):
        own = rows.to(denoiser.device)
        part = noise[len(pictures) : len(pictures) + len(rows)]
        latents = sample_latents(denoiser, prompts(own), prompts.null(len(rows)), part, **sampling)
        pictures += _pixels(denoiser, latents)
    return pictures


@torch.no_grad()
def sample_controls(
    denoiser: Denoiser, prompts: Prompts, examples: Batch, *, seed: int = 0, **sampling: Any
) -> list[Tensor]:
    """Returns control pictures and what the base makes of them, in turns, (3, H, W) in −1..1.

    Args:
        denoiser: The base, held still, with a control task attached.
        prompts: The examples' prompts.
        examples: Control pictures and their prompts; their clean latents are not looked at.
        seed: Seed of the noise.
        sampling: As in `sample_latents`.
    """
    device, control = denoiser.device, examples.control
    if control is None:
        raise DiffScalerError("these examples have no control pictures")
    prompts = prompts.place(device)
    noise = torch.randn(examples.x0.shape, generator=torch.Generator().manual_seed(seed))
    if examples.condition is None:
        told = prompts(examples.index.to(device))
    else:
        told = prompts.mixed(examples.condition)
    told["control"] = control.to(device)
    latents = sample_latents(denoiser, told, prompts.null(len(noise)), noise, **sampling)
    shown = [_pixels(denoiser, each) for each in (control.to(device), latents)]
    return [picture for pair in zip(*shown, strict=True) for picture in pair]


def _pixels(denoiser: Denoiser, latents: Tensor) -> list[Tensor]:
    pixels = denoiser.decode(latents) if denoiser.decode else latents.clamp(-1, 1)
    return list(pixels.float().cpu())


def preview(
    denoiser: Denoiser, task: TaskAdapter, prompts: Prompts, shape: Sequence[int], **settings: Any
) -> list[Tensor]:
    """Returns pictures of every prompt with a task on; see `sample_prompts`."""
    with denoiser.held(), denoiser.attached({task.name: task}):
        return sample_prompts(denoiser, prompts, shape, **settings)


def grid(pictures: Sequence[Tensor], columns: int) -> Any:
    """Returns pictures side by side as one Pillow image, row by row."""
    from PIL import Image

    images = [to_image(picture) for picture in pictures]
    width, height = images[0].size
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def to_image(picture: Tensor) -> Any:
    """Returns (3 or 1, H, W) in −1..1 as a Pillow image."""
    from PIL import Image

    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
