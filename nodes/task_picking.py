"""Which of several tasks made a picture, asked of a ComfyUI model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.combine import scale_task
from ..diffscaler_core.systems.ranking import NONE, Ranking
from ..diffscaler_core.systems.ranking_chart import draw_ranking
from ..diffscaler_core.systems.which_task import ProbeSettings, which_task
from ..diffscaler_core.training.conditioning import NULL
from ..diffscaler_core.training.denoiser import Denoiser
from .conditions import Row, facts_of, prompts_of, rows_of
from .patching import refuse_tasks
from .pictures import check_image
from .training import denoiser_of
from .training_controls import cut_image

#: What comes out when no task fits: nothing at strength 0, the nearest all the same, an error.
IF_NONE = ("no task", "closest", "stop")


def picked(
    model: ModelPatcher,
    vae: Any,
    image: Tensor,
    tasks: Sequence[TaskAdapter],
    settings: ProbeSettings,
    if_none: str = IF_NONE[0],
    conditioning: Sequence[Any] | None = None,
    node: str | None = None,
) -> tuple[TaskAdapter, str, str, Tensor]:
    """Returns the task that fits an IMAGE, its name, a report, and a chart as an IMAGE.

    Args:
        model: The model, with its LoRAs and patches.
        vae: Its VAE.
        image: One picture, or several that are judged together, (B, H, W, C) in 0..1.
        tasks: The candidates.
        settings: How they are probed.
        if_none: One of IF_NONE.
        conditioning: What the model is told; None: an empty prompt that a task stores.
        node: The node's id, None outside a server.

    Raises:
        DiffScalerError: Inputs that cannot be judged, or no task fits and `if_none` is "stop".
        InterruptProcessingException: The user pressed stop.
    """
    refuse_tasks(model, "connect the model from before them")
    named = _named(tasks)
    bar = comfy.utils.ProgressBar(1, node_id=node)

    def show(done: int, total: int) -> None:
        bar.update_absolute(done, total)
        management.throw_exception_if_processing_interrupted()

    with torch.inference_mode(False), torch.no_grad():
        row = _told(tasks) if conditioning is None else _one_row(conditioning)
        denoiser = denoiser_of(model, vae, None, facts_of([row]))
        pictures = _pictures(image, denoiser)
        assert denoiser.encode is not None
        found = which_task(
            denoiser,
            denoiser.encode(pictures),
            named,
            None,
            settings,
            nothing=prompts_of((NULL,), [row], row).null(1),
            latents=True,
            on_progress=show,
        )
    if found.answer is None and if_none == "stop":
        raise DiffScalerError(found.sentence())
    best = named[found.best.name]
    if found.answer is None and if_none == "no task":
        return _nothing(best), NONE, found.table(), _chart(found, pictures[0])
    return best, found.best.name, found.table(), _chart(found, pictures[0])


def _named(tasks: Sequence[TaskAdapter]) -> dict[str, TaskAdapter]:
    """Returns tasks by name; those of one name are numbered."""
    names = [" ".join(task.name.split()) or "task" for task in tasks]
    again, seen = Counter(names), Counter[str]()
    found: dict[str, TaskAdapter] = {}
    for name, task in zip(names, tasks, strict=True):
        seen[name] += 1
        found[f"{name} ({seen[name]})" if again[name] > 1 else name] = task
    return found


def _nothing(task: TaskAdapter) -> TaskAdapter:
    """Returns the task at strength 0, with its prompts: the model draws as it does alone."""
    return scale_task(task, 0.0).with_info(name=NONE)


def _one_row(conditioning: Sequence[Any]) -> Row:
    rows = rows_of(conditioning)
    if len(rows) != 1:
        raise DiffScalerError(
            f"the conditioning holds {len(rows)} prompts; connect one, best an empty one"
        )
    return rows[0]


def _told(tasks: Sequence[TaskAdapter]) -> Row:
    """Returns the empty prompt as a task stores it."""
    storing = next((t for t in tasks if NULL in t.prompts and "context" in t.conditioning), None)
    if storing is None:
        raise DiffScalerError(
            "none of the tasks stores the empty prompt: connect one to 'conditioning' (CLIP Text "
            "Encode without a text)"
        )
    context, pooled = storing.prompt(NULL)
    return context.float(), {} if pooled is None else {"pooled_output": pooled.float()}


def _pictures(image: Tensor, denoiser: Denoiser) -> Tensor:
    """Returns an IMAGE as the VAE takes it, (B, 3, H, W) in −1..1, cut to sides that it can take.

    Raises:
        DiffScalerError: It is none, or smaller than the model's smallest picture.
    """
    check_image(image)
    height, width = (side // denoiser.factor * denoiser.factor for side in image.shape[1:3])
    if not height or not width:
        raise DiffScalerError(
            f"the image is {image.shape[2]}x{image.shape[1]}; this model's smallest picture is "
            f"{denoiser.factor}x{denoiser.factor}"
        )
    return torch.stack([cut_image(one, (height, width), "the image") for one in image])


def _chart(found: Ranking, picture: Tensor) -> Tensor:
    drawn = np.asarray(draw_ranking(found, picture), np.float32) / 255
    return torch.from_numpy(drawn)[None]
