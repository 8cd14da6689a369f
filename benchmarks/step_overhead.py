"""What a task costs per model call, as ratios to the frozen base measured in the same run.

    python benchmarks/step_overhead.py [--model S|B|XL] [--blocks 6] [--batch 8] [--rank 8]
        [--device cuda] [--dtype bfloat16] [--compile] [--mode default] [--rounds 9]

diffusers' DiT class at its published sizes with random weights, 256 tokens, every Linear of every
block adapted; beside it PEFT's LoRA of the same rank on the same layers, un-merged. Variants take
turns in random order. Prints a Markdown table for RESULTS.md: the fastest call of each, and the
median over the rounds of its ratio to the base within the round. `--compile` compiles every
variant, after a check that each still says what it said, and then counts the graphs that 20
changes of strengths and of rows make.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dit import SIZES, base_model, inputs_of
from torch import Tensor, nn
from turns import take_turns
from variants import Call, compiled, graphs, peft_lora, random_task, shared_copy

from diffscaler_core import Attachment, TaskAdapter, attach

BASE = "frozen base"
ROWS = "4 tasks, one per row"


def adapted(
    model: Any, rank: int, batch: int
) -> tuple[dict[str, nn.Module], dict[str, Attachment], TaskAdapter]:
    """Returns every variant's model, the attachments of ours, and the task of the first."""
    tasks = {f"task{i}": random_task(model, rank=rank, seed=i) for i in range(4)}
    first = tasks["task0"]
    layers = [layer.removeprefix("transformer.") for layer in first.layers]
    ours: dict[str, tuple[TaskAdapter | dict[str, TaskAdapter], float]] = {
        "1 task, diffscaler": (first, 1.0),
        "1 task, scale_shift": (random_task(model, "scale_shift", rank), 1.0),
        "1 task, lora": (random_task(model, "lora", rank), 1.0),
        "1 task, strength 0": (first, 0.0),
        "4 tasks stacked": (tasks, 1.0),
        ROWS: (tasks, 1.0),
    }
    models: dict[str, nn.Module] = {BASE: shared_copy(model)}
    attachments = {}
    for name, (own, strength) in ours.items():
        models[name] = shared_copy(model)
        attachments[name] = attach(models[name], own, strength).to(model.device)
    attachments[ROWS].set_rows([f"task{i % 4}" for i in range(batch)])
    models[f"PEFT LoRA, rank {rank}"] = peft_lora(model, layers, rank)
    return models, attachments, first


def switches(
    attachments: dict[str, Attachment], calls: dict[str, Call], batch: int
) -> dict[str, int]:
    """Returns the graphs that 20 changes make, per variant."""

    def strength(i: int) -> None:
        attachments["1 task, diffscaler"].set_weights(i / 10)

    def stack(i: int) -> None:
        attachments["4 tasks stacked"].set_weights({"task0": i / 10, f"task{1 + i % 3}": 1.0})

    def rows(i: int) -> None:
        names = [f"task{(i + row) % 4}" for row in range(batch - 1)]
        attachments[ROWS].set_rows([*names, {"task0": i / 10} if i % 2 else None])

    changes: dict[str, Callable[[int], None]] = {
        "1 task, diffscaler": strength,
        "4 tasks stacked": stack,
        ROWS: rows,
    }
    made = {}
    for name, change in changes.items():
        before = graphs()
        for i in range(20):
            change(i)
            calls[name]()
        made[name] = graphs() - before
    return made


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="S", choices=SIZES)
    parser.add_argument("--blocks", type=int, help="fewer than published, for a CPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--mode", default="default", help="torch.compile's")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = base_model(args.device, args.model, args.blocks)
    if dtype != torch.float32:
        model.to(dtype)
    inputs = inputs_of(args.batch, args.device, dtype)
    models, attachments, task = adapted(model, args.rank, args.batch)

    def call(variant: nn.Module) -> Tensor:
        return variant(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    calls: dict[str, Call] = {name: partial(call, variant) for name, variant in models.items()}
    if args.compile:
        compiled(models, calls, args.mode)
    print(take_turns(calls, args.device, args.rounds).table(BASE), flush=True)
    share = task.num_parameters / sum(p.numel() for p in model.parameters())
    blocks = len(model.transformer_blocks)
    print(
        f"\nDiT-{args.model}/2, {blocks} blocks, batch {args.batch}, {args.dtype}"
        f"{', compiled' if args.compile else ''}; a task: {task.num_parameters:,} parameters "
        f"({share:.2%}) on {len(task.layers)} layers, rank {args.rank}"
    )
    if args.compile:
        for name, made in switches(attachments, calls, args.batch).items():
            print(f"{name}: {made} recompiles over 20 switches")


if __name__ == "__main__":
    main()
