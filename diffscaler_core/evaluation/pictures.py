"""The picture grid: a row of pictures per line of the table, and the strips it is made of."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import write_whole
from ..training.preview import grid

_GAP = 4  # pixels round labels and rows


def save_strip(path: Path, pictures: Sequence[Tensor]) -> None:
    """Writes pictures (channels, S, S) in −1..1 side by side as one PNG."""
    write_whole(path, _png(grid(pictures, len(pictures))))


def load_strip(path: Path) -> list[Tensor] | None:
    """Returns the pictures of a strip, or None if there is none that can be read."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (OSError, SyntaxError):
        return None
    side = pixels.shape[0]
    return list((torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1).split(side, 2))


def labelled_grid(rows: Sequence[tuple[str, Sequence[Tensor]]]) -> Any:
    """Returns one Pillow image: each row's pictures side by side, its label on their left.

    Args:
        rows: (label, pictures (channels, S, S) in −1..1); all of one size.
    """
    from PIL import Image, ImageDraw, ImageFont

    strips = [(label, grid(pictures, len(pictures))) for label, pictures in rows]
    side = strips[0][1].height
    font = ImageFont.load_default(size=min(16, max(9, side // 8)))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(measure.textlength(label, font=font)) for label, _ in strips) + 3 * _GAP
    width = left + max(strip.width for _, strip in strips)
    page = Image.new("RGB", (width, len(strips) * (side + _GAP) - _GAP), "white")
    pen = ImageDraw.Draw(page)
    for i, (label, strip) in enumerate(strips):
        top = i * (side + _GAP)
        pen.text((_GAP, top + side // 2), label, font=font, fill="black", anchor="lm")
        page.paste(strip, (left, top))
    return page


def save_grid(path: Path, rows: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """Writes `labelled_grid` as PNG, whole or not at all."""
    write_whole(path, _png(labelled_grid(rows)))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
