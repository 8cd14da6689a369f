"""Short runs that several test files make."""

from __future__ import annotations

import torch

from diffscaler_core.training import TrainingConfig, encode_folder, train_task


def config_of(**changes):
    defaults = dict(
        name="tiny", steps=40, batch=8, rank=2, lr=1e-2, lr_scale_shift=3e-2, warmup=2, seed=5
    )
    return TrainingConfig(**{**defaults, **changes})


def data_of(denoiser, pictures):
    return encode_folder(pictures, 16, denoiser.encode or (lambda pixels: pixels))


def trained(
    denoiser, pictures, words=None, on_step=None, task=None, folder=None, resume="auto", **changes
):
    data = data_of(denoiser, pictures)
    config = config_of(**changes)
    return train_task(
        denoiser,
        data,
        config,
        words=words,
        on_step=on_step,
        task=task,
        folder=folder,
        resume=resume,
    )


def tensors_of(task):
    """Returns all that a task learned, by name."""
    layers = {f"{n}.{p}": t for n, own in task.layers.items() for p, t in own.items()}
    prompts = {f"prompts.{n}": t for n, t in task.conditioning.items()}
    return {**layers, **prompts, **task.extras}


def weights_of(task):
    return list(tensors_of(task).values())


def same(one, two):
    first, second = tensors_of(one), tensors_of(two)
    return sorted(first) == sorted(second) and all(torch.equal(first[n], second[n]) for n in first)


def farthest(one, two):
    """Returns the largest difference between two tasks' numbers x, y: |x − y| / (1 + |y|)."""
    first, second = tensors_of(one), tensors_of(two)
    assert sorted(first) == sorted(second)
    gaps = ((first[n] - second[n]).abs() / (1 + second[n].abs()) for n in first)
    return max(float(gap.max()) for gap in gaps)
