"""A ranking as one picture: a bar per candidate. Needs Pillow alone, which every ComfyUI has."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .ranking import Fit, Ranking

#: Colours that also people who see few colours can tell apart (Okabe and Ito).
_BETTER, _ANSWER, _WORSE, _FAINT, _INK = "#56B4E9", "#009E73", "#D0D0D0", "#8a8a8a", "#202020"
_ROW, _GAP, _BAR = 28, 14, 330  # pixels: of a row, round things, the longest bar
_TITLE = 52
_MOST = 24  # candidates in the picture; the table has them all


def draw_ranking(ranking: Ranking, picture: Tensor | None = None) -> Any:
    """Returns a Pillow image: how much better than the base each candidate denoises, best first.

    Bars show base − candidate with whiskers of one standard error; a bar with "<<" goes on.

    Args:
        ranking: Of `which_task`.
        picture: What was ranked, (C, H, W) in −1..1, to be shown on the left.
    """
    from PIL import Image, ImageDraw

    fits = ranking.fits[:_MOST]
    small, large = _font(13), _font(16)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = max(measure.textlength(fit.name, font=small) for fit in fits)
    facts = max(measure.textlength(_fact(fit), font=small) for fit in fits)
    shown = None if picture is None else _thumbnail(picture)
    left = _GAP if shown is None else shown.width + 2 * _GAP
    start = left + int(labels) + _GAP
    title = _short(measure, ranking.sentence(), large, 900)
    width = max(start + _BAR + int(facts) + 2 * _GAP, int(measure.textlength(title, large)) + 28)
    least = 0 if shown is None else shown.height
    height = _TITLE + max(len(fits) * _ROW + 22, least) + _GAP
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, _TITLE // 2), title, font=large, fill=_INK, anchor="lm")
    if shown is not None:
        page.paste(shown, (_GAP, _TITLE))
    low, high = _span(fits)

    def x_of(value: float) -> float:
        return start + (min(max(value, low), high) - low) / (high - low) * _BAR

    for row, fit in enumerate(fits):
        middle = _TITLE + row * _ROW + _ROW // 2
        colour = _BETTER if fit.fits(ranking.threshold, ranking.least) else _WORSE
        colour = _ANSWER if fit.name == ranking.answer else colour
        pen.text((start - _GAP // 2, middle), fit.name, font=small, fill=_INK, anchor="rm")
        ends = sorted((x_of(0.0), x_of(-fit.difference)))
        pen.rectangle((ends[0], middle - 9, ends[1], middle + 9), fill=colour)
        pen.text((start + _BAR + _GAP, middle), _fact(fit), font=small, fill=_FAINT, anchor="lm")
        if -fit.difference < low:
            pen.text((start + 5, middle), "<<", font=small, fill=_INK, anchor="lm")
            continue
        whisker = [x_of(-fit.difference + side * fit.standard_error) for side in (-1, 1)]
        pen.line((whisker[0], middle, whisker[1], middle), fill=_INK, width=1)
        for x in whisker:
            pen.line((x, middle - 4, x, middle + 4), fill=_INK, width=1)
    below, base = _TITLE + len(fits) * _ROW, x_of(0.0)
    pen.line((base, _TITLE - 4, base, below + 4), fill=_INK, width=1)
    said = "right of the line: denoises better than the base"
    half = measure.textlength(said, font=_font(11)) / 2
    centre = max(min(base, width - half - _GAP), half + _GAP)
    pen.text((centre, below + 13), said, font=_font(11), fill=_FAINT, anchor="mm")
    return page


def _fact(fit: Fit) -> str:
    return f"{fit.share:+.1%}, {fit.sigmas:+.1f} std. errors, {fit.probes} probes"


def _span(fits: tuple[Fit, ...]) -> tuple[float, float]:
    """Returns the values at the ends of the bars: all of what is better, as much of what is worse.

    What is far worse than the base would press the rest flat.
    """
    values = [(-f.difference, f.standard_error) for f in fits]
    high = max(0.0, *(value + error for value, error in values))
    low = min(0.0, *(value - error for value, error in values))
    reach = high or -low or 1.0
    return max(low, -reach), max(high, 0.15 * reach) if math.isfinite(reach) else 1.0


def _short(measure: Any, text: str, font: Any, width: int) -> str:
    while measure.textlength(text, font=font) > width:
        text = text[: -2 - text.endswith("…")] + "…"
    return text


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _thumbnail(picture: Tensor) -> Any:
    from PIL import Image

    colours = picture.detach().float().cpu().nan_to_num().clamp(-1, 1)
    colours = colours.expand(3, *colours.shape[1:]) if colours.shape[0] == 1 else colours[:3]
    pixels = ((colours + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((160, 160))
    return image
