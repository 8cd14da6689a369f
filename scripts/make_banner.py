"""Draws the pack's banner and icon for the Comfy Registry: assets/banner.jpg and assets/icon.png.

    python scripts/make_banner.py

The banner's pictures are cut out of assets/contact_sheet.jpg, which `make demo` draws in a real
ComfyUI. The icon is assets/icon.svg as pixels; that file's rectangles are all it may hold.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import contact_sheet
from PIL import Image, ImageColor, ImageDraw, ImageFont

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WIDTH, HEIGHT = 1344, 576  # 21:9
ICON = 400
#: Where the icon's shapes are, without its margin.
INNER = (64, 64, 336, 336)
#: Drawn so many times larger and then reduced, as Pillow's shapes have hard edges.
FINER = 4

GROUND, PALE, GREY = "#1b1f2a", "#ffffff", "#a9b1c4"
SHEET = "contact_sheet"
#: Rows of the sheet -> (title, what stands below it, colour); columns of the banner.
ROWS = {
    "base, no task": ("frozen base", "3.8 M parameters", "#5b6478"),
    "task: ink": ("+ ink", "0.5 MB file", "#ffb347"),
    "task: neon": ("+ neon", "0.5 MB file", "#5ad1c4"),
}
WORDS = ("cat", "house")
#: A third task has words of its own; the base never saw any of them.
FRUITS = ("task: fruits", ("strawberry", "cherries"), ("+ fruits", "0.5 MB, new words", "#ff6f91"))
SIDE, GAP, LEFT = 176, 14, 566


def banner(sheet: Image.Image) -> Image.Image:
    """Returns the banner, drawn from a contact sheet."""
    page = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(page)
    with Image.open(ASSETS / "icon.png") as icon:
        inner = icon.convert("RGBA").crop(INNER)  # its rounded ground is the banner's own
    page.paste(inner.resize((92, 92), Image.Resampling.LANCZOS), (56, 84))
    draw.text((166, 84), "DiffScaler", PALE, _font(74))
    for line, text in enumerate(("One frozen diffusion model,", "many tiny tasks.")):
        draw.text((56, 218 + 46 * line), text, PALE, _font(36))
    facts = ("Each column is the same base with", "one small file added. Such tasks",
             "switch at once, stack exactly,", "and mix inside one batch.",
             "For ComfyUI and diffusers.")  # fmt: skip
    for line, text in enumerate(facts):
        draw.text((56, 340 + 33 * line), text, GREY, _font(23))
    columns = [(row, WORDS, told) for row, told in ROWS.items()] + [FRUITS]
    for column, (row, words, told) in enumerate(columns):
        _column(page, sheet, LEFT + column * (SIDE + GAP), row, words, told)
    return page


def _column(
    page: Image.Image,
    sheet: Image.Image,
    x: int,
    row: str,
    words: tuple[str, ...],
    told: tuple[str, str, str],
) -> None:
    title, below, colour = told
    draw, y = ImageDraw.Draw(page), 84
    draw.rectangle((x, y, x + SIDE - 1, y + 7), colour)
    for word in words:
        y += 22 if word == words[0] else SIDE + GAP
        page.paste(_cell(sheet, row, word).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
    draw.text((x, y + SIDE + 10), title, PALE, _font(25))
    draw.text((x, y + SIDE + 42), below, GREY, _font(18))


def _cell(sheet: Image.Image, row: str, word: str) -> Image.Image:
    """Returns the picture of a word in a row of the contact sheet."""
    rows = contact_sheet.SHEETS[SHEET][1]
    across = [cell.label for cell in rows[row]].index(word)
    x, y = contact_sheet.corner(list(rows).index(row), across)
    return sheet.crop((x, y, x + contact_sheet.SIZE, y + contact_sheet.SIZE))


def icon() -> Image.Image:
    """Returns assets/icon.svg as pixels (400, 400), transparent outside."""
    page = Image.new("RGBA", (ICON * FINER, ICON * FINER))
    draw = ImageDraw.Draw(page)
    for shape in ElementTree.parse(ASSETS / "icon.svg").getroot():
        if not shape.tag.endswith("}rect"):
            raise ValueError(f"icon.svg holds {shape.tag}; only rectangles are drawn")
        at = {name: FINER * float(shape.get(name, 0)) for name in ("x", "y", "width", "height")}
        corners = (at["x"], at["y"], at["x"] + at["width"] - 1, at["y"] + at["height"] - 1)
        fill = ImageColor.getrgb(shape.get("fill", "black"))
        draw.rounded_rectangle(corners, FINER * float(shape.get("rx", 0)), fill)
    return page.resize((ICON, ICON), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def main() -> None:
    """Writes both files."""
    icon().save(ASSETS / "icon.png", optimize=True)
    with Image.open(ASSETS / f"{SHEET}.jpg") as sheet:
        page = banner(sheet.convert("RGB"))
    page.save(ASSETS / "banner.jpg", quality=92, subsampling=0, optimize=True)


if __name__ == "__main__":
    main()
