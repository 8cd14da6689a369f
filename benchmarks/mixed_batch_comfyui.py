"""Eight tasks in one batch of ComfyUI, beside a plain batch and beside a run per task.

    python benchmarks/mixed_batch_comfyui.py [--tasks 8] [--steps 20] [--cfg 3.5] [--device cuda]
        [--rounds 7]

Whole samplings of the pocket base, nodes and loading included, as many pictures as
tasks: one batch in which Route DiffScaler Tasks gives every picture its own task; and one run per
task with a batch of 1, with ComfyUI's LoRA loader (LoRAs of the same rank on the same layers, read
already) or with ours. Before anything is timed every picture of the mixed batch must equal its
task's own run. Variants take turns in random order. Prints Markdown tables for RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from in_comfyui import Host, lora_file
from torch import Tensor
from turns import take_turns

PLAIN, ONE, MIXED = "one plain batch", "one batch, one task", "one batch, a task per picture"
BASE_RUNS, OUR_RUNS = "a run per picture, no task", "a run per picture, Apply DiffScaler Task"
LORA_RUNS = "a run per picture, ComfyUI's LoRA loader"


def variants(host: Host, count: int, **settings: Any) -> dict[str, Callable[[], Tensor]]:
    """Returns every way to draw as many pictures as there are tasks; each gives their latents.

    Args:
        host: ComfyUI.
        count: How many tasks.
        settings: Steps and guidance, as in `Host.sample`.
    """
    model, positive, negative = host.base(), host.prompt("cat"), host.prompt("")
    tasks = host.random_tasks(model, count)
    loras = [lora_file(task) for task in tasks]
    apply = host.node("DiffScalerApplyTask").execute
    route = host.node("DiffScalerRouteTasks").execute

    def batch(of: Any) -> Tensor:
        return host.sample(of, positive, negative, batch=count, **settings)

    def mixed() -> Tensor:
        named = {f"task{i}": task for i, task in enumerate(tasks)}
        mode = "one task per latent"
        made = route(model, positive, named, mode=mode, negative=negative).args
        return host.sample(*made, batch=count, **settings)

    def runs(put: Callable[[int], Any]) -> Tensor:
        return torch.cat(
            [
                host.sample(put(row), positive, negative, batch=1, row=row, **settings)
                for row in range(count)
            ]
        )

    return {
        PLAIN: lambda: batch(model),
        ONE: lambda: batch(apply(model, tasks[0], 1.0).args[0]),
        MIXED: mixed,
        BASE_RUNS: lambda: runs(lambda row: model),
        OUR_RUNS: lambda: runs(lambda row: apply(model, tasks[row], 1.0).args[0]),
        LORA_RUNS: lambda: runs(lambda row: host.with_lora(model, loras[row], 1.0)),
    }


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=3.5, help="guidance; 1: a prompt's rows alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    host = Host(Path(tempfile.mkdtemp(prefix="diffscaler-")), args.device)
    calls = variants(host, args.tasks, steps=args.steps, cfg=args.cfg)
    plain, together, alone = (calls[name]() for name in (PLAIN, MIXED, OUR_RUNS))
    error, effect = (float((other - together).abs().max()) for other in (alone, plain))
    if error > 0.02 * effect:
        raise SystemExit(f"the mixed batch differs from the tasks' own runs by {error:.2g}")
    turns = take_turns(calls, args.device, args.rounds, calls=1)
    title = f"{args.tasks} pictures, {args.steps} steps, guidance {args.cfg}"
    print("\n" + turns.table(PLAIN, title), end="\n\n")
    print(
        turns.goals(
            (MIXED, PLAIN, "≤ 1.1"),
            (LORA_RUNS, MIXED, "≥ 2"),
            (OUR_RUNS, MIXED, ""),
            (BASE_RUNS, PLAIN, ""),
        )
    )
    print(f"\nlargest difference of a mixed picture's latents to its task's own run: {error:.1e}")


if __name__ == "__main__":
    main()
