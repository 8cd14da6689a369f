"""Pictures side by side, each over its name: one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from .pictures import check_image

_BACKGROUND, _INK = "white", "black"
#: Height of the letters, as a share of a picture's smaller side, within these bounds.
_LETTERS, _SMALLEST, _LARGEST = 1 / 18, 13, 44
#: A longer name ends in "…".
_MOST_LINES = 2


def labelled_grid(images: Tensor, names: Sequence[str], columns: int = 0) -> Tensor:
    """Returns one picture of all, each with its name below it, (1, H', W', 3).

    Args:
        images: (N, H, W, 1, 3 or 4) in 0..1.
        names: N names, or none.
        columns: How many to put side by side; 0: as many as make the grid about square.

    Raises:
        DiffScalerError: Another number of names, or no pictures.
    """
    check_image(images)
    count, height, width = images.shape[:3]
    if names and len(names) != count:
        raise DiffScalerError(
            f"{len(names)} names for {count} pictures: write a line for each picture, or none"
        )
    columns = min(columns if columns > 0 else math.ceil(math.sqrt(count)), count)
    size = round(min(max(min(height, width) * _LETTERS, _SMALLEST), _LARGEST))
    font, gap, line = ImageFont.load_default(size), max(4, size // 2), round(size * 1.3)
    lines = [_wrapped(name, font, width) for name in names]
    below = max(map(len, lines), default=0) * line + (gap if any(lines) else 0)
    across, down = width + gap, height + below + gap
    page = Image.new(
        "RGB", (gap + columns * across, gap + math.ceil(count / columns) * down), _BACKGROUND
    )
    draw = ImageDraw.Draw(page)
    for i, picture in enumerate(images):
        left, top = gap + i % columns * across, gap + i // columns * down
        page.paste(_pixels(picture), (left, top))
        for k, text in enumerate(lines[i] if lines else ()):
            at = (left + width / 2, top + height + gap / 2 + k * line)
            draw.text(at, text, _INK, font, anchor="ma")
    return torch.from_numpy(np.asarray(page, np.float32) / 255)[None]


def _pixels(picture: Tensor) -> Image.Image:
    values = picture[..., :3].float().clamp(0, 1).expand(*picture.shape[:2], 3)
    return Image.fromarray((values * 255).round().to("cpu", torch.uint8).numpy())


def _wrapped(
    name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Returns a name as lines that fit a width; what is too long ends in "…"."""
    lines: list[str] = []
    for word in name.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], " ".join(lines[_MOST_LINES - 1 :])]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
