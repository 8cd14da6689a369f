"""Chosen ranks as one picture: a row per kind of layer, a column per block. Needs matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ..auto_rank import RankChoice

_READABLE = 40  # columns in which a number can still be read


def draw_ranks(choice: RankChoice, file: str | Path | IO[bytes], *, title: str = "") -> None:
    """Draws which layer got which rank into a PNG.

    Args:
        choice: The ranks.
        file: Where the PNG goes.
        title: What was trained.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    cells, blocks, kinds = placed(choice.ranks)
    table = [[math.nan] * len(blocks) for _ in kinds]
    for name, (row, column) in cells.items():
        table[row][column] = choice.ranks[name]
    wide = min(16.0, 3.6 + 0.62 * max(4, len(blocks)))
    figure = Figure(figsize=(wide, 1.5 + 0.27 * len(kinds)), dpi=110)
    axes = figure.add_subplot()
    shown = axes.imshow(table, cmap="YlGnBu", aspect="auto", vmin=0)
    most = max(choice.ranks.values(), default=1) or 1
    for name, (row, column) in cells.items() if len(blocks) <= _READABLE else ():
        rank = choice.ranks[name]
        colour = "white" if rank > 0.6 * most else "#202020" if rank else "#b0b0b0"
        axes.text(column, row, str(rank), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(blocks)), blocks, fontsize=8, rotation=90 if len(blocks) > 8 else 0)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes, label="rank", pad=0.02)
    axes.set_title(f"Ranks of {title}" if title else "Ranks", loc="left", fontweight="bold")
    figure.savefig(file, format="png", bbox_inches="tight")


def placed(
    names: Iterable[str],
) -> tuple[dict[str, tuple[int, int]], list[str], list[str]]:
    """Returns each layer's (row, column), and what the columns and the rows are called.

    A name is cut behind its first number: "blocks.3.attn.to_q" is the layer attn.to_q of blocks.3.
    """
    cells: dict[str, tuple[int, int]] = {}
    blocks: dict[str, int] = {}
    kinds: dict[str, int] = {}
    for name in names:
        found = re.match(r"(.*?\.\d+)\.(.+)", name)
        block, kind = (found[1], found[2]) if found else ("", name)
        row = kinds.setdefault(kind, len(kinds))
        cells[name] = row, blocks.setdefault(block, len(blocks))
    shown = [re.sub(r"^(.*_)?blocks\.", "", block) if _alone(blocks) else block for block in blocks]
    return cells, [f"block {b}" if _alone(blocks) and b else b for b in shown], list(kinds)


def _alone(blocks: Iterable[str]) -> bool:
    """Says whether all blocks are of one list, so that their numbers tell them apart."""
    return len({block.rpartition(".")[0] for block in blocks if block}) == 1
