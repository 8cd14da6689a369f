"""Control pictures for stock pipelines: `with pipe.diffscaler_control(image): pipe(…)`.

A picture is encoded by the pipeline's own VAE at the denoiser's first call, when the size that is
drawn is known, and kept. Nothing of the pipeline changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ..errors import DiffScalerError
from ..pictures import as_mask, as_picture
from .control_request import ControlRequest
from .models import check_names, check_unfused, states_of


@contextmanager
def diffscaler_control(
    pipe: Any,
    image: Any,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    *,
    adapter_name: str | None = None,
    mask: Any = None,
    control_in_uncond: bool = True,
    as_latents: bool = False,
    num_images_per_prompt: int | None = None,
) -> Iterator[None]:
    """Gives a control task its picture until the context ends; nest it for several controls.

    The task acts where it has a picture, in its embedding and its blocks. Rows without one, and
    steps outside `start` to `end`, run the base and its other tasks. The picture is resized to
    cover the size that is drawn, and its middle is kept. Beside `diffscaler_rows` it acts in the
    rows that name it, or in all if none does.

    Args:
        pipe: The pipeline.
        image: A PIL image, an array (H, W, channels) or a tensor (channels, H, W), for all prompts;
            or a list with one of them, or None, per prompt (or a tensor or array of several).
        strength: Multiplies the task's own strength (1 for a task that is not active).
        start: Share of the sampling's steps before which the task rests, 0..1.
        end: Share of them from which it rests again, 0..1.
        adapter_name: Which task; may be left out while only one control task is loaded.
        mask: Where the control counts, (H, W) in 0..1; it is cut as the picture is. The task's
            affiners in the blocks run in the whole picture all the same.
        control_in_uncond: False: guidance's unconditional half runs without the control.
        as_latents: `image` holds latents (C, h, w), or (1, C, f, h, w), in the space of the model
            (shifted and scaled), of just the size that is drawn; no VAE is asked.
        num_images_per_prompt: Needed only where no diffusers pipeline makes the calls.

    Raises:
        DiffScalerError: No such control task, a fused one, numbers out of range, or something that
            is no picture; in the call: another number of pictures than prompts, no VAE, latents of
            another size or of other channels.
    """
    request = _request(
        pipe,
        image,
        (strength, start, end),
        adapter_name,
        mask,
        control_in_uncond,
        as_latents,
        num_images_per_prompt,
    )
    with ExitStack() as running:
        for state in states_of(pipe):
            if request.name in state.tasks:
                running.enter_context(state.controlled(request))
        yield


def set_diffscaler_control(
    pipe: Any,
    image: Any,
    strength: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    *,
    adapter_name: str | None = None,
    mask: Any = None,
    control_in_uncond: bool = True,
    as_latents: bool = False,
    num_images_per_prompt: int | None = None,
) -> None:
    """Gives a control task its picture until it is given another, or None; for notebooks.

    Arguments and errors are those of `diffscaler_control`; a context goes before what is set here.

    Args:
        pipe: The pipeline.
        image: As there; None takes the pictures away, of all control tasks or of `adapter_name`.
        strength: As there.
        start: As there.
        end: As there.
        adapter_name: As there.
        mask: As there.
        control_in_uncond: As there.
        as_latents: As there.
        num_images_per_prompt: As there.
    """
    if image is None:
        if adapter_name is not None:
            check_names(pipe, [adapter_name])
        for state in states_of(pipe):
            state.hold_control(adapter_name, None)
        return
    request = _request(
        pipe,
        image,
        (strength, start, end),
        adapter_name,
        mask,
        control_in_uncond,
        as_latents,
        num_images_per_prompt,
    )
    for state in states_of(pipe):
        if request.name in state.tasks:
            state.hold_control(request.name, request)


def _request(
    pipe: Any,
    image: Any,
    numbers: tuple[float, float, float],
    name: str | None,
    mask: Any,
    in_uncond: bool,
    as_latents: bool,
    images: int | None,
) -> ControlRequest:
    strength, start, end = map(float, numbers)
    if not math.isfinite(strength):
        raise DiffScalerError(f"a strength must be a finite number, got {strength}")
    if not 0 <= start <= end <= 1:
        raise DiffScalerError(
            f"start and end are shares of the steps, 0 <= start <= end <= 1; got {start}, {end}"
        )
    name = _control_task(pipe, name)
    check_unfused(pipe, "give a control to", [name])
    shared = not isinstance(image, list | tuple) and not _is_batch(image, as_latents)
    entries = [image] if shared else list(image)
    if not entries:
        raise DiffScalerError("a list of control pictures has one entry per prompt, got none")
    read = _as_latents if as_latents else as_picture
    known = {id(entry): None if entry is None else read(entry) for entry in entries}
    pictures = [known[id(entry)] for entry in entries]
    return ControlRequest(
        name,
        pipe,
        pictures,
        shared,
        strength,
        (start, end),
        None if mask is None else as_mask(mask),
        in_uncond,
        as_latents,
        images,
    )


def _is_batch(image: Any, as_latents: bool) -> bool:
    """Says whether this is several pictures, or latents, in one tensor or array."""
    ndim = getattr(image, "ndim", 0)
    return (ndim == 4 or (ndim == 5 and as_latents)) and len(image) > 1


def _as_latents(latents: Any) -> Tensor:
    """Returns latents as (1, C, h, w) or (1, C, f, h, w)."""
    is_tensor = isinstance(latents, Tensor) and latents.is_floating_point()
    if is_tensor and latents.ndim == 3:
        latents = latents.unsqueeze(0)
    if not is_tensor or latents.ndim not in (4, 5) or len(latents) != 1:
        kind = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise DiffScalerError(
            f"as_latents=True takes floats (C, h, w), or (1, C, f, h, w) for a video, got {kind}"
        )
    detached: Tensor = latents.detach()
    return detached


def _control_task(pipe: Any, name: str | None) -> str:
    """Returns the control task that is meant.

    Raises:
        DiffScalerError: There is none, there are several, or it is no control task.
    """
    tasks = {n: task for state in states_of(pipe) for n, task in state.tasks.items()}
    able = [n for n, task in tasks.items() if task.is_control]
    if name is not None:
        check_names(pipe, [name])
        if name not in able:
            raise DiffScalerError(
                f"task {name!r} takes no control picture; control tasks here: "
                f"{', '.join(able) or 'none'}"
            )
        return name
    if len(able) != 1:
        raise DiffScalerError(
            f"say which task the control is for, adapter_name=…; control tasks here: "
            f"{', '.join(able)}"
            if able
            else "no control task is loaded: pipe.load_diffscaler(…) one first"
        )
    return able[0]
