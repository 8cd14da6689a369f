"""`evaluate`: tasks against real pictures, one row each, and the base itself beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import DiffScalerError
from ..task import TaskAdapter
from ..training.bases.pipelines import as_denoiser
from .features import FeatureNet
from .groups import OnProgress, groups_of
from .measure import Measurement
from .report import EvaluationReport
from .settings import EvaluationSettings

#: Where finished rows lie, in the folder of an evaluation.
ROWS = "rows"


def evaluate(
    base: Any,
    tasks: Mapping[str, TaskAdapter],
    references: Any,
    features: FeatureNet,
    settings: EvaluationSettings | None = None,
    *,
    words: TaskAdapter | None = None,
    folder: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> EvaluationReport:
    """Returns how tasks of one base do against real pictures of what they are to draw.

    Per reference there are rows of the references themselves through the VAE (about the best any
    task of this base can do), of the base, and of the tasks.

    Args:
        base: A diffusers pipeline, or a `Denoiser`.
        tasks: Name -> task. Prompts come from a task if it stores them.
        references: Real pictures that were not trained on, as `load_reference` takes them: one
            source for all tasks, or {task's name: source}.
        features: What pictures are compared by, from `load_features`.
        settings: How; None: the defaults.
        words: Stored prompts of the base, if it has no text encoder.
        folder: Where finished rows are kept as files: interrupted, the same call goes on after the
            last of them. Only rows of the very same base, task, pictures and settings count.
        on_progress: Called with (what is going on, how many are done, how many there are).

    Raises:
        DiffScalerError: Something cannot be measured; nothing was measured yet.
    """
    reports = evaluation(
        base, tasks, references, features, settings,
        words=words, folder=folder, on_progress=on_progress,
    )  # fmt: skip
    return list(reports)[-1]


@torch.no_grad()
def evaluation(
    base: Any,
    tasks: Mapping[str, TaskAdapter],
    references: Any,
    features: FeatureNet,
    settings: EvaluationSettings | None = None,
    *,
    words: TaskAdapter | None = None,
    folder: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[EvaluationReport]:
    """Yields the report after each row, for who wants to show it as it grows; see `evaluate`."""
    settings = settings or EvaluationSettings()
    progress = on_progress or (lambda what, done, total: None)
    if not tasks:
        raise DiffScalerError("there is no task to evaluate; give at least one")
    denoiser = as_denoiser(base)
    kept = None if folder is None else Path(folder) / ROWS
    report = EvaluationReport(settings=settings, network=features.name, size=features.size,
                              note=features.note)  # fmt: skip
    with denoiser.held():
        groups = groups_of(denoiser, tasks, references, settings, words, progress)
        own = [Measurement(denoiser, g, features, settings, words, kept, progress) for g in groups]
        for measurement in own:
            measurement.prepare()
        for measurement in own:
            for row, pictures in measurement.rows():
                report = report.with_row(row, pictures)
                yield report
