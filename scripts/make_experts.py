"""Draws the pictures of docs/features.md and docs/experts.md, and trains the pocket base's router.

    python scripts/make_experts.py features   docs/images/features_grid.png
    python scripts/make_experts.py router     assets/pocket/diffscaler_routers/*.safetensors
    python scripts/make_experts.py samples    docs/images/experts.png

Pictures come from `pocket/draw.py`, other ones than the tasks were trained on. Needs matplotlib,
and for the last two the emoji font.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "pocket"))

from draw import draw_arrays  # noqa: E402
from words import FRUITS, LETTERS, SHAPES, SMILEYS  # noqa: E402

from diffscaler_core import load_task  # noqa: E402
from diffscaler_core.pocket import load_pipeline  # noqa: E402
from diffscaler_core.systems.experts import experts  # noqa: E402
from diffscaler_core.systems.features import (  # noqa: E402
    TIMES,
    data_features,
    pixel_means,
    untold,
)
from diffscaler_core.systems.probe import probe_grid  # noqa: E402
from diffscaler_core.systems.probe_chart import draw_grid  # noqa: E402
from diffscaler_core.systems.router import load_router, save_router  # noqa: E402
from diffscaler_core.systems.router_training import (  # noqa: E402
    RouterSettings,
    accuracy_over,
    train_router,
)
from diffscaler_core.training import TrainingData, as_denoiser, sample_latents  # noqa: E402
from diffscaler_core.training.denoiser import Denoiser  # noqa: E402
from diffscaler_core.training.preview import to_image  # noqa: E402

POCKET, IMAGES = ROOT / "assets" / "pocket", ROOT / "docs" / "images"
ROUTER = POCKET / "diffscaler_routers" / "fruits_smileys.safetensors"
EXPERTS = {"fruits": tuple(FRUITS), "smileys": tuple(SMILEYS)}
SEED = 2026


def main() -> None:
    """Makes what the arguments name."""
    wanted = sys.argv[1:] or ["features", "router", "samples"]
    denoiser = as_denoiser(load_pipeline(POCKET))
    words = load_task(POCKET / "diffscaler" / "words.safetensors")
    for name in wanted:
        {"features": features, "router": router, "samples": samples}[name](denoiser, words)


def encoded(
    denoiser: Denoiser, words: tuple[str, ...], style: str, seed: int, per_word: int = 10
) -> TrainingData:
    """Returns drawn pictures as latents, a class per word."""
    drawn = torch.from_numpy(draw_arrays(words, style, per_word, seed))
    pixels = drawn.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert denoiser.encode is not None
    with torch.no_grad():
        latents = torch.cat([denoiser.encode(part).float() for part in pixels.split(8)])
    index = torch.arange(len(words)).repeat_interleave(per_word)
    return TrainingData(latents[None], index, words)


def features(denoiser: Denoiser, words: object) -> None:
    """Draws the probe's accuracies over blocks and times: which silhouette is it?"""
    names = (*SHAPES, *LETTERS)
    data = encoded(denoiser, names, "silhouette", SEED, per_word=20)
    told = untold(denoiser, words)  # type: ignore[arg-type]
    with denoiser.held():
        seen = data_features(denoiser, data, TIMES, told)
    grid = probe_grid(seen, data.index, names, pixel_means(data))
    draw_grid(grid, IMAGES / "features_grid.png", title="silhouettes on the pocket base")
    print(grid.best, "mean values", grid.pixels, "chance", grid.chance)


def router(denoiser: Denoiser, words: object) -> None:
    """Trains the router of the tasks fruits and smileys."""
    parts = {
        name: encoded(denoiser, own, "plain", SEED + k)
        for k, (name, own) in enumerate(EXPERTS.items())
    }
    told = untold(denoiser, words)  # type: ignore[arg-type]
    found = train_router(denoiser, parts, told, RouterSettings(draws=24))
    ROUTER.parent.mkdir(parents=True, exist_ok=True)
    save_router(found, ROUTER, torch.float16)
    print(found.facts, ROUTER.stat().st_size, "bytes")


def samples(denoiser: Denoiser, words: object) -> None:
    """Draws the same noise under the base, each expert and both, and the router's accuracy."""
    from matplotlib.figure import Figure

    tasks = {name: load_task(POCKET / "diffscaler" / f"{name}.safetensors") for name in EXPERTS}
    told, own = untold(denoiser, words), load_router(ROUTER)  # type: ignore[arg-type]
    noise = torch.randn(8, 16, 16, 16, generator=torch.Generator().manual_seed(SEED))
    condition = told(len(noise))
    rows: dict[str, Tensor] = {}

    def sampled(base: Denoiser) -> Tensor:
        latents = sample_latents(base, condition, condition, noise, guidance=1.0)
        assert base.decode is not None
        with torch.no_grad():
            return base.decode(latents)

    with denoiser.held():
        rows["base"] = sampled(denoiser)
        for name, task in tasks.items():
            with denoiser.attached({name: task}):
                rows[name] = sampled(denoiser)
    for mode in ("top1", "full"):
        with experts(denoiser, tasks, own, told, mode) as both:
            rows[f"both, {mode}"] = sampled(both.denoiser)
            print(mode, "rows run", both.rows_run, "switches", both.switches)
    times = [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]
    fresh = [encoded(denoiser, o, "plain", SEED + 10 + k) for k, o in enumerate(EXPERTS.values())]
    found = accuracy_over(denoiser, own, fresh, told, times)
    print(found)
    figure = Figure(figsize=(11.5, 3.9), dpi=100)
    grid = figure.add_gridspec(1, 2, width_ratios=(2.3, 1), wspace=0.16)
    sheet = figure.add_subplot(grid[0])
    height = rows["base"].shape[2]
    page = torch.cat([torch.cat(list(row), 2) for row in rows.values()], 1)
    sheet.imshow(to_image(page))
    sheet.set_yticks([height * (i + 0.5) for i in range(len(rows))], list(rows), fontsize=9)
    sheet.set_xticks([])
    sheet.tick_params(length=0)
    sheet.spines[:].set_visible(False)
    curve = figure.add_subplot(grid[1])
    curve.plot(list(found), list(found.values()), marker="o", color="#3f789e")
    curve.axhline(0.5, color="#888", linewidth=1, linestyle=":")
    curve.set_ylim(0.4, 1.02)
    curve.set_xlabel("time t (0 clean, 1 pure noise)", fontsize=9)
    curve.set_title("accuracy of the router", loc="left", fontsize=10)
    curve.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "experts.png", bbox_inches="tight")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
