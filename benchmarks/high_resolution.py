"""A base moved to twice its resolution, with its positions stretched and without.

    python benchmarks/high_resolution.py             # about ten minutes on one quiet core
    python benchmarks/high_resolution.py --report    # the table and the picture, of what is there

The pocket base, trained at 128 px, learns its words at 256 px by DiffFit and by DiffScaler, once
with its positions stretched (DiffFit's way, arXiv:2304.06648; `resolution.py`) and once with the
positions it has: at 256 px the whole of its table, of which it was shown the middle quarter. All
runs see the same pictures, noise and times. Losses are of pictures nobody trained on. What is done
is kept in out/high_resolution, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "pocket"))

import draw  # noqa: E402
from words import BASE_WORDS  # noqa: E402

from diffscaler_core import TaskAdapter, load_task, save_task  # noqa: E402
from diffscaler_core.evaluation.pictures import labelled_grid  # noqa: E402
from diffscaler_core.pocket import load_pipeline  # noqa: E402
from diffscaler_core.resolution import at_resolution  # noqa: E402
from diffscaler_core.training import (  # noqa: E402
    Denoiser,
    Progress,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    prompts_for,
    sample_prompts,
    train_task,
    validation_loss,
)

POCKET = ROOT / "assets" / "pocket"
FOLDER, PICTURE = ROOT / "out" / "high_resolution", ROOT / "docs" / "images" / "high_resolution.jpg"
FACTOR, SIDE = 2, 256
#: As at 128 px, at twice as many pixels.
POSES = draw.Poses(8, (0.74, 0.84), 10)
SHOWN = ("cat", "rocket", "house", "sunflower", "octopus", "letter-b")
METHODS: dict[str, dict[str, Any]] = {
    "difffit": {"lr_scale_shift": 1e-2, "targets": "all"},
    "diffscaler": {"lr": 5e-3, "lr_scale_shift": 1e-2, "rank": 8},
}
POSITIONS = {"stretched": float(FACTOR), "as they are": 1.0}


def pictures(denoiser: Denoiser, per_word: int, seed: int) -> TrainingData:
    """Returns the base's own words, drawn at 256 px and encoded; kept on the disk."""
    kept = FOLDER / f"pictures-{per_word}-{seed}.safetensors"
    if not kept.exists():
        draw.SIZE = SIDE
        arrays = draw.draw_arrays(BASE_WORDS, "plain", per_word, seed, poses=POSES)
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            parts = [denoiser.encode(part) for part in pixels.split(16)]  # type: ignore[misc]
        save_file({"latents": torch.cat(parts)}, kept)
    latents = load_file(kept)["latents"]
    index = torch.arange(len(BASE_WORDS)).repeat_interleave(per_word)
    return TrainingData(latents[None], index, tuple(BASE_WORDS))


class Bench:
    """The base, its pictures and what was measured so far."""

    def __init__(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.denoiser = as_denoiser(load_pipeline(POCKET))
        self.words = load_task(POCKET / "diffscaler" / "words.safetensors")
        self.data, self.unseen = pictures(self.denoiser, 8, 31), pictures(self.denoiser, 1, 32)
        self.prompts = prompts_for(self.denoiser, BASE_WORDS, "stored", words=self.words)
        self.file = FOLDER / "results.json"
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {}

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Writes what was measured."""
        self.results[name] = figures
        self.file.write_text(json.dumps(self.results, indent=1))

    def base(self, positions: str) -> None:
        """The loss of the base itself."""
        name = f"base, {positions}"
        if name in self.results:
            return
        with at_resolution(self.denoiser.model, POSITIONS[positions]):
            loss = validation_loss(self.denoiser, self.unseen, self.prompts, times=8, batch=16)
        self.keep(name, {"parameters": 0, "curve": [[0, loss]]})
        print(f"{name}: {loss:.4f}", flush=True)

    def train(self, method: str, positions: str, steps: int, batch: int) -> None:
        """One run; its curve and its task are kept."""
        name = f"{method}, {positions}"
        if name in self.results:
            return
        curve = [[0, self.results[f"base, {positions}"]["curve"][0][1]]]

        def look(now: Progress) -> None:
            if now.validation is not None:
                curve.append([now.step, now.validation])
                print(f"{name}: step {now.step} {now.validation:.4f}", flush=True)

        config = TrainingConfig(
            name=method, method=method, steps=steps, batch=batch, prompts="stored", seed=0,
            at_resolution=POSITIONS[positions], validate_every=max(1, steps // 6),
            save_every=50, sample_steps=2, **METHODS[method],
        )  # fmt: skip
        began = time.monotonic()
        task = train_task(
            self.denoiser, self.data, config, prompts=self.prompts, validation=self.unseen,
            folder=FOLDER / plain(name), on_step=look,
        )  # fmt: skip
        save_task(task, FOLDER / f"{plain(name)}.safetensors")
        seconds = time.monotonic() - began
        self.keep(
            name, {"parameters": task.num_parameters, "curve": curve, "seconds": round(seconds)}
        )

    @torch.no_grad()
    def sheet(self) -> Image.Image:
        """Returns a row per run, a column per word, all from the same noise."""
        told = prompts_for(self.denoiser, SHOWN, "stored", words=self.words)
        rows: list[tuple[str, list[Tensor]]] = []
        for name in self.results:
            method, _, positions = name.partition(", ")
            file = FOLDER / f"{plain(name)}.safetensors"
            task = None if method == "base" else load_task(file)
            drawn = self.drawn(told, task, POSITIONS[positions])
            rows.append((name, [avg_pool2d(picture, 2) for picture in drawn]))
        return labelled_grid(rows)  # type: ignore[no-any-return]

    def drawn(self, told: Any, task: TaskAdapter | None, factor: float) -> list[Tensor]:
        """Returns one picture per word."""
        tasks = {} if task is None else {task.name: task}
        latent = SIDE // 8
        with (
            at_resolution(self.denoiser.model, factor),
            self.denoiser.held(),
            self.denoiser.attached(tasks),
        ):
            return sample_prompts(self.denoiser, told, (16, latent, latent), seed=5, steps=20)

    def table(self) -> str:
        """Returns the losses at equal steps, as Markdown."""
        steps = [step for step, _ in max((r["curve"] for r in self.results.values()), key=len)]
        lines = [
            "| | parameters | " + " | ".join(f"step {step}" for step in steps) + " |",
            "|---|---|" + "---|" * len(steps),
        ]
        for name, own in self.results.items():
            losses = dict(map(tuple, own["curve"]))
            cells = [f"{losses[step]:.4f}" if step in losses else "" for step in steps]
            lines.append(f"| {name} | {own['parameters']:,} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def plain(name: str) -> str:
    """Returns a run's name as a file's."""
    return name.replace(", ", "-").replace(" ", "_")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    bench = Bench()
    if not args.report:
        for positions in POSITIONS:
            bench.base(positions)
        for method in METHODS:
            for positions in POSITIONS:
                bench.train(method, positions, args.steps, args.batch)
    print(bench.table())
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    bench.sheet().save(PICTURE, quality=88)
    print(f"rows from the top: {'; '.join(bench.results)}; picture: {PICTURE}")


if __name__ == "__main__":
    main()
