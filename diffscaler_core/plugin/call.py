"""One call of a pipeline's denoiser: its batch, the size that is drawn, the step, the guidance.

A denoiser is never told how its batch came about, and pipelines differ in what they expose; but all
of them hold what is asked here in local variables of `__call__`, so it is read there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiffScalerError, unknown
from ..families import FAMILIES, Family, token_form
from ..tokens import OPEN_ENDED

#: What diffusers' denoisers call their latents.
_LATENTS = ("hidden_states", "sample", "x")
#: What pipelines call the pictures per prompt.
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
#: What pipelines' variables for the unconditional half begin with.
_UNCONDITIONAL = ("negative", "uncond")


@dataclass
class Call:
    """A call that is about to be made.

    Attributes:
        model: The denoiser, below torch.compile's wrapper.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @cached_property
    def running(self) -> Mapping[str, Any]:
        """The local variables of the pipeline's call under way; empty outside of any."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "__call__":
                names = frame.f_locals
                if hasattr(type(names.get("self")), "components") and "batch_size" in names:
                    return names
            frame = frame.f_back  # type: ignore[assignment]
        return {}

    @property
    def latents(self) -> Any:
        """What the denoiser is given: a tensor, or a list of samples; None if it is not there."""
        if self.args:
            return self.args[0]
        return next((self.kwargs[name] for name in _LATENTS if name in self.kwargs), None)

    @cached_property
    def batch(self) -> int:
        """How many samples the denoiser is called with.

        Raises:
            DiffScalerError: The call has no latents under a name diffusers uses.
        """
        if isinstance(self.latents, Tensor | list | tuple):
            return len(self.latents)
        raise DiffScalerError(
            f"rows or controls are set, but this call has no {', '.join(_LATENTS)} to count the "
            f"batch by"
        )

    @property
    def layout(self) -> Any:
        """What the size is read off; the same object in every step of a sampling."""
        told = self.kwargs
        if isinstance(self.latents, list | tuple):
            return tuple(sample.shape for sample in self.latents)
        if self.latents.ndim > 3:
            return self.latents.shape
        named = tuple(told.get(name) for name in ("num_frames", "height", "width"))
        return (self.latents.shape, named, Same(told.get("img_ids")), str(told.get("img_shapes")))

    @property
    def prompts(self) -> tuple[int, int] | None:
        """(prompts, pictures per prompt) of the running pipeline, or None."""
        if not self.running:
            return None
        told = [v for n, v in self.running.items() if n in _PER_PROMPT and v is not None]
        return self.running["batch_size"], int(told[0]) if told else 1

    def size(self) -> tuple[int, int]:
        """Returns (h, w) of the latents that are drawn.

        Raises:
            DiffScalerError: The call does not show it.
        """
        latents, told = self.latents, self.kwargs
        if isinstance(latents, list | tuple):
            latents = latents[0]
        elif latents.ndim == 3:
            found = self._size_of_tokens(told)
            if found is not None:
                return found
            raise DiffScalerError(
                f"cannot tell the size that is drawn from this call of "
                f"{type(self.model).__name__}: it has no img_ids, img_shapes, or height and width"
            )
        height, width = latents.shape[-2:]
        return int(height), int(width)

    def _size_of_tokens(self, told: Mapping[str, Any]) -> tuple[int, int] | None:
        form = token_form(type(self.model).__name__)
        patch = (form.patch if form is not None else 0) or 1
        if told.get("height") is not None and told.get("width") is not None:
            return int(told["height"]), int(told["width"])
        if told.get("img_shapes"):
            shape = told["img_shapes"][0]
            while isinstance(shape[0], list | tuple):  # reference pictures come behind it
                shape = shape[0]
            return int(shape[1]) * patch, int(shape[2]) * patch
        ids = told.get("img_ids")
        if not isinstance(ids, Tensor):
            return None
        ids = ids[0] if ids.ndim == 3 else ids
        own = ids[ids[:, 0] == 0]  # reference pictures have another first number
        rows, columns = own[:, 1:3].amax(0).tolist()
        return (int(rows) + 1) * patch, (int(columns) + 1) * patch

    @property
    def family(self) -> Family | None:
        """The denoiser's architecture, or None if nobody knows it."""
        name = type(self.model).__name__
        return next((f for f in FAMILIES.values() if name in f.classes), None)

    def frames(self) -> int:
        """Returns how many frames of latents are drawn, 1 for pictures."""
        latents, family = self.latents, self.family
        if isinstance(latents, list | tuple):
            return int(latents[0].shape[1])
        if latents.ndim == 5:
            # a 2-dimensional patch embedding sees frames as rows, which come before the channels
            folds = family is not None and "fold" in family.row_layouts.values()
            return int(latents.shape[1 if folds else 2])
        told = self.kwargs.get("num_frames") if latents.ndim == 3 else None
        return 1 if told is None else int(told)

    @property
    def text_layout(self) -> Any:
        """What `text_lengths` is read off; the same object in every step of a sampling."""
        text = self.kwargs.get("encoder_hidden_states")
        shape = text.shape if isinstance(text, Tensor) else None
        return shape, Same(self.kwargs.get("encoder_attention_mask"))

    def text_lengths(self) -> tuple[int, ...]:
        """Returns how many text tokens come before the picture's, one number or one per row.

        Empty where nothing but text comes beside the picture, or the text behind it.
        """
        family, told = self.family, self.kwargs
        if family is None or family.text != "first":
            return ()
        text, mask = told.get("encoder_hidden_states"), told.get("encoder_attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:  # the model leaves out what it hides
            return tuple(int(length) for length in mask.sum(dim=1).tolist())
        if family.tokens not in OPEN_ENDED or not isinstance(text, Tensor):
            return ()
        return (int(text.shape[1]),)

    @property
    def pipe(self) -> Any:
        """The pipeline that is running, or None."""
        return self.running.get("self")

    @property
    def is_unconditional(self) -> bool:
        """Says whether all of this call is the unconditional half of guidance by two calls."""
        told = self.kwargs.get("encoder_hidden_states")
        return told is not None and any(
            value is told for name, value in self.running.items() if name.startswith(_UNCONDITIONAL)
        )

    def progress(self, scheduler: Any) -> float:
        """Returns the share of the sampling's steps that are done, 0 at the first."""
        steps = self._steps(scheduler)
        done = self.index(scheduler) - self._first(scheduler, steps)
        return done / len(steps)

    def index(self, scheduler: Any) -> int:
        """Returns which of `scheduler.timesteps` this call is for; their number after the last."""
        steps = self._steps(scheduler)
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = self._first(scheduler, steps)
            if not hasattr(scheduler, "step_index"):  # else it is known from the first step on
                now = self.kwargs.get("timestep", self.args[1] if len(self.args) > 1 else steps[0])
                now = torch.as_tensor(now).flatten()[0].to(steps)
                index += int((steps - now).abs().argmin())
        return int(index)

    def _first(self, scheduler: Any, steps: Tensor) -> int:
        """Returns which of `scheduler.timesteps` the sampling begins at."""
        first = getattr(scheduler, "begin_index", None)
        return len(scheduler.timesteps) - len(steps) if first is None else int(first)

    def _steps(self, scheduler: Any) -> Tensor:
        """Returns the timesteps of this sampling: where it begins with a picture, the last few."""
        every, own = scheduler.timesteps, self.running.get("timesteps")
        if isinstance(own, Tensor) and 1 < len(own) < len(every):
            if torch.equal(every[-len(own) :].to(own), own):  # DiT calls the batch's so, too
                return own
        return torch.as_tensor(every)


class Same:
    """Equal only to itself, for keys; keeps what it is given alive."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def spread(
    count: int, images: int | None, call: Call, what: str, noun: str, *, counts: bool = True
) -> tuple[list[int], int]:
    """Returns which entry each sample of the batch belongs to, and how many halves the batch has.

    Each prompt's pictures lie together (repeat_interleave); classifier-free guidance in one batch
    puts a second half, in the same order, behind the first (tile), whichever half is the
    unconditional one. Guidance by two calls has batches without halves.

    Args:
        count: Entries that the user gave, one per prompt; 0: one for all.
        images: Pictures per prompt, or None: ask the running pipeline.
        call: The call.
        what: What the user called, for messages.
        noun: What it was given, in the plural.
        counts: Whether it takes num_images_per_prompt.

    Raises:
        DiffScalerError: The batch does not fit the entries.
    """
    prompts, batch = None, call.batch
    if images is None and call.prompts is not None:
        prompts, images = call.prompts
    if not count:
        alone = prompts is None or images is None or batch % (prompts * images)
        return [0] * batch, 0 if alone else batch // (prompts * images)  # type: ignore[operator]
    if prompts is not None and prompts != count:
        hint = " (or say num_images_per_prompt= as well, should this pipeline count pictures as "
        raise DiffScalerError(
            f"{what} got {count} {noun}, but the pipeline runs {prompts} prompts: give one entry "
            f"per prompt, None for {'the base' if counts else 'none'}"
            + (hint + "prompts)" if counts else "")
        )
    if images is None:
        images, halves = 1, int(batch == count)
    else:
        halves = batch // (count * images) if batch % (count * images) == 0 else 0
    if not halves:
        raise DiffScalerError(
            f"{count} {noun} do not fit a batch of {batch}: "
            + (
                f"outside a diffusers pipeline say how the batch is built: "
                f"{what}(…, num_images_per_prompt=…)"
                if counts
                else f"give one for all, or {what}({noun}=…) one per prompt of a diffusers pipeline"
            )
        )
    return [entry for entry in range(count) for _ in range(images)] * halves, halves


def unconditional_rows(call: Call, halves: int) -> list[bool]:
    """Returns which samples of the batch are guidance's unconditional ones.

    Args:
        call: The call.
        halves: From `spread`; 0: unknown.

    Raises:
        DiffScalerError: Nobody can tell.
    """
    if halves == 1:
        return [call.is_unconditional] * call.batch
    guidance = "uncond_first" if call.family is None else call.family.guidance
    if halves != 2:
        raise DiffScalerError(
            f"control_in_uncond=False: cannot tell which of a batch of {call.batch} are "
            f"unconditional; run it in a diffusers pipeline, or leave control_in_uncond=True"
        )
    half = call.batch // 2
    first = guidance != "cond_first"
    return [first] * half + [not first] * half


def given_by_name(
    names: Sequence[str], given: Any, noun: str, absent: str, *, is_one: bool
) -> dict[str, Any]:
    """Returns what a user gave each of some tasks, name -> that, without what is None.

    Args:
        names: The tasks that are chosen.
        given: One for all tasks; one for each task or None, in a list; or {name: one}.
        noun: What it is, in the plural, for messages.
        absent: What None means, for messages.
        is_one: True: a list or mapping is one for all tasks.

    Raises:
        UnknownNameError: Something for a task that is not chosen.
        DiffScalerError: Another number of them than tasks.
    """
    if isinstance(given, Mapping) and not is_one:
        by_name = dict(given)
    elif isinstance(given, list | tuple) and not is_one:
        if len(given) != len(names):
            raise DiffScalerError(
                f"{len(given)} {noun} for {len(names)} tasks: give one for each, None for {absent}"
            )
        by_name = dict(zip(names, given, strict=True))
    else:
        by_name = dict.fromkeys(names, given)
    for name in by_name:
        if name not in names:
            raise unknown(f"task in {noun}:", name, names)
    return {name: own for name, own in by_name.items() if own is not None}
