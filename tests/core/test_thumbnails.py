import base64
import io

import pytest
from PIL import Image

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.thumbnails import SIDE, decode_thumbnail, encode_thumbnail


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def _png(*size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_large_picture_comes_back_small_with_its_colours() -> None:
    picture = Image.new("RGBA", (1024, 512), (200, 30, 40, 255))
    uri = encode_thumbnail(picture)
    small = decode_thumbnail(uri)
    assert picture.size == (1024, 512)
    assert small.size == (SIDE, SIDE // 2)
    assert small.mode == "RGB"
    red, green, blue = small.getpixel((9, 9))  # type: ignore[misc]
    assert abs(red - 200) + abs(green - 30) + abs(blue - 40) < 20
    assert len(uri) < 20_000


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "https://example.org/x.png",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        _uri(b"no picture"),
        _uri(_png(8, 8)[:40]),
        _uri(_png(5000, 5000)),
        _uri(b"x" * 2**22),
    ],
    ids=["empty", "link", "text", "svg", "garbage", "cut", "huge", "long"],
)
def test_nothing_but_a_small_picture_is_opened(uri: str) -> None:
    with pytest.raises(DiffScalerError, match="thumbnail"):
        decode_thumbnail(uri)
