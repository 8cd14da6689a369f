"""ComfyUI's IMAGE, (B, H, W, 3) from 0 to 1, a task file's thumbnail, and colours of latents."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.thumbnails import decode_thumbnail, encode_thumbnail

_NONE = (1, 64, 64, 3)


def thumbnail_of(task: TaskAdapter) -> Tensor:
    """Returns a task's picture as an IMAGE, a small black one if it has none."""
    uri = task.modelspec.get("thumbnail")
    if not uri:
        return torch.zeros(_NONE)
    return torch.from_numpy(np.asarray(decode_thumbnail(uri), np.float32) / 255)[None]


def check_image(image: Tensor) -> None:
    """Says whether something is an IMAGE with pictures in it.

    Raises:
        DiffScalerError: Other dimensions, channels, or nothing.
    """
    if image.ndim != 4 or not image.numel() or image.shape[3] not in (1, 3, 4):
        raise DiffScalerError(f"an image is (B, H, W, 1, 3 or 4), got {tuple(image.shape)}")


def as_masks(mask: Tensor, what: str) -> Tensor:
    """Returns a MASK, (H, W), (N, H, W) or (N, 1, H, W), as (N, 1, H, W) in float32.

    Raises:
        DiffScalerError: It is none; `what` says whose.
    """
    wrong = mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1)
    if wrong or not mask.numel():
        raise DiffScalerError(f"{what} must be a mask (N, H, W), got {tuple(mask.shape)}")
    return mask.detach().float().reshape(-1, 1, *mask.shape[-2:])


def as_thumbnail(image: Tensor) -> str:
    """Returns the first picture of an IMAGE as it is stored in a task file.

    Raises:
        DiffScalerError: It is none.
    """
    check_image(image)
    colours = image[0, ..., :3].float().nan_to_num().expand(*image.shape[1:3], 3)
    pixels = (colours.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return encode_thumbnail(Image.fromarray(pixels.numpy()))


def preview_colours(form: Any) -> Callable[[Tensor], Tensor] | None:
    """Returns what turns latents (B, C, h, w) into ComfyUI's preview colours, (B, 3, h, w).

    They are about −1..1 and not cut off there, where a gradient would end.

    Args:
        form: A model's `latent_format`; None is returned if it has no colours of pictures.
    """
    if form.latent_rgb_factors is None or form.latent_dimensions != 2:
        return None

    def colours(latents: Tensor) -> Tensor:
        factors = torch.tensor(form.latent_rgb_factors).to(latents)
        bias = torch.tensor(form.latent_rgb_factors_bias or [0.0] * 3).to(latents)
        return (latents.movedim(1, -1) @ factors + bias).movedim(-1, 1)

    return colours
