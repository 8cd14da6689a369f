"""Groups: tasks that share reference pictures and prompts, so that one base row stands for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import DiffScalerError, first_names
from ..task import TaskAdapter
from ..training.conditioning import Prompts
from ..training.denoiser import Denoiser
from .reference import Reference, load_reference, prompts_of
from .settings import EvaluationSettings

#: What is going on, how many of it are done, how many there are.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Group:
    """Tasks that are compared with the same pictures under the same prompts.

    Attributes:
        reference: The pictures.
        asked: What is drawn.
        told: What the reference pictures show, for the validation loss; None: nobody knows.
        tasks: Name -> task.
    """

    reference: Reference
    asked: Prompts
    told: Prompts | None
    tasks: dict[str, TaskAdapter] = field(default_factory=dict)


def groups_of(
    denoiser: Denoiser,
    tasks: Mapping[str, TaskAdapter],
    references: Any,
    settings: EvaluationSettings,
    words: TaskAdapter | None,
    progress: OnProgress,
) -> list[Group]:
    """Returns all tasks, with their references read and their prompts looked up.

    Raises:
        DiffScalerError: A task without references, too few pictures, unknown prompts.
    """
    named = references if isinstance(references, Mapping) else dict.fromkeys(tasks, references)
    missing, strange = [n for n in tasks if n not in named], [n for n in named if n not in tasks]
    if missing or strange:
        what = "need reference pictures" if missing else "have pictures, but are no tasks here"
        raise DiffScalerError(f"{first_names(missing or strange)} {what}; give each task its own")
    groups: list[Group] = []
    for name, task in tasks.items():

        def read(done: int, total: int, name: str = name) -> None:
            progress(f"{name}: reading pictures", done, total)

        reference = load_reference(named[name], denoiser, settings.size, task=task, on_encode=read)
        if len(reference) <= settings.neighbours:
            raise DiffScalerError(
                f"{reference.name!r} holds {len(reference)} pictures; with neighbours "
                f"{settings.neighbours} at least {settings.neighbours + 1} are needed"
            )
        group = _group(denoiser, reference, settings, words, task)
        same = [known for known in groups if _alike(known, group)]
        (same or [group])[0].tasks[name] = task
        groups += [] if same else [group]
    return groups


def _group(
    denoiser: Denoiser,
    reference: Reference,
    settings: EvaluationSettings,
    words: TaskAdapter | None,
    task: TaskAdapter,
) -> Group:
    shown = reference.data.prompts
    if not settings.prompts:
        told = prompts_of(denoiser, shown, task, words)
        return Group(reference, told, told)
    asked = prompts_of(denoiser, settings.prompts, task, words)
    try:
        return Group(reference, asked, prompts_of(denoiser, shown, task, words))
    except DiffScalerError:  # what to draw was said because nobody knows what these show
        return Group(reference, asked, None)


def _alike(one: Group, two: Group) -> bool:
    a, b = one.asked, two.asked
    if one.reference.key != two.reference.key or (a.names, a.fields) != (b.names, b.fields):
        return False
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in a.fields)
