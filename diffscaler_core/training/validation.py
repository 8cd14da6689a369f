"""How well a task does on pictures, comparably: the same noise and times for every task and run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from ..task import TaskAdapter
from .conditioning import Prompts
from .data.batches import Batch, Batches
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
    others: bool = False,
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
        others: Give each picture the control of another one: by how much the loss is higher then
            says how far the task goes by its control. NaN where no two pictures have one shape.
    """
    objective, device = denoiser.objective, denoiser.device
    prompts = prompts.place(device)
    worn = contextlib.nullcontext() if task is None else denoiser.attached({task.name: task})
    total, seen, counted = 0.0, 0, 0
    with contextlib.nullcontext() if held else denoiser.held(), worn:
        for part in _with_others(data.whole(batch)) if others else data.whole(batch):
            numbers = range(seen, seen + len(part.x0))
            seen += len(part.x0)
            if others and part.control is None:
                continue
            counted += len(part.x0)
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
    return total / (counted * times) if counted else math.nan


def _with_others(parts: Iterable[Batch]) -> list[Batch]:
    """Returns batches with each control moved on by half of all pictures of its shape.

    Pictures lie class by class, so that the control is mostly of another class. A picture that is
    the only one of its shape loses its control.
    """
    kept = list(parts)
    shapes: dict[torch.Size, list[int]] = {}
    for i, part in enumerate(kept):
        if part.control is not None:
            shapes.setdefault(part.control.shape[1:], []).append(i)
    for own in shapes.values():
        controls = torch.cat([c for i in own if (c := kept[i].control) is not None])
        moved = controls.roll(max(1, len(controls) // 2), 0).split([len(kept[i].x0) for i in own])
        for i, control in zip(own, moved, strict=True):
            kept[i] = replace(kept[i], control=control if len(controls) > 1 else None)
    return kept
