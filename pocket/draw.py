"""Draws the pocket base's pictures from freely licensed fonts, one class folder per word.

    python pocket/draw.py --out DIR --set base --per-word 32 --seed 0

Pictographs come from Noto Color Emoji (SIL OFL 1.1), letters from DejaVu Sans. A picture is fixed
by (word, seed, index): the same three numbers drawn in another style give the same pose, so two
sets drawn with one seed are aligned pairs (an outline and its picture, for a control task).
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from styles import PAINTERS, Floats
from words import FLIPPABLE, LETTERS, PICTOGRAPHS, SETS, SHAPES

SIZE = 128
GLYPH = 109  # the one size at which Noto Color Emoji stores its bitmaps
CANVAS = 176  # a glyph's own square: room to rotate without cutting corners
EMOJI_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "NotoColorEmoji.ttf",
)
LETTER_FONTS = ("/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf", "DejaVuSans-Bold.ttf")


class FontMissingError(RuntimeError):
    """A font that the pictures are drawn with is not on this machine."""


def _load(candidates: Sequence[str], size: int, package: str) -> ImageFont.FreeTypeFont:
    for path in candidates:
        try:
            return ImageFont.truetype(path, size)
        except OSError:
            continue
    raise FontMissingError(
        f"no font at {', '.join(candidates)}: install the package {package} "
        f"(Debian, Ubuntu: apt-get install {package}) or name a file with --font"
    )


def _matplotlib_letters() -> tuple[str, ...]:
    """DejaVu as matplotlib ships it, for machines without the system package."""
    try:
        import matplotlib
    except ImportError:
        return ()
    return (str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"),)


@functools.cache
def glyph(word: str, font: str | None = None) -> Image.Image:
    """One subject, centred by its own ink, RGBA CANVAS x CANVAS, longest side 120 px."""
    big = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    pen = ImageDraw.Draw(big)
    if word in PICTOGRAPHS:
        face = _load((font,) if font else EMOJI_FONTS, GLYPH, "fonts-noto-color-emoji")
        big = _pictograph(PICTOGRAPHS[word], face)
    elif word in LETTERS:
        face = _load((*LETTER_FONTS, *_matplotlib_letters()), 140, "fonts-dejavu-core")
        text, colour = LETTERS[word]
        pen.text((CANVAS / 2, CANVAS / 2), text, font=face, fill=(*colour, 255), anchor="mm")
    elif word in SHAPES:
        big = _shape(word).resize((CANVAS, CANVAS), Image.Resampling.LANCZOS)
    else:
        raise ValueError(f"no such word: {word!r}")
    box = big.getbbox()
    if box is None:
        raise FontMissingError(f"the font has no picture for {word!r}: use Noto Color Emoji")
    ink = big.crop(box)
    scale = 120 / max(ink.size)
    ink = ink.resize(
        (round(ink.width * scale), round(ink.height * scale)), Image.Resampling.LANCZOS
    )
    out = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    out.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return out


def _pictograph(text: str, face: ImageFont.FreeTypeFont) -> Image.Image:
    """A colour glyph with its true alpha, RGBA CANVAS x CANVAS.

    Pillow composites colour glyphs, so on a transparent page their soft edges darken. Drawn once
    on black and once on white, colour and alpha follow exactly.
    """
    pages = []
    for paper in ("black", "white"):
        page = Image.new("RGB", (CANVAS, CANVAS), paper)
        ImageDraw.Draw(page).text((20, 20), text, font=face, embedded_color=True)
        pages.append(np.asarray(page, dtype=np.float32))
    alpha = 255 - (pages[1] - pages[0]).mean(axis=-1, keepdims=True)
    colour = np.clip(pages[0] * 255 / np.maximum(alpha, 1), 0, 255)
    pixels = np.concatenate([colour, np.clip(alpha, 0, 255)], axis=-1)
    return Image.fromarray((pixels + 0.5).astype(np.uint8), "RGBA")


def _shape(word: str) -> Image.Image:
    """A flat shape drawn at four times the size, so that resizing smooths its edge."""
    side = CANVAS * 4
    image = Image.new("RGBA", (side, side), (*SHAPES[word], 0))
    pen, low, high = ImageDraw.Draw(image), side * 0.16, side * 0.84
    if word == "circle":
        pen.ellipse((low, low, high, high), fill=(*SHAPES[word], 255))
    elif word == "square":
        pen.rectangle((low, low, high, high), fill=(*SHAPES[word], 255))
    else:
        pen.polygon(((side / 2, low), (high, high), (low, high)), fill=(*SHAPES[word], 255))
    return image


@dataclass(frozen=True)
class Poses:
    """How a subject may stand.

    Attributes:
        angle: Largest turn, degrees.
        scale: Least and largest share of the picture's side.
        shift: Largest shift, pixels.
    """

    angle: float
    scale: tuple[float, float]
    shift: float


#: Near the middle and large, as the base draws by itself; and anywhere, as only a control can ask.
NEAR, ANYWHERE = Poses(8, (0.74, 0.84), 5), Poses(30, (0.45, 0.80), 30)


def _pose(word: str, rng: random.Random, font: str | None, poses: Poses = NEAR) -> Floats:
    """The subject shifted, scaled and turned: (SIZE, SIZE, 4) in 0..1, not premultiplied.

    The affine map is applied in one resampling step (bicubic on premultiplied colour), so that
    edges stay crisp and carry no dark fringe.
    """
    angle = np.deg2rad(rng.uniform(-poses.angle, poses.angle))
    share = rng.uniform(*poses.scale)
    scale = 120 / (SIZE * share)  # source pixels for one target pixel
    reach = min(poses.shift, SIZE * (0.94 - share) / 2)  # the subject stays in the picture
    shift_x, shift_y = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    mirror = -1.0 if word in FLIPPABLE and rng.random() < 0.5 else 1.0
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    centre_x, centre_y = SIZE / 2 + shift_x, SIZE / 2 + shift_y
    matrix = (
        mirror * cos,
        mirror * sin,
        CANVAS / 2 - mirror * (cos * centre_x + sin * centre_y),
        -sin,
        cos,
        CANVAS / 2 - (-sin * centre_x + cos * centre_y),
    )
    source = glyph(word, font).convert("RGBa")
    turned = source.transform(
        (SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    pixels = np.asarray(turned, dtype=np.float32) / 255
    alpha = pixels[..., 3:]
    colour = pixels[..., :3] / np.maximum(alpha, 1e-3)
    return np.concatenate([np.clip(colour, 0, 1), alpha], axis=-1)


def _background(rng: random.Random) -> Floats:
    """A pastel plain or a soft top-to-bottom grade: (SIZE, 1, 3)."""
    hue, saturation = rng.random(), rng.uniform(0.12, 0.38)
    value, grade = rng.uniform(0.90, 1.0), rng.choice((0.0, rng.uniform(-0.12, 0.12)))
    top = np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    low = np.array(colorsys.hsv_to_rgb(hue, max(0.05, saturation + grade), value), np.float32)
    steps = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return top * (1 - steps) + low * steps


def draw(
    word: str,
    style: str = "plain",
    *,
    seed: int = 0,
    index: int = 0,
    font: str | None = None,
    poses: Poses = NEAR,
) -> Image.Image:
    """One picture, RGB SIZE x SIZE, fixed by its arguments.

    With one word, seed, index and poses every style shows the subject in the same place: the style
    "silhouette" is the mask of the others.
    """
    rng = random.Random(f"{seed}/{word}/{index}")
    pixels = _pose(word, rng, font, poses)
    if style == "silhouette":
        image = np.repeat(pixels[..., 3:], 3, axis=-1)
    elif style == "plain":
        alpha = pixels[..., 3:]
        image = pixels[..., :3] * alpha + _background(rng) * (1 - alpha)
    elif style in PAINTERS:
        image = PAINTERS[style](pixels, rng)
    else:
        raise ValueError(f"no such style: {style!r}")
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), "RGB")


def draw_arrays(
    words: Sequence[str],
    style: str,
    per_word: int,
    seed: int,
    font: str | None = None,
    poses: Poses = NEAR,
) -> NDArray[np.uint8]:
    """Many pictures, word by word: (len(words) * per_word, SIZE, SIZE, 3) uint8."""
    return np.stack(
        [
            np.asarray(draw(word, style, seed=seed, index=index, font=font, poses=poses))
            for word in words
            for index in range(per_word)
        ]
    )


def sheet(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """A contact sheet, row by row."""
    rows = -(-len(images) // columns)
    width, height = images[0].size
    page = Image.new("RGB", (columns * (width + gap), rows * (height + gap)), "white")
    for i, image in enumerate(images):
        page.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return page


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for <word>/<n>.png")
    parser.add_argument("--set", dest="name", choices=SETS, default="base")
    parser.add_argument("--words", nargs="+", help="only these words (any of the table's)")
    parser.add_argument("--per-word", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", help="NotoColorEmoji.ttf, where it is not found by itself")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet here")
    args = parser.parse_args()
    words, style = SETS[args.name]
    words = tuple(args.words) if args.words else words
    shown: list[Image.Image] = []
    try:
        for word in words:
            folder = args.out / word
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(args.per_word):
                image = draw(word, style, seed=args.seed, index=index, font=args.font)
                image.save(folder / f"{index:04d}.png")
                shown += [image] if index == 0 else []
    except (FontMissingError, ValueError) as error:
        print(f"draw.py: {error}", file=sys.stderr)
        return 1
    if args.sheet:
        sheet(shown, 10).save(args.sheet)
    print(f"{len(words)} words x {args.per_word} pictures of set {args.name} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
