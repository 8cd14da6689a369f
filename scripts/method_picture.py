"""Makes docs/images/affiner.png: a frozen layer with one task's affiner on it.

.venv/bin/python scripts/method_picture.py
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "affiner.png"
INK, GREY, HEIGHT = "#1f2933", "#52606d", 0.92
#: Fill and edge of a box: of the base, of the task, without parameters.
FROZEN, TRAINED, PLAIN = ("#d9e2ec", "#829ab1"), ("#fde3c1", "#de8b1f"), ("white", GREY)


def box(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    note: str,
    *,
    width: float = 2.4,
    colours: tuple[str, str] = TRAINED,
    sides: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Draws a box with its middle at (x, y), a formula in it and a note below the formula.

    `sides` are the heights of its left and right edge, over the whole height.
    """
    left, right = x - width / 2, x + width / 2
    (one, other), half = sides, HEIGHT / 2
    corners = [
        (left, one * half),
        (right, other * half),
        (right, -other * half),
        (left, -one * half),
    ]
    fill, edge = colours
    points = [(at, y + up) for at, up in corners]
    axes.add_patch(Polygon(points, fc=fill, ec=edge, lw=1.6, joinstyle="round"))
    axes.text(x, y + 0.15, text, ha="center", va="center", fontsize=13.5, color=INK)
    axes.text(x, y - 0.22, note, ha="center", va="center", fontsize=8.4, color=GREY)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """Draws a line through some points, with a head at its last."""
    for start, end in itertools.pairwise(points):
        form = "-|>" if end is points[-1] else "-"
        axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle=form, mutation_scale=13, lw=1.5, color=INK, shrinkA=0,
                shrinkB=0,
            )
        )  # fmt: skip


def node(axes: Axes, x: float, y: float, sign: str) -> None:
    """Draws a round node: a sum or a product."""
    axes.add_patch(Circle((x, y), 0.24, fc="white", ec=INK, lw=1.5, zorder=3))
    axes.text(x, y - 0.01, sign, ha="center", va="center", fontsize=15, color=INK, zorder=4)


def label(axes: Axes, x: float, y: float, text: str, **how: object) -> None:
    """Writes a small text."""
    options = {"ha": "center", "va": "center", "fontsize": 9.2, "color": GREY} | how
    axes.text(x, y, text, **options)


def draw(axes: Axes) -> None:
    """Draws the whole picture."""
    frozen, scale, shift, space = 5.0, 3.45, 2.15, 0.7  # heights of the four paths
    split, sums, end = 0.9, 9.0, 11.3  # where x branches off, where parts add up, where y' does
    arrow(axes, (0.2, frozen), (2.0, frozen))
    label(axes, 0.2, frozen + 0.28, "$x$", fontsize=15, color=INK)
    label(axes, 0.5, frozen - 0.26, "input")
    box(axes, 3.2, frozen, r"$W x + \hat b$", "the base's own layer", colours=FROZEN)
    arrow(axes, (4.4, frozen), (end - 0.24, frozen))
    label(axes, 4.7, frozen + 0.28, "$y$", fontsize=15, color=INK)

    arrow(axes, (5.0, frozen), (5.0, scale), (5.7, scale))
    box(axes, 6.9, scale, r"$a\odot(y-\hat b)$", "scale, one per channel")
    arrow(axes, (8.1, scale), (sums, scale), (sums, shift + 0.24))
    box(axes, 6.9, shift, r"$b$", "shift, one per channel")
    arrow(axes, (8.1, shift), (sums - 0.24, shift))

    arrow(axes, (split, frozen), (split, space), (1.4, space))
    box(axes, 2.4, space, "$D$", "inputs to rank $r$", width=2.0, sides=(1.25, 0.8))
    arrow(axes, (3.4, space), (3.85, space))
    box(axes, 4.6, space, "relu", "or identity", width=1.5, colours=PLAIN, sides=(0.8, 0.8))
    arrow(axes, (5.35, space), (5.8, space))
    box(axes, 6.95, space, r"$s\,U$", "rank $r$ to outputs", width=2.3, sides=(0.8, 1.25))
    arrow(axes, (8.1, space), (sums, space), (sums, shift - 0.24))
    said = "subspace of rank $r$ (4 to 8, say); a new task has $a = b = U = 0$ and changes nothing"
    label(axes, 4.7, space - 0.85, said)

    node(axes, sums, shift, "+")
    label(axes, (sums + end) / 2 + 0.1, shift + 0.26, r"$\Delta(x,y)$", fontsize=13, color=INK)
    arrow(axes, (sums + 0.24, shift), (end, shift), (end, frozen - 0.24))
    node(axes, end, 3.45, "$w$")
    label(axes, end - 0.4, 3.45, "×", fontsize=13, color=INK)
    label(axes, end + 0.4, 3.45, "strength\n0: exactly the base\n1: as trained", ha="left")
    said = "more tasks: their $w\\,\\Delta$ come\nto the same sum, in any order"
    label(axes, end + 0.4, frozen - 0.55, said, ha="left")
    node(axes, end, frozen, "+")
    arrow(axes, (end + 0.24, frozen), (12.9, frozen))
    label(axes, 12.9, frozen + 0.28, "$y'$", fontsize=15, color=INK)
    label(axes, 12.2, frozen + 0.22, "output")
    for x, name, (fill, edge) in (
        (1.45, "frozen: the base, never changed", FROZEN),
        (5.4, "trained: the affiner, all that a task file holds of this layer", TRAINED),
    ):
        axes.add_patch(Rectangle((x, 5.97), 0.34, 0.24, fc=fill, ec=edge, lw=1.4))
        label(axes, x + 0.5, 6.08, name, ha="left", fontsize=9.6, color=INK)


def main() -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(figsize=(11.6, 5.6), dpi=130)
    axes.set_xlim(0, 13.9)
    axes.set_ylim(-0.35, 6.35)
    axes.set_aspect("equal")
    axes.axis("off")
    draw(axes)
    figure.savefig(OUT, bbox_inches="tight", pad_inches=0.12, facecolor="white")
    print(OUT)


if __name__ == "__main__":
    main()
