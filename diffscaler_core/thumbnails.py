"""A task file's picture: ModelSpec's `thumbnail`, a data URI in the header. Needs Pillow."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING

from .errors import DiffScalerError

if TYPE_CHECKING:
    from PIL.Image import Image

#: Longest side of a picture we store; one that we read may be larger, up to _MOST_PIXELS.
SIDE = 256
_MOST_PIXELS = 2048 * 2048
_MOST_LETTERS = 4 * 2**20
_URI = re.compile(r"data:image/(jpeg|png|webp);base64,(?P<data>[A-Za-z0-9+/=\s]*)")


def encode_thumbnail(image: Image) -> str:
    """Returns a picture as the data URI of a small JPEG."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def decode_thumbnail(uri: str) -> Image:
    """Returns the picture in a data URI, in RGB.

    The text comes out of somebody's file, so that nothing but a small JPEG, PNG or WebP is opened.

    Raises:
        DiffScalerError: Anything else.
    """
    from PIL import Image

    found = _URI.fullmatch(uri) if len(uri) <= _MOST_LETTERS else None
    if found is None:
        raise DiffScalerError("the file's thumbnail is no data URI of a small JPEG, PNG or WebP")
    try:
        data = base64.b64decode(found["data"], validate=False)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise DiffScalerError(
                    f"the file's thumbnail is too large: {image.width} × {image.height}"
                )
            return image.convert("RGB")
    except (
        binascii.Error,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, DiffScalerError):
            raise
        raise DiffScalerError(f"the file's thumbnail is broken: {error}") from error
