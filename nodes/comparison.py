"""What a comparison of tasks is made of: a batch that starts from one noise, and a name per row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..diffscaler_core import DiffScalerError, TaskAdapter

BASE = "base"


def same_noise(latent: dict[str, Any], count: int) -> dict[str, Any]:
    """Returns a batch of `count` times one latent, to which ComfyUI gives the same noise.

    Args:
        latent: ComfyUI's LATENT with one sample, (1, C, …).
        count: How many rows to make.

    Raises:
        DiffScalerError: It holds another number of latents, or several of different kinds.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise DiffScalerError(
            "the latent holds several of different kinds (a video with its sound): compare tasks "
            "on a latent of one kind"
        )
    given = len(samples) if samples.ndim > 2 else 0
    if given != 1:
        raise DiffScalerError(
            f"the latent batch has {given}, but one latent is compared under every task: "
            f"connect one (Latent From Batch takes one out of a batch)"
        )
    index = latent.get("batch_index") or [0]
    rows = samples.repeat(count, *[1] * (samples.ndim - 1))
    return {**latent, "samples": rows, "batch_index": [index[0]] * count}


def labels_of(
    tasks: Sequence[TaskAdapter], strengths: Sequence[float], include_base: bool
) -> list[str]:
    """Returns a name for each row of a comparison.

    Args:
        tasks: One each.
        strengths: One each; named where it is not 1, or where the same name comes again.
        include_base: Whether the base comes first.
    """
    names = [" ".join(task.name.split()) or "task" for task in tasks]
    again = Counter(names)
    labels = [
        name if strength == 1 and again[name] == 1 else f"{name} {strength:g}"
        for name, strength in zip(names, strengths, strict=True)
    ]
    return [BASE, *labels] if include_base else labels
