"""Reference pictures: real ones of what a task is to draw, and what the base is told about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..task import TaskAdapter
from ..training.conditioning import NULL, Prompts, encoded_prompts, prompts_for
from ..training.data.cache import digest_of
from ..training.data.controls import CONTROLS
from ..training.data.pixels import View, cut, decode_picture
from ..training.data.prepare import TrainingData, encode_folder, find_examples
from ..training.data.sources import Example
from ..training.denoiser import Denoiser


@dataclass(frozen=True, eq=False)
class Reference:
    """Real pictures: as pixels when asked for, and as latents.

    Attributes:
        name: What tables call them.
        examples: Their files and prompts.
        data: The same, encoded; row i is example i.
        size: Side they are cut to, in pixels.
        channels: 3, or 1 for grey ones.
    """

    name: str
    examples: list[Example]
    data: TrainingData
    size: int
    channels: int

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.examples)

    def pictures(self) -> Iterator[Tensor]:
        """Yields each as (channels, size, size) in −1..1, read again: never all in memory."""
        for example in self.examples:
            image = decode_picture(example.read(), self.channels)
            yield cut(image, (self.size, self.size), View())

    @cached_property
    def key(self) -> str:
        """What tells it from any other: its pictures, prompts, controls and size."""
        told = [self.data.prompts[i] for i in self.data.index.tolist()]
        return digest_of(self.size, *self.data.image_ids, *told, *self.data.control_ids)


def load_reference(
    where: Any,
    denoiser: Denoiser,
    size: int | None = None,
    *,
    name: str | None = None,
    task: TaskAdapter | None = None,
    on_encode: Callable[[int, int], None] | None = None,
) -> Reference:
    """Returns reference pictures, encoded by the base's VAE.

    Args:
        where: As `diffscaler train` takes them: a folder (one sub-folder per class, or captions
            beside the pictures), a metadata.jsonl, a data set.
        denoiser: The base.
        size: Side in pixels; None: the base's own.
        name: What tables call them; None: the folder's name.
        task: The task they are for: pictures that say nothing have its name as their prompt, and
            of a control task the control pictures are found (`<folder>_control`) or made.
        on_encode: Called with (pictures done, pictures in all).

    Raises:
        DiffScalerError: Pictures that cannot be used, or a size the base cannot take.
    """
    side = size or denoiser.size
    if side is None:
        raise DiffScalerError("this base does not say its size; give size (--size) in pixels")
    if side % denoiser.factor:
        raise DiffScalerError(f"size {side} must be a multiple of {denoiser.factor} for this base")
    kind = control_kind_of(task)
    made = kind if kind in CONTROLS else None
    own = task.name if task is not None else "task"
    examples = find_examples(where, name=own, control=bool(kind) and made is None)
    data = encode_folder(
        examples,
        side,
        denoiser.encode or (lambda pixels: pixels),
        control_from=made,
        channels=denoiser.channels,
        on_encode=on_encode,
    )
    shown = name or (Path(str(where)).name if isinstance(where, (str, Path)) else own)
    return Reference(shown, examples, data, side, denoiser.channels)


def control_kind_of(task: TaskAdapter | None) -> str:
    """Returns what a task's control pictures show, "" if it takes none."""
    if task is None or not task.is_control:
        return ""
    return str((task.info.get("control") or {}).get("kind") or "control")


def prompts_of(
    denoiser: Denoiser,
    names: tuple[str, ...],
    task: TaskAdapter | None,
    words: TaskAdapter | None,
) -> Prompts:
    """Returns prompts by name: the task's own if it stores them, else the base's words or texts.

    Raises:
        DiffScalerError: Nobody knows some of the names.
    """
    if task is not None and names and all(name in task.prompts for name in names):
        has_null = NULL in task.prompts or words is not None
        null = words if NULL not in task.prompts else task
        return prompts_for(
            denoiser, names, "stored", words=task, null=null if has_null else _null(denoiser)
        )
    if words is None and denoiser.encode_text is None and set(denoiser.fields) - {"label"}:
        raise DiffScalerError(
            f"nobody knows the prompt {names[0]!r}: the task does not store it, and this base has "
            f"neither words nor a text encoder; give a file of stored prompts (words)"
        )
    prompts = prompts_for(denoiser, names, "auto", words=words)
    if prompts.learned:
        known = () if words is None else tuple(word for word in words.prompts if word)
        raise DiffScalerError(
            f"nobody knows the prompts {', '.join(map(repr, names[:3]))}: neither the task nor the "
            f"{len(known)} words of the base; name folders of pictures by what they show, or say "
            f"what to draw (prompts)"
        )
    return prompts


def _null(denoiser: Denoiser) -> TaskAdapter:
    """Returns the text encoder's null prompt as a table of one word."""
    if denoiser.encode_text is None:
        raise DiffScalerError(
            "the null prompt is not known: the task does not store it, and this base has neither "
            "words nor a text encoder; give a file of stored prompts (words)"
        )
    null = {name: tensor.cpu() for name, tensor in encoded_prompts(denoiser, []).null(1).items()}
    return TaskAdapter({}, {"name": "null", "method": "prompts", "prompts": [NULL]}, null)


def other_prompts(
    task: TaskAdapter | None, names: tuple[str, ...], words: TaskAdapter | None, count: int
) -> tuple[str, ...]:
    """Returns at most `count` of the base's words that are not the task's, spread over the list.

    If there is no such word it is the null prompt alone.

    Args:
        task: Its stored prompts are its own.
        names: What its reference pictures show.
        words: The base's.
        count: How many.
    """
    own = {NULL, *names, *(task.prompts if task is not None else ())}
    free = [word for word in (words.prompts if words is not None else ()) if word not in own]
    chosen = torch.linspace(0, len(free) - 1, min(count, len(free))).round().int().tolist()
    return tuple(free[i] for i in chosen) or (NULL,)
