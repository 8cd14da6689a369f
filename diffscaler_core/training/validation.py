"""How well a task does on pictures, comparably: the same noise and times for every task and run."""

from __future__ import annotations

import contextlib

import torch

from ..task import TaskAdapter
from .conditioning import Prompts
from .data.batches import Batches
from .denoiser import Denoiser
from .randomness import generator_for

_VALIDATION = 103  # its stream of random numbers


@torch.no_grad()
def validation_loss(
    denoiser: Denoiser,
    data: Batches,
    prompts: Prompts,
    task: TaskAdapter | None = None,
    *,
    times: int = 8,
    batch: int = 32,
    seed: int = 0,
    precision: str = "no",
    held: bool = False,
) -> float:
    """Returns the mean unweighted loss over every picture at `times` evenly spread times each.

    A picture's noise depends on its number, the time's number and the seed alone, so the figure is
    comparable between steps, runs, batch sizes and hosts.

    Args:
        denoiser: The base.
        data: Pictures; the first view of each is used.
        prompts: What the base is told about them.
        task: What to attach; None: the base alone (with whatever is attached already).
        times: Times per picture, (i + ½) / times.
        batch: Rows per prediction.
        seed: Of the noise.
        precision: As in the config.
        held: True: the base is held still already.
    """
    objective, device = denoiser.objective, denoiser.device
    prompts = prompts.place(device)
    worn = contextlib.nullcontext() if task is None else denoiser.attached({task.name: task})
    total, seen = 0.0, 0
    with contextlib.nullcontext() if held else denoiser.held(), worn:
        for part in data.whole(batch):
            numbers = range(seen, seen + len(part.x0))
            seen += len(part.x0)
            x0, index = part.x0.to(device), part.index.to(device)
            told = prompts(index) if part.condition is None else prompts.mixed(part.condition)
            if part.control is not None:
                told["control"] = part.control.to(device)
            for i in range(times):
                noise = torch.stack(
                    [
                        torch.randn(
                            part.x0.shape[1:], generator=generator_for(seed, _VALIDATION, n, i)
                        )
                        for n in numbers
                    ]
                ).to(device)
                t = torch.full((len(x0),), (i + 0.5) / times, device=device)
                timestep, x_t = objective.noisy(x0, noise, t)
                with denoiser.autocast(precision):
                    output = denoiser(x_t, timestep, told)
                total += float(objective.loss(output, x0, noise, t).sum())
    return total / (seen * times)
