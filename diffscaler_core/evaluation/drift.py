"""Drift: how far a task moves what it is not about.

Same prompts, same noise, with the task and without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..task import TaskAdapter
from ..training.denoiser import Denoiser
from .features import FeatureNet
from .sampling import Plan, drawn
from .settings import EvaluationSettings

_OFF = 4  # pictures that are drawn at strength 0: each of their bits must be the base's


@dataclass(frozen=True)
class Drift:
    """How far pictures move.

    Attributes:
        features: Mean distance of the features of a picture with the task from those without, over
            the mean distance of two of the base's pictures: 0 unmoved, 1 as far as another picture.
        pixels: Root mean square difference, of a range 0..1.
        off: The largest difference of any pixel at strength 0. Anything but 0 is a defect.
    """

    features: float
    pixels: float
    off: float


def drift(
    denoiser: Denoiser,
    task: TaskAdapter,
    plan: Plan,
    net: FeatureNet,
    settings: EvaluationSettings,
) -> Drift:
    """Returns how far a task at strength 1 moves the pictures of a plan, and at strength 0.

    Args:
        denoiser: The base, held still, with no task attached.
        task: The task; a control task gets no control picture.
        plan: What is drawn, under prompts that are not the task's.
        net: Measures the distance.
        settings: How pictures are drawn.
    """
    few = plan.first(min(_OFF, len(plan)))
    # Bits depend on the batch's size, so strength 0 is compared with a batch of its own size.
    alone = replace(settings, batch=len(few))
    before, base = _all(denoiser, plan, settings), _all(denoiser, few, alone)
    with denoiser.attached({task.name: task}) as worn:
        after = _all(denoiser, plan, settings)
        set_weights = getattr(worn, "set_weights", None)
        if set_weights is None:
            raise DiffScalerError("drift at strength 0 cannot be measured: this base's strengths "
                                  "cannot be set")  # fmt: skip
        set_weights({task.name: 0.0})
        off = _all(denoiser, few, alone)
    return Drift(
        features=moved(net(before), net(after)),
        pixels=float((before - after).double().square().mean().sqrt() / 2),
        off=float((off - base).abs().max()),
    )


def moved(before: Tensor, after: Tensor) -> float:
    """Returns the mean distance of row i from row i, over that of two rows of `before`, (N, F).

    NaN if all rows of `before` are alike, or there is only one.
    """
    before, after = before.double(), after.double()
    typical = float(torch.pdist(before).mean()) if len(before) > 1 else 0.0
    own = float((after - before).norm(dim=1).mean())
    return own / typical if typical else math.nan


def _all(denoiser: Denoiser, plan: Plan, settings: EvaluationSettings) -> Tensor:
    return torch.cat(list(drawn(denoiser, plan, settings)))
