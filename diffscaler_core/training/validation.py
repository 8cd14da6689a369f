"""How well a task does on pictures, comparably: the same noise and times for every task and run."""

from __future__ import annotations

import contextlib

import torch

from ..task import TaskAdapter
from .conditioning import Prompts
from .data import TrainingData
from .denoiser import Denoiser


@torch.no_grad()
def validation_loss(
    denoiser: Denoiser,
    data: TrainingData,
    prompts: Prompts,
    task: TaskAdapter | None = None,
    *,
    times: int = 4,
    batch: int = 32,
    seed: int = 0,
) -> float:
    """Returns the mean unweighted loss over every picture at `times` evenly spread times each.

    Args:
        denoiser: The base.
        data: Pictures; the first view of each is used.
        prompts: What the base is told about them.
        task: What to attach; None: the base alone (with whatever is attached already).
        times: Times per picture, (i + ½) / times.
        batch: Rows per prediction.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    objective, device = denoiser.objective, denoiser.device
    x0 = data.latents[0].repeat(times, *(1,) * (data.latents.ndim - 2))
    index = data.index.repeat(times)
    t = (torch.arange(times) + 0.5).repeat_interleave(len(data)) / times
    noise = torch.randn(x0.shape, generator=generator)
    prompts = prompts.to(device)
    worn = contextlib.nullcontext() if task is None else denoiser.attached({task.name: task})
    total = 0.0
    with denoiser.held(), worn:
        for rows in torch.arange(len(x0)).split(batch):
            own = [tensor[rows].to(device) for tensor in (x0, index, t, noise)]
            timestep, x_t = objective.noisy(own[0], own[3], own[2])
            output = denoiser.predict(x_t, timestep, prompts(own[1]))
            total += float(objective.loss(output, own[0], own[3], own[2]).sum())
    return total / len(x0)
