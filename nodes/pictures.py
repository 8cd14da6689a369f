"""ComfyUI's IMAGE, (B, H, W, 3) from 0 to 1, to and from a task file's thumbnail."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffscaler_core import TaskAdapter
from ..diffscaler_core.thumbnails import decode_thumbnail, encode_thumbnail

_NONE = (1, 64, 64, 3)


def thumbnail_of(task: TaskAdapter) -> Tensor:
    """Returns a task's picture as an IMAGE, a small black one if it has none."""
    uri = task.modelspec.get("thumbnail")
    if not uri:
        return torch.zeros(_NONE)
    return torch.from_numpy(np.asarray(decode_thumbnail(uri), np.float32) / 255)[None]


def as_thumbnail(image: Tensor) -> str:
    """Returns the first picture of an IMAGE as it is stored in a task file."""
    pixels = (image[0, ..., :3].float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return encode_thumbnail(Image.fromarray(pixels.numpy()))
