"""A control picture as a user has it, cut to the size that is drawn. Knows pictures, no models."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DiffScalerError

Size = tuple[int, int]


def as_picture(image: Any) -> Any:
    """Returns a picture as PIL in RGB, or as floats (3, H, W) in −1..1.

    Args:
        image: A PIL image (rotated as its camera says, laid on white where it is transparent); an
            array (H, W) or (H, W, channels); or a tensor (channels, H, W), or the same with a 1 in
            front. Whole numbers are 0..255, floats 0..1, or −1..1 if any is negative; 1, 3 or 4
            channels, of which the fourth is left out.

    Raises:
        DiffScalerError: Nothing of the kind.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        try:
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DiffScalerError(f"a control picture cannot be read: {error}") from error
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image
        pixels = torch.from_numpy(np.array(array))  # a copy: the user's may be read-only
        pixels = pixels.movedim(-1, -3) if pixels.ndim > 2 else pixels
    elif isinstance(image, Tensor):
        pixels = image.detach()
    else:
        raise DiffScalerError(
            f"a control picture is a PIL image, an array or a tensor, got {type(image).__name__}"
        )
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4) or not pixels.numel():
        raise DiffScalerError(
            f"a control picture has 1, 3 or 4 channels, an array (H, W, channels) or a tensor "
            f"(channels, H, W); got {type(image).__name__} {tuple(image.shape)}"
        )
    pixels = pixels[:3].expand(3, -1, -1)
    if not pixels.is_floating_point():
        bytes_ = pixels.clamp(0, 255).to("cpu", torch.uint8)
        return Image.fromarray(bytes_.permute(1, 2, 0).numpy())
    pixels = pixels.float()
    if not bool(torch.isfinite(pixels).all()):
        raise DiffScalerError("a control picture holds NaN or Inf")
    return (pixels if bool((pixels < 0).any()) else pixels * 2 - 1).clamp(-1, 1)


def cut_to(picture: Any, size: Size) -> Tensor:
    """Returns a picture as (1, 3, H, W) in −1..1: resized to cover, its middle kept.

    It is how training cuts pictures, so a control looks alike in both.

    Args:
        picture: From `as_picture`.
        size: (H, W).
    """
    import numpy as np
    from PIL import Image, ImageOps

    height, width = size
    if isinstance(picture, Tensor):
        return covered(picture.unsqueeze(0), size).clamp(-1, 1)
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    return pixels.permute(2, 0, 1).unsqueeze(0) / 127.5 - 1


def covered(pixels: Tensor, size: Size) -> Tensor:
    """Returns (B, C, *) resized to cover (H, W), its middle kept."""
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    scale = max(size[0] / height, size[1] / width)
    inner = [max(s, math.ceil(side * scale)) for s, side in zip(size, (height, width), strict=True)]
    pixels = F.interpolate(pixels, inner, mode="bicubic", antialias=True, align_corners=False)
    top, left = ((have - want) // 2 for have, want in zip(inner, size, strict=True))
    return pixels[..., top : top + size[0], left : left + size[1]]


def as_mask(mask: Any) -> Tensor:
    """Returns a mask as (1, 1, H, W) in 0..1.

    Args:
        mask: A PIL image (white: 1), an array or tensor (H, W), or the same with 1s in front, of
            floats in 0..1, whole numbers 0..255 or truth values.

    Raises:
        DiffScalerError: Nothing of the kind, or numbers outside 0..1.
    """
    import numpy as np
    from PIL import Image

    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.array(mask))
    if not isinstance(mask, Tensor):
        raise DiffScalerError(
            f"a mask is a PIL image, an array or a tensor, got {type(mask).__name__}"
        )
    values = mask.detach()
    if values.dtype != torch.bool and not values.is_floating_point():
        values = values / 255
    values = values.float()
    if values.ndim < 2 or not values.numel() or values.numel() != math.prod(values.shape[-2:]):
        raise DiffScalerError(f"a mask is (H, W), got {tuple(mask.shape)}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise DiffScalerError("a mask holds numbers in 0..1, got others")
    return values.reshape(1, 1, *values.shape[-2:])
