"""What a task costs per model call, as ratios to the frozen base measured in the same run.

    python benchmarks/step_overhead.py [--device cuda] [--rounds 7]

A DiT-S/2-sized transformer (12 blocks, width 384, 256 tokens) of diffusers' own class with random
weights, batch 8, every Linear of every block adapted at rank 8. Variants take turns in random
order, so that a noisy machine hurts all alike; the fastest call of each counts. Prints a Markdown
table for RESULTS.md.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from dit import base_model

from diffscaler_core import Attachment, TaskAdapter, attach, new_task

BATCH, RANK = 8, 8


def random_task(model: torch.nn.Module, method: str = "diffscaler", seed: int = 0) -> TaskAdapter:
    """Returns a task whose parts all do something."""
    task = new_task(model, method, RANK, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    layers = {
        layer: {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in own.items()}
        for layer, own in task.layers.items()
    }
    return task.replace(layers=layers)


def variants(model: torch.nn.Module) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Returns, per name, what puts the variant in force for a `with` block."""
    four = {f"task{i}": random_task(model, seed=i) for i in range(4)}

    def rows() -> Attachment:
        attachment = attach(model, four)
        attachment.set_rows([*four, *four][:BATCH])
        return attachment

    single = {m: random_task(model, m) for m in ("diffscaler", "scale_shift", "lora")}
    return {
        "frozen base": nullcontext,
        **{f"1 task, {m}": lambda t=t: attach(model, t) for m, t in single.items()},
        "1 task, strength 0": lambda: attach(model, single["diffscaler"], 0.0),
        "4 tasks stacked": lambda: attach(model, four),
        "4 tasks, one per row": rows,
    }


def measure(call: Callable[[], object], device: str) -> float:
    """Returns the wall time of one call in seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model = base_model(args.device)
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 32, 32, device=args.device),
        "timestep": torch.full((BATCH,), 500, device=args.device),
        "class_labels": torch.arange(BATCH, device=args.device),
    }
    table = variants(model)
    best = dict.fromkeys(table, float("inf"))
    for _ in range(args.rounds):
        for name in random.sample(list(table), len(table)):
            with table[name]():
                model(**inputs)  # the first call folds the affiners
                for _ in range(2):
                    best[name] = min(best[name], measure(lambda: model(**inputs), args.device))
    task = random_task(model)
    with attach(model, task) as attachment:
        model(**inputs)
        switch = min(measure(lambda: attachment.set_weights(0.5), args.device) for _ in range(5))
    base = best["frozen base"]
    print("| variant | ms | ratio to the base |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / base:.3f} |")
    print(f"| changing a task's strength | {1000 * switch:.1f} | {switch / base:.3f} |")
    print(f"\ntask: {task.num_parameters:,} parameters, {len(task.layers)} layers, rank {RANK}")


if __name__ == "__main__":
    main()
