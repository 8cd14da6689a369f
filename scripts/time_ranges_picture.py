"""Draws docs/images/time_ranges.png: which units act at which noise level, and what that brings.

    .venv/bin/python scripts/time_ranges_picture.py

About a minute on a CPU: the task of tests/systems/timed.py is trained three times.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffscaler_core.windows import UnitWindows, expert_windows, sliding_windows  # noqa: E402
from tests.systems import timed  # noqa: E402

RANK, BANDS, KIND = 16, 10, "epsilon"
BLUE, ORANGE, GREY = "#3b6fb6", "#e08a2c", "#8a8a8a"


def draw_windows(axes, plan, title: str) -> None:
    """Draws a table of windows: noise to the right, units upwards."""
    table = UnitWindows(plan.edges, plan.runs(RANK)).table
    axes.imshow(
        table.T, origin="lower", aspect="auto", extent=(0, 1, 0, RANK), cmap="Blues", vmax=1.4
    )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("t (1: pure noise)")
    axes.set_yticks([0, RANK // 2, RANK])


def by_time(plan, change=None) -> list[float]:
    """Returns the loss in each tenth of t of a task trained with these windows."""
    _, task = timed.trained(KIND, plan, change=change)
    denoiser = timed.base(KIND)
    with denoiser.attached({"inverted": task}), torch.no_grad():
        losses = timed.loss_of(denoiser, timed.inverted, 8000, seed=10**6)
    return losses.view(BANDS, -1).mean(1).tolist()


def main() -> None:
    """Trains, measures and draws."""
    torch.set_num_threads(1)
    plan = expert_windows(2, timed.OBJECTIVES[KIND].range_edges(2))
    lines = [
        ("two experts", by_time(plan), BLUE, "-"),
        ("all units at all times", by_time(None), ORANGE, "-"),
        ("both ranges share one window", by_time(plan, timed.one_window), GREY, "--"),
    ]
    for name, own, _, _ in lines:
        print(f"{name}: {sum(own) / len(own):.3f}")
    figure, (one, two, three) = plt.subplots(
        1, 3, figsize=(10, 2.9), width_ratios=[1, 1, 1.5], layout="constrained"
    )
    draw_windows(one, expert_windows(4), "4 experts")
    draw_windows(two, sliding_windows(64), "a sliding window, α 4, β 0.8")
    one.set_ylabel(f"hidden unit, of {RANK}")
    middles = [(i + 0.5) / BANDS for i in range(BANDS)]
    for name, own, colour, style in lines:
        three.plot(middles, own, style, color=colour, label=name, marker="o", markersize=3)
    three.axvline(0.5, color="black", linewidth=0.6, linestyle=":")
    three.set_title("error at each noise level", fontsize=10)
    three.set_xlabel("t (1: pure noise)")
    three.set_yscale("log")
    three.set_ylim(0.01, 60)  # room for the legend
    three.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(ROOT / "docs" / "images" / "time_ranges.png", dpi=110)


if __name__ == "__main__":
    main()
