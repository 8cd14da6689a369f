"""A grid of probes as one picture: a row per block, a column per time. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from .probe import ProbeGrid

_READABLE = 14  # columns in which a number can still be read


def draw_grid(grid: ProbeGrid, file: str | Path | IO[bytes], *, title: str = "") -> None:
    """Draws the accuracies into a PNG; a frame marks the cell that validation chose.

    Args:
        grid: The probes.
        file: Where the PNG goes.
        title: What was probed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    blocks = list(dict.fromkeys(cell.block for cell in grid.cells))
    times = sorted({cell.time for cell in grid.cells})
    table = [[0.0] * len(times) for _ in blocks]
    for cell in grid.cells:
        table[blocks.index(cell.block)][times.index(cell.time)] = cell.accuracy
    wide = min(14.0, 3.4 + 0.62 * max(4, len(times)))
    figure = Figure(figsize=(wide, 1.6 + 0.34 * len(blocks)), dpi=110)
    axes = figure.add_subplot()
    shown = axes.imshow(table, cmap="YlGnBu", aspect="auto", vmin=0, vmax=1)
    for row, line in enumerate(table if len(times) <= _READABLE else ()):
        for column, share in enumerate(line):
            colour = "white" if share > 0.6 else "#202020"
            axes.text(
                column, row, f"{share:.0%}", ha="center", va="center", fontsize=8, color=colour
            )
    best = grid.best
    corner = times.index(best.time) - 0.5, blocks.index(best.block) - 0.5
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d62728", linewidth=2.2))
    axes.set_xticks(range(len(times)), [f"{t:g}" for t in times], fontsize=8)
    axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
    axes.set_xlabel("time t (0 clean, 1 pure noise)", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    bar.set_label("accuracy", fontsize=9)
    bar.ax.axhline(grid.chance, color="#d62728", linewidth=1)
    if grid.pixels is not None:
        bar.ax.axhline(grid.pixels, color="#404040", linewidth=1, linestyle=":")
    told = f"{title}: " if title else ""
    axes.set_title(f"{told}linear probe, {len(grid.classes)} classes", loc="left", fontsize=10)
    figure.savefig(file, format="png", bbox_inches="tight")
