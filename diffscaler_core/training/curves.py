"""A run's losses as one picture. Needs matplotlib; keeps no state of it, opens no window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .progress import BANDS, History

_MOST_POINTS = 2000  # of a line; more cannot be told apart in the picture
_MEMORY = 50  # steps of the running mean, as in History.add
#: Colours that also people who see few colours can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BAND_COLOURS = ("#9ecae1", "#6baed6", "#3182bd", "#08306b")
_FAINT = "#8a8a8a"

Point = tuple[int, float]


def draw_curves(
    history: History | Mapping[str, History],
    file: str | Path | IO[bytes],
    *,
    title: str = "",
    log: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Draws losses, validation, loss per noise band and learning rate into a PNG.

    Args:
        history: A run's numbers, or one per task.
        file: Where the PNG goes.
        title: What was trained.
        log: The run's log (`run_folder.read_log`), for noise bands and learning rate; without it
            there is only the upper picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    tasks = {"": history} if isinstance(history, History) else dict(history)
    entries = list(log)
    bands = [] if len(tasks) > 1 else _bands(entries)
    rates = _points((e["step"], e.get("lr")) for e in entries)
    lower: list[Callable[[Any], None]] = []
    if bands:
        lower.append(lambda axes: _draw_bands(axes, bands))
    if rates:
        lower.append(lambda axes: _draw_rate(axes, rates))
    figure = Figure(figsize=(9, 7.2 if lower else 4.6), dpi=110)
    grid = figure.add_gridspec(
        2 if lower else 1, max(1, len(lower)), height_ratios=[1.7, 1.0][: 1 + bool(lower)]
    )
    top = figure.add_subplot(grid[0, :])
    _draw_losses(top, tasks)
    shown = title or ", ".join(filter(None, tasks))
    top.set_title(f"Training of {shown}" if shown else "Training", loc="left", fontweight="bold")
    for i, draw in enumerate(lower):
        draw(figure.add_subplot(grid[1, i]))
    last = max((h.losses[-1][0] for h in tasks.values() if h.losses), default=1)
    for axes in figure.axes:
        axes.set_xlim(0, max(last, 1) * 1.02)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # matplotlib's own layout engines draw everything twice, and a run draws this often
    low, high = (0.075, 0.95) if lower else (0.12, 0.92)
    figure.subplots_adjust(left=0.08, right=0.975, bottom=low, top=high, hspace=0.34, wspace=0.2)
    figure.savefig(file, format="png")


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Returns the mean over about the last 50 points, at each point; the same as `mean_loss`."""
    means: list[Point] = []
    mean = 0.0
    for count, (step, value) in enumerate(points, 1):
        mean += max(1 / count, 1 / _MEMORY) * (value - mean)
        means.append((step, mean))
    return means


def _draw_losses(axes: Any, tasks: Mapping[str, History]) -> None:
    several = len(tasks) > 1
    for i, (name, history) in enumerate(tasks.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        losses = _points(history.losses)
        if not several:
            axes.plot(*_xy(losses), color=_FAINT, alpha=0.35, lw=0.6, label="loss of each step")
        said = f"{name}: loss" if several else "loss, mean of about 50 steps"
        axes.plot(*_xy(running_mean(losses)), color=colour, lw=2, label=said)
        checked = _points(history.validations)
        if checked:
            _draw_validation(axes, checked, history.best_step, colour if several else "#D55E00",
                             f"{name}: validation" if several else "validation loss")  # fmt: skip
        others = _points(history.others)
        if others:
            which = f"{name}: with" if several else "the same with"
            axes.plot(*_xy(others), "x:", color=colour if several else "#CC79A7", lw=1.4, ms=5,
                      label=f"{which} another picture's control")  # fmt: skip
    axes.set_ylabel("loss (lower is better)")
    shown = [v for history in tasks.values() for _, v in _shown(history, several)]
    if shown:
        _limit(axes, shown)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right", ncols=2 if several else 1)


def _draw_validation(
    axes: Any, checked: Sequence[Point], best: int, colour: str, label: str
) -> None:
    axes.plot(*_xy(checked), "o--", color=colour, lw=1.4, ms=4, label=label)
    loss = dict(checked).get(best)
    if loss is None:
        return
    axes.plot([best], [loss], "*", color=colour, ms=16, mec="white", mew=0.8, zorder=5)
    left, right = checked[0][0], checked[-1][0]
    place = (best - left) / max(1, right - left)  # at an edge, the words stay inside
    axes.annotate(
        f"best: {loss:.4g} at step {best}",
        (best, loss),
        xytext=(0, -16),
        textcoords="offset points",
        ha="center" if 0.2 < place < 0.8 else "right" if place > 0.5 else "left",
        va="top",
        color=colour,
        bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
        zorder=4,
    )


def _draw_bands(axes: Any, bands: Sequence[Sequence[Point]]) -> None:
    for i, points in enumerate(bands):
        low, high = round(100 * BANDS[i]), round(100 * BANDS[i + 1])
        axes.plot(*_xy(points), color=_BAND_COLOURS[i], lw=1.6, label=f"{low} to {high} % noise")
    highest = max(value for points in bands for _, value in points)
    axes.set_ylim(0, highest * 1.4)  # room for the legend
    axes.set_title("Loss by how noisy the pictures were", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)


def _draw_rate(axes: Any, rates: Sequence[Point]) -> None:
    axes.plot(*_xy(rates), color="#009E73", lw=1.8)
    axes.set_ylim(0, max(value for _, value in rates) * 1.08 or 1)
    axes.set_title("Learning rate (first group of parameters)", loc="left", fontsize=10)
    axes.yaxis.set_major_formatter("{x:g}")


def _shown(history: History, means: bool) -> list[Point]:
    losses = _points(history.losses)
    return [
        *(running_mean(losses) if means else losses),
        *_points(history.validations),
        *_points(history.others),
    ]


def _limit(axes: Any, values: Sequence[float]) -> None:
    """Keeps a few wild steps from pressing everything else flat."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.15 * room, high + 0.1 * room)


def _bands(entries: Sequence[Mapping[str, Any]]) -> list[list[Point]]:
    count = len(BANDS) - 1
    rows = [(e["step"], e.get("bands")) for e in entries]
    good = [(step, own) for step, own in rows if isinstance(own, list) and len(own) == count]
    bands = [_points((step, own[i]) for step, own in good) for i in range(count)]
    return bands if any(bands) else []


def _points(points: Iterable[tuple[int, Any]]) -> list[Point]:
    """Returns the points that are numbers."""
    return [
        (int(step), float(value))
        for step, value in points
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def _xy(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    few = points[:: max(1, len(points) // _MOST_POINTS)]
    return [step for step, _ in few], [value for _, value in few]
