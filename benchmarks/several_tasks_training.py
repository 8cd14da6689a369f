"""Training K tasks in one run, as a ratio to K runs one after the other, measured together.

    python benchmarks/several_tasks_training.py [--base dit] [--batches 1 2 4] [--device cuda]

The pocket base (3 blocks, width 192, 64 tokens), or a DiT-S/2 (12 blocks, width 384, 256 tokens) of
diffusers' own class with random weights; rank 8 on every Linear of every block, the trainer as
users start it. Both ways take turns; the fastest step of each counts. Prints a Markdown table for
RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from dit import base_model

from diffscaler_core import TaskAdapter, load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.training import (
    Denoiser,
    TaskRun,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    train_tasks,
)

#: Steps per turn, the first of which does not count.
STEPS = {"dit": 4, "pocket": 20}


class Pipe:
    """What the trainer reads of a pipeline."""

    def __init__(self, device: str) -> None:
        self.vae, self.scheduler = None, DDIMScheduler()
        self.transformer = base_model(device)


def base_of(name: str, device: str) -> tuple[Denoiser, tuple[int, int, int], TaskAdapter | None]:
    """Returns a base, the shape of its latents, and its words."""
    if name == "dit":
        return as_denoiser(Pipe(device)), (4, 32, 32), None
    pocket = Path(__file__).resolve().parent.parent / "assets" / "pocket"
    return (
        as_denoiser(load_pipeline(pocket).to(device)),
        (16, 16, 16),
        load_task(pocket / "diffscaler" / "words.safetensors"),
    )


def data_of(seed: int, shape: tuple[int, int, int], prompt: str) -> TrainingData:
    """Returns random latents."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, *shape, generator=generator)
    return TrainingData(latents, torch.zeros(16).long(), (prompt,))


def fastest_step(base: Denoiser, runs: list[TaskRun], config: TrainingConfig) -> float:
    """Returns the seconds of a run's fastest step but the first."""
    ends: list[float] = []

    def on_step(progress: object) -> None:
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    train_tasks(base, runs, config, on_step=on_step)
    ends = ends[len(runs) - 1 :: len(runs)]  # one report per task and step
    return min(after - before for before, after in itertools.pairwise(ends))


def measure(
    base: Denoiser, runs: list[TaskRun], batch: int, steps: int, rounds: int
) -> tuple[float, float]:
    """Returns the seconds of one step: of all tasks in one run, and of their runs' sum."""
    config = TrainingConfig(steps=steps, batch=batch, rank=8, save_every=0)
    together, apart = math.inf, [math.inf] * len(runs)
    for _ in range(rounds):
        together = min(together, fastest_step(base, runs, config))
        for i, run in enumerate(runs):
            apart[i] = min(apart[i], fastest_step(base, [run], config))
    return together, sum(apart)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", choices=("pocket", "dit"), default="pocket")
    options = parser.parse_args()
    base, shape, words = base_of(options.base, options.device)
    prompt = "1" if words is None else words.prompts[1]
    runs = [
        TaskRun(f"task{i}", data_of(i, shape, prompt), words=words) for i in range(options.tasks)
    ]
    steps = STEPS[options.base]
    print(f"| pictures per task | {options.tasks} runs, s per step | one run, s | ratio |")
    print("|---|---|---|---|")
    for batch in options.batches:
        together, apart = measure(base, runs, batch, steps, options.rounds)
        print(f"| {batch} | {apart:.3f} | {together:.3f} | {together / apart:.2f} |", flush=True)


if __name__ == "__main__":
    main()
