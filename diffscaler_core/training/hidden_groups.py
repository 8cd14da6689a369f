"""Phase 1 of `debias`: what a biased model makes of each picture, and the groups that follow."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..errors import DiffScalerError
from .conditioning import Prompts
from .config import TrainingConfig
from .data.batches import TrainingData
from .debias import GroupTable, find_groups
from .denoiser import Denoiser
from .launch import Launch
from .learner import TaskRun
from .randomness import generator_for

_LOSSES = 104  # its stream of random numbers
#: Times per picture; what tells groups apart is finer than what a validation asks.
TIMES = 16


@torch.no_grad()
def picture_losses(
    denoiser: Denoiser,
    data: TrainingData,
    prompts: Prompts,
    *,
    times: int = TIMES,
    batch: int = 32,
    seed: int = 0,
    precision: str = "no",
) -> Tensor:
    """Returns each picture's mean unweighted loss over evenly spread times, (n,).

    All pictures meet the same noises, so that their losses differ by the pictures alone.

    Args:
        denoiser: The base, held still, with the biased task attached (or none).
        data: Pictures; the first view of each is used.
        prompts: What the base is told about them.
        times: Times per picture, (i + ½) / times.
        batch: Rows per prediction.
        seed: Of the noises.
        precision: As in the config.
    """
    objective, device = denoiser.objective, denoiser.device
    found = []
    for part in data.whole(batch):
        x0, told = part.x0.to(device), prompts(part.index.to(device))
        if part.control is not None:
            told["control"] = part.control.to(device)
        total = torch.zeros(len(x0), device=device)
        for i in range(times):
            generator = generator_for(seed, _LOSSES, i)
            noise = torch.randn(x0.shape[1:], generator=generator).to(device).expand_as(x0)
            t = torch.full((len(x0),), (i + 0.5) / times, device=device)
            timestep, x_t = objective.noisy(x0, noise, t)
            with denoiser.autocast(precision):
                output = denoiser(x_t, timestep, told)
            total += objective.loss(output, x0, noise, t)
        found.append((total / times).cpu())
    return torch.cat(found)


def infer_groups(
    denoiser: Denoiser, run: TaskRun, prompts: Prompts, config: TrainingConfig
) -> GroupTable:
    """Returns the hidden groups of a run's pictures, by the losses of its biased task.

    That is `run.biased`, a task trained on these pictures as usual; else the task to go on from;
    else the bare base, for a bias of its own.

    Args:
        denoiser: The base; nothing is attached.
        run: Its pictures.
        prompts: What the base is told about them.
        config: The run's settings.

    Raises:
        DiffScalerError: Pictures that are not kept (a stream), or losses that are not finite.
    """
    if not isinstance(run.data, TrainingData):
        raise DiffScalerError(
            f"debias groups the pictures before the run, and those of task {run.name!r} are a "
            f"stream: leave out debias, or stream"
        )
    biased = run.biased or run.task
    worn = contextlib.nullcontext() if biased is None else denoiser.attached({biased.name: biased})
    seed = config.seed if run.seed is None else run.seed
    with denoiser.held(resolution=config.at_resolution), worn:
        losses = picture_losses(
            denoiser,
            run.data,
            prompts.place(denoiser.device),
            batch=config.batch,
            seed=seed,
            precision=config.precision,
        )
    weights = find_groups(losses, run.data.index, config.debias_groups, seed=seed)
    return GroupTable(weights, losses, run.data.index, run.data.prompts, run.data.image_ids)


def check_debias(run: TaskRun, config: TrainingConfig, launch: Launch) -> None:
    """Refuses what the risk of groups cannot be taken over.

    Raises:
        DiffScalerError: Batches in parts, whose risks do not add up to the batch's; or prior
            pictures, which belong to no group.
    """
    if config.accumulate > 1 or launch.processes > 1:
        raise DiffScalerError(
            "debias compares the groups of a whole batch, which is not the sum of its parts: run "
            "it in one process, with accumulate 1"
        )
    if run.prior is not None:
        raise DiffScalerError(
            f"debias groups the pictures of task {run.name!r}, and its prior pictures belong to "
            f"no group: leave out debias, or prior"
        )
    if run.groups is not None and len(run.groups.weights) != len(run.data):
        raise DiffScalerError(
            f"task {run.name!r} has {len(run.data)} pictures to train on, but groups of "
            f"{len(run.groups.weights)}"
        )
