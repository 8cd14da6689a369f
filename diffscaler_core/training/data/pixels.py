"""Files' bytes become pixels: rotated, laid on white, cut to size. Knows pictures, no folders.

H and W are in pixels; sizes are (height, width), as tensors have them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..randomness import generator_for

#: Random crops are this share of the largest possible one, at least.
SMALLEST_CROP = 0.8
#: A bucket's long side is at most this many times its short side.
WIDEST = 2.0

Size = tuple[int, int]


@dataclass(frozen=True)
class View:
    """One way to look at a picture.

    Attributes:
        mirror: Left and right are swapped.
        crop: 0: the middle; else the number of a random crop.
    """

    mirror: bool = False
    crop: int = 0


def views_of(flip: bool, crops: int = 0) -> tuple[View, ...]:
    """Returns the views of each picture: as is, then `crops` random crops; each also mirrored."""
    sides = (False, True) if flip else (False,)
    return tuple(View(mirror, crop) for crop in range(crops + 1) for mirror in sides)


def decode_picture(data: bytes, channels: int = 3) -> Any:
    """Returns a file's picture (PIL) in RGB, or in grey for one channel.

    The camera's rotation is applied, and transparent pictures are laid on white. Of several frames
    it is the first.

    Raises:
        ValueError: It is broken; the message is the reason.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with _opened(data) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's convert would cut at 255
            values = np.asarray(image).astype(np.int64) >> 8
            image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")


def picture_size(data: bytes) -> Size:
    """Returns (height, width) after the camera's rotation, from the file's header alone.

    Raises:
        ValueError: It is no picture; the message is the reason.
    """
    with _opened(data) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides
    return (width, height) if turned else (height, width)


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    from PIL import Image

    if not data:
        raise ValueError("cannot be read: the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            yield opened
    # Pillow's readers raise these on bad bytes, by format; UnidentifiedImageError is an OSError.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        Image.DecompressionBombError,
    ) as error:
        reason = "no picture that Pillow knows" if "BytesIO" in str(error) else error
        raise ValueError(f"cannot be read: {reason}") from error


def check_size(have: Size, target: Size) -> None:
    """Refuses pictures that would have to grow to more than twice their size.

    Raises:
        ValueError: The message is the reason.
    """
    (height, width), (h, w) = have, target
    if 2 * height < h or 2 * width < w:
        raise ValueError(f"{width}x{height} is too small for {w}x{h}")


def cropped_share(have: Size, target: Size) -> float:
    """Returns how much of a picture's area is lost when it is cut to another aspect ratio, 0..1."""
    (height, width), (h, w) = have, target
    ratio = (width * h) / (height * w)
    return 1 - min(ratio, 1 / ratio)


def cut(image: Any, target: Size, view: View, seed: int = 0) -> Tensor:
    """Returns one view of a picture as (channels, H, W) in −1..1: resized to cover, then cropped.

    Args:
        image: From `decode_picture`.
        target: (H, W).
        view: Which crop, and whether it is mirrored.
        seed: Of random crops: with the same seed, a picture and its control are cut alike.
    """
    import numpy as np
    from PIL import Image, ImageOps

    centre = (0.5, 0.5)
    if view.crop:
        draws = torch.rand(5, generator=generator_for(seed, "crop", view.crop)).tolist()
        share = SMALLEST_CROP + (1 - SMALLEST_CROP) * draws[0]
        width, height = image.width * share, image.height * share
        left, top = (image.width - width) * draws[1], (image.height - height) * draws[2]
        image = image.crop(tuple(map(round, (left, top, left + width, top + height))))
        centre = (draws[3], draws[4])
    height, width = target
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=centre)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(height, width, -1)
    pixels = pixels.flip(1) if view.mirror else pixels
    return pixels.permute(2, 0, 1) / 127.5 - 1


def load_picture(path: str | Path, size: int, channels: int = 3) -> Tensor:
    """Returns one picture as (channels, size, size) in −1..1: resized to cover, its middle kept.

    Raises:
        ValueError: Broken, or with a side shorter than half of `size`; the message is the reason.
    """
    try:
        image = decode_picture(Path(path).read_bytes(), channels)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    check_size((image.height, image.width), (size, size))
    return cut(image, (size, size), View())


def bucket_sizes(size: int, factor: int = 1) -> list[Size]:
    """Returns the shapes that pictures of any aspect ratio are cut to, of about equal area.

    Sides are multiples of `factor` (of a larger step where that is fine-grained, so that there are
    a few dozen shapes at most); areas at most size²; aspect ratios 1:2 to 2:1. The square is one.

    Args:
        size: Side of the square, a multiple of `factor`.
        factor: From `Denoiser.factor`.
    """
    step = factor * max(1, round(size / 16 / factor))
    found = {(size, size)}
    for short in range(step, size, step):
        long = size * size // short // step * step
        if short < long <= WIDEST * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(have: Size, buckets: Sequence[Size]) -> Size:
    """Returns the shape nearest in aspect ratio; of equally near ones the largest.

    The distance is |h·W − w·H|, as in diffusers' training scripts (`find_nearest_bucket`).
    """
    height, width = have

    def distance(bucket: Size) -> tuple[int, int]:
        h, w = bucket
        return abs(height * w - width * h), -h * w

    return min(buckets, key=distance)
