"""Features of pictures from a frozen diffusion base, with or without a task on it.

"Diffusion Models Beat GANs on Image Classification" (arXiv:2307.08702) reads a picture's features
off a block b of the frozen network, at a time t of little noise, told nothing:

    f_{b,t}(x0) = pool( h_b( α_t x0 + σ_t ε, t, no prompt ) )

Ours: all pictures get the same ε, which a seed fixes, so that a picture's features do not hang on
its neighbours; and the mean over several ε may be taken. Which block and time are best is found by
a linear probe on each of a grid: `probe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..blocks import block_named, blocks_of
from ..errors import DiffScalerError
from ..task import TaskAdapter
from ..training.conditioning import NULL, prompts_for
from ..training.data.batches import TrainingData
from ..training.denoiser import Condition, Denoiser
from ..training.randomness import generator_for
from .taps import tapped

#: Times of a grid, 0 clean and 1 pure noise.
TIMES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
BATCH = 64

#: Says what a base is told about so many pictures of which nothing is to be told.
Untold = Callable[[int], Condition]


def untold(denoiser: Denoiser, words: TaskAdapter | None = None) -> Untold:
    """Returns what a base is told where nothing is to be told: its null prompt, or "no class".

    Args:
        denoiser: The base.
        words: A task that stores its null prompt "", if it has no text encoder.

    Raises:
        DiffScalerError: Its null prompt is not known.
    """
    if denoiser.fields and "label" not in denoiser.fields and denoiser.encode_text is None:
        if words is None or NULL not in words.prompts:
            raise DiffScalerError(
                'this base is told prompts: give a file that stores its null prompt "" (words), or '
                "a pipeline with its text encoder"
            )
    return prompts_for(denoiser, [NULL], words=words).place(denoiser.device).null


@torch.no_grad()
def block_features(
    denoiser: Denoiser,
    x0: Tensor,
    t: float,
    told: Untold,
    blocks: Sequence[str | int] | None = None,
    *,
    pool: int = 1,
    noises: int = 1,
    seed: int = 0,
    batch: int = BATCH,
) -> dict[str, Tensor]:
    """Returns features of clean latents, block -> (N, D·pool·pool), float32, on the CPU.

    Tasks that are attached (`denoiser.attached`) take part; without any it is the base.

    Args:
        denoiser: The base, held still by the caller (`denoiser.held()`).
        x0: Clean latents, (N, C, h, w).
        t: How much noise, 0 to 1.
        told: From `untold`.
        blocks: Names or numbers of blocks; None: all.
        pool: Features are means over pool × pool parts of the picture.
        noises: Over how many draws of ε the mean is taken.
        seed: Of ε.
        batch: Pictures looked at together.

    Raises:
        DiffScalerError: No such block, or a time or number out of range.
    """
    if not 0 <= t <= 1 or noises < 1 or pool < 1:
        raise DiffScalerError(
            f"features need a time in 0..1, and a pool and noises from 1; got {t}, {pool}, {noises}"
        )
    names = [block_named(denoiser.model, one) for one in blocks or blocks_of(denoiser.model)]
    sums: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in x0.split(batch):
        means: dict[str, Tensor] = {}
        for draw in range(noises):
            noise = torch.randn(x0.shape[1:], generator=generator_for(seed, "features", draw))
            times = torch.full((len(part),), float(t))
            timestep, x_t = denoiser.objective.noisy(part, noise.expand_as(part), times)
            seen = noisy_features(denoiser, x_t, timestep, told, names, pool)
            means = {n: f / noises + means.get(n, torch.zeros(())) for n, f in seen.items()}
        for name in names:
            sums[name].append(means[name])
    return {name: torch.cat(own) for name, own in sums.items()}


@torch.no_grad()
def noisy_features(
    denoiser: Denoiser,
    x_t: Tensor,
    timestep: Tensor,
    told: Untold,
    blocks: Sequence[str],
    pool: int = 1,
) -> dict[str, Tensor]:
    """Returns features of noisy latents, block -> (B, D·pool·pool), float32, on the CPU.

    Args:
        denoiser: The base.
        x_t: (B, C, h, w).
        timestep: The model's own, (B,).
        told: From `untold`.
        blocks: Names of blocks.
        pool: As in `block_features`.
    """
    device = denoiser.device
    layout = denoiser.layout(x_t.shape[2:])
    condition = {name: tensor.to(device) for name, tensor in told(len(x_t)).items()}

    def call() -> object:
        return denoiser(x_t.to(device), timestep.to(device), condition)

    seen = tapped(denoiser.model, blocks, call, layout, pool)
    return {name: features.cpu() for name, features in seen.items()}


def data_features(
    denoiser: Denoiser,
    data: TrainingData,
    times: Sequence[float],
    told: Untold,
    blocks: Sequence[str | int] | None = None,
    *,
    on_time: Callable[[int, int], None] | None = None,
    **settings: int,
) -> dict[tuple[str, float], Tensor]:
    """Returns features of all pictures, (block, time) -> (N, F), in the order of `data.index`.

    Args:
        denoiser: The base, held still by the caller.
        data: The pictures, encoded.
        times: As `block_features`' t.
        told: From `untold`.
        blocks: As in `block_features`.
        on_time: Called with (times done, times in all).
        settings: More for `block_features`.
    """
    found: dict[tuple[str, float], Tensor] = {}
    for done, t in enumerate(times, start=1):
        parts = [
            block_features(denoiser, own.x0, t, told, blocks, **settings)
            for own in data.whole(settings.get("batch", BATCH))
        ]
        found |= {(name, t): torch.cat([part[name] for part in parts]) for name in parts[0]}
        if on_time is not None:
            on_time(done, len(times))
    return found


def pixel_means(data: TrainingData) -> Tensor:
    """Returns what is to be beaten: the latents' (or pixels') own means, (N, C)."""
    return torch.cat([batch.x0.float().flatten(2).mean(2) for batch in data.whole(BATCH)])


def labels_of(data: TrainingData) -> tuple[Tensor, tuple[str, ...]]:
    """Returns each picture's class (N,) and the classes' names, those that occur.

    Raises:
        DiffScalerError: There is but one.
    """
    present, labels = torch.unique(data.index, return_inverse=True)
    names = tuple(data.prompts[i] for i in present.tolist())
    if len(names) < 2:
        raise DiffScalerError(
            f"a probe tells classes apart, and here is only {names[0] if names else 'none'!r}: "
            f"give a folder with one sub-folder per class"
        )
    return labels, names


def grid_of(features: Mapping[tuple[str, float], Tensor]) -> tuple[list[str], list[float]]:
    """Returns the blocks and the times of a grid, in order."""
    return list(dict.fromkeys(b for b, _ in features)), list(dict.fromkeys(t for _, t in features))
