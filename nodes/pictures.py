"""ComfyUI's IMAGE, (B, H, W, 3) from 0 to 1, to and from a task file's thumbnail."""

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


def as_thumbnail(image: Tensor) -> str:
    """Returns the first picture of an IMAGE as it is stored in a task file.

    Raises:
        DiffScalerError: It is none.
    """
    check_image(image)
    colours = image[0, ..., :3].float().nan_to_num().expand(*image.shape[1:3], 3)
    pixels = (colours.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return encode_thumbnail(Image.fromarray(pixels.numpy()))
