"""Pictures in, pictures out, for the systems that draw a picture anew. Settings are theirs."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pictures import Size, as_mask, as_picture, cut_to
from ..task import TaskAdapter
from ..training.bases.pipelines import as_denoiser
from ..training.conditioning import Prompts, prompts_for
from ..training.denoiser import Denoiser
from ..training.preview import to_image
from ..training.randomness import generator_for
from .guidance import Guide, sample_guided
from .translate import Tasks, translate


def translate_picture(
    base: Any,
    picture: Any,
    source: Tasks = None,
    target: Tasks = None,
    *,
    prompt: str = "",
    target_prompt: str | None = None,
    words: TaskAdapter | None = None,
    size: int | None = None,
    mask: Any = None,
    guidance: float = 3.0,
    **settings: Any,
) -> Any:
    """Returns a picture of one task as another's, a Pillow image; see `translate`.

    Args:
        base: A diffusers pipeline, or a Denoiser.
        picture: A Pillow image, array or tensor; see `diffscaler_core.pictures`.
        source: The task it is of; None: the base's own.
        target: The task it becomes one of.
        prompt: What it shows.
        target_prompt: What it is to show; None: the same.
        words: Stored prompts, for a base without text encoder.
        size: Side of a square of as many pixels as are drawn; None: the base's.
        mask: Where it may change: white, 1.
        guidance: Of the target.
        settings: As in `translate`.
    """
    denoiser = as_denoiser(base)
    pixels = _fitted(denoiser, picture, size)
    to_show = prompt if target_prompt is None else target_prompt
    prompts = _prompts(denoiser, [prompt, to_show], words)
    where = None if mask is None else as_mask(mask).to(denoiser.device)
    latents = _encoded(denoiser, pixels)
    found = translate(
        denoiser, latents, source, target,
        source_prompt=prompts(torch.tensor([0])), target_prompt=prompts(torch.tensor([1])),
        null=prompts.null(1), guidance=guidance,
        mask=None if where is None else _resized(where, latents), **settings,
    )  # fmt: skip
    return _shown(denoiser, found, pixels, where)


def guided_picture(
    base: Any,
    guide: Guide,
    *,
    prompt: str = "",
    words: TaskAdapter | None = None,
    picture: Any = None,
    mask: Any = None,
    size: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Returns a picture that losses led, a Pillow image; see `sample_guided`.

    Args:
        base: A diffusers pipeline, or a Denoiser; tasks on it take part.
        guide: The losses, and how they lead.
        prompt: What to draw.
        words: Stored prompts, for a base without text encoder.
        picture: A picture to start from, or to keep outside the mask.
        mask: Where it may change: white, 1.
        size: As in `translate_picture`.
        seed: Of the noise.
        settings: As in `sample_guided`.
    """
    denoiser = as_denoiser(base)
    blank = torch.zeros(3, *([size or denoiser.size or 512] * 2))
    pixels = _fitted(denoiser, blank if picture is None else picture, size)
    prompts = _prompts(denoiser, [prompt], words)
    latents = _encoded(denoiser, pixels)
    noise = torch.randn(latents.shape, generator=generator_for(seed, "guided"))
    where = None if mask is None else as_mask(mask).to(denoiser.device)
    with denoiser.held():
        found = sample_guided(
            denoiser, guide, prompts(torch.tensor([0])), prompts.null(1), noise,
            source=None if picture is None else latents,
            mask=None if where is None else _resized(where, latents), **settings,
        )  # fmt: skip
    return _shown(denoiser, found, pixels, where)


def fitting(height: int, width: int, side: int, factor: int) -> Size:
    """Returns the size of a picture drawn with side² pixels or so, its shape about kept."""
    scale = side / math.sqrt(height * width)
    return tuple(max(factor, round(s * scale / factor) * factor) for s in (height, width))  # type: ignore[return-value]


def _fitted(denoiser: Denoiser, picture: Any, size: int | None) -> Tensor:
    """Returns (1, 3, H, W) in −1..1, in a size that the base draws."""
    image = as_picture(picture)
    if isinstance(image, Tensor):
        height, width = image.shape[-2:]
    else:
        width, height = image.size
    side = size or denoiser.size or round(math.sqrt(height * width))
    return cut_to(image, fitting(height, width, side, denoiser.factor)).to(denoiser.device)


def _prompts(denoiser: Denoiser, names: list[str], words: TaskAdapter | None) -> Prompts:
    return prompts_for(denoiser, names, words=words).place(denoiser.device)


@torch.no_grad()
def _encoded(denoiser: Denoiser, pixels: Tensor) -> Tensor:
    return pixels if denoiser.encode is None else denoiser.encode(pixels)


def _resized(mask: Tensor, latents: Tensor) -> Tensor:
    return F.interpolate(mask, latents.shape[-2:], mode="area")


@torch.no_grad()
def _shown(denoiser: Denoiser, latents: Tensor, pixels: Tensor, mask: Tensor | None) -> Any:
    """Returns the picture; outside the mask the pixels are those that came in."""
    found = latents if denoiser.decode is None else denoiser.decode(latents)
    if mask is not None:
        where = F.interpolate(mask, found.shape[-2:], mode="bilinear")
        found = where * found + (1 - where) * pixels.to(found)
    return to_image(found[0].float().cpu())
