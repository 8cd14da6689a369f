"""What a training run shows in ComfyUI: a bar, pictures, a line of text; and its stop button."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import comfy.model_management as management
import comfy.utils
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffscaler_core.training.preview import grid
from ..diffscaler_core.training.progress import Progress, by_noise
from ..diffscaler_core.training.run_folder import RunFolder, read_log

logger = logging.getLogger(__name__)

_SECONDS = 0.5  # between lines of text on the node
_COLUMNS = 4


class Report:
    """Follows one run; an `on_step` of the trainer.

    Args:
        steps: Of the whole run.
        node: The node's id, None outside a server.
    """

    def __init__(self, steps: int, node: str | None) -> None:
        self.bar = comfy.utils.ProgressBar(steps, node_id=node)
        self.node = node
        self.step = 0
        self._told = 0.0

    def __call__(self, now: Progress) -> None:
        """Shows one step; raises the stop that was pressed meanwhile."""
        self.step = now.step
        for line in now.advice:
            logger.info("%s", line)
        if now.step == now.steps or time.monotonic() - self._told > _SECONDS:
            self._told = time.monotonic()
            self._tell(_line(now))
        sheet = None if not now.samples else grid(now.samples, _COLUMNS)
        self.bar.update_absolute(now.step, preview=None if sheet is None else ("JPEG", sheet, None))
        management.throw_exception_if_processing_interrupted()

    def _tell(self, text: str) -> None:
        from server import PromptServer  # only there while a server runs

        server = getattr(PromptServer, "instance", None)
        if server is not None and self.node is not None:
            server.send_progress_text(text, self.node)


def _line(now: Progress) -> str:
    parts = [f"step {now.step} of {now.steps}", f"loss {now.mean_loss:.4f}"]
    if now.rate:
        parts.append(f"{now.rate:.2f} it/s" if now.rate >= 1 else f"{1 / now.rate:.1f} s/it")
    if now.step < now.steps and math.isfinite(now.seconds_left):
        minutes, seconds = divmod(round(now.seconds_left), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    if now.validation is not None:
        parts.append(f"validation {now.validation:.4f}")
    if now.validation_other is not None:
        parts.append(f"with another picture's control {now.validation_other:.4f}")
    return " · ".join(parts)


def losses_of(folder: RunFolder) -> dict[str, list[float]]:
    """Returns a run's losses as ComfyUI's LOSS_MAP."""
    entries = read_log(folder.log_file)
    return {"loss": [float(e["loss"]) for e in entries if e.get("loss") is not None]}


def pictures_of(folder: RunFolder) -> Tensor:
    """Returns a run's last samples as one IMAGE, a small black one if there are none."""
    files = sorted(folder.samples.glob("step-*.png")) if folder.samples.is_dir() else []
    if not files:
        return torch.zeros(1, 64, 64, 3)
    with Image.open(files[-1]) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)[None]


def summary_of(folder: RunFolder, shown: str, facts: dict[str, Any]) -> str:
    """Returns what came of a run, one fact a line."""
    named = {
        "steps": facts.get("steps_done"),
        "pictures": facts.get("images"),
        "loss": facts.get("loss"),
        "validation loss": facts.get("validation_loss"),
        "validation loss with another picture's control": facts.get(
            "validation_loss_other_control"
        ),
        "loss by noise": by_noise(facts.get("loss_by_noise") or ()),
        "best validation loss": facts.get("best_validation_loss"),
        "at step": facts.get("best_step"),
        "seconds": facts.get("seconds"),
    }
    lines = [f"{key}: {value}" for key, value in named.items() if value not in (None, "")]
    return "\n".join([shown, *lines])
