"""What is left of a run: the task files, dated and with a thumbnail, and the last samples."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...file_names import harmless
from ...task import TaskAdapter
from ..run_folder import RunFolder

COLUMNS = 4  # of a sheet of samples


def finished(task: TaskAdapter, dtype: torch.dtype, picture: Any = None) -> TaskAdapter:
    """Returns the task as it goes into a file: in its dtype, dated, with a thumbnail.

    Args:
        task: From `train_task`.
        dtype: Of the layers, and of a control affiner, in the file.
        picture: A Pillow image of samples; None: no thumbnail.
    """
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    spec = {"date": now, **task.modelspec}
    if picture is not None:
        from ...thumbnails import encode_thumbnail

        spec["thumbnail"] = encode_thumbnail(picture)
    layers = {
        name: {part: tensor.to(dtype) for part, tensor in tensors.items()}
        for name, tensors in task.layers.items()
    }
    extras = {name: tensor.to(dtype) for name, tensor in task.extras.items()}
    return task.replace(layers=layers, extras=extras, modelspec=spec).with_info(created=now)


def last_samples(
    folder: RunFolder, task: str, several: bool, drawn: Sequence[Tensor] | None = None
) -> Any:
    """Returns a task's newest samples as one Pillow image, or None.

    Args:
        folder: The run's.
        task: The task's name.
        several: Whether the run has other tasks too.
        drawn: Samples that are at hand; None: the newest file's, from an earlier part of the run.
    """
    if drawn:
        from ..preview import grid

        return grid(drawn, COLUMNS)
    file = sample_file(folder, task, several)
    if file is None:
        return None
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):  # a thumbnail is worth no error
        return None


def sample_file(folder: RunFolder, task: str, several: bool) -> Path | None:
    """Returns the newest file of a task's samples, or None."""
    named = sorted(folder.samples.glob(f"step-*-{_literal(harmless(task))}.png"))
    if not named and not several:
        named = sorted(folder.samples.glob("step-*.png"))
    return named[-1] if named else None


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)
