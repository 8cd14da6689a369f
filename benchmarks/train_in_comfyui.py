"""A training step inside ComfyUI: our node's engine beside ComfyUI's own TrainLoraNode.

    OMP_NUM_THREADS=1 python benchmarks/train_in_comfyui.py [--rounds 3] [--batch 8]

On the pocket base, all pictures under one prompt, rank 8, float32, no gradient checkpointing. Both
take turns; a run's time is (a long run − a short one) / steps, so that loading does not count, and
the fastest turn counts. TrainLoraNode adapts every layer with a weight, ours every Linear of the
blocks; its second row gives it batches of one picture, see the note it prints.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_both_hosts import POCKET, booted, comfyui_base

SHORT, LONG, PICTURES = 2, 10, 16


def train_lora(model: Any, latents: torch.Tensor, words: Any, batch: int, steps: int) -> None:
    """Runs ComfyUI's node."""
    from comfy_extras.nodes_train import TrainLoraNode

    context, pooled = words.prompt(words.prompts[1])
    positive = [[[context, {"pooled_output": pooled}]]] * len(latents)
    settings = dict(
        batch_size=batch, steps=steps, grad_accumulation_steps=1, learning_rate=1e-4, rank=8,
        optimizer="AdamW", loss_function="MSE", seed=0, training_dtype="fp32", lora_dtype="fp32",
        quantized_backward=False, algorithm="LoRA", gradient_checkpointing=False,
        checkpoint_depth=1, offloading=False, existing_lora="[None]", bucket_mode=False,
        bypass_mode=False,
    )  # fmt: skip
    TrainLoraNode.execute(
        [model],
        [{"samples": latents[i : i + 1]} for i in range(len(latents))],
        positive,
        **{name: [value] for name, value in settings.items()},
    )


def per_step(run: Callable[[int], None]) -> float:
    """Returns the seconds of one step."""
    seconds = []
    for steps in (SHORT, LONG):
        start = time.perf_counter()
        run(steps)
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (LONG - SHORT)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pack = booted(Path(tempfile.mkdtemp(prefix="diffscaler-")))

    def part(name: str) -> Any:
        return importlib.import_module(f"{pack.__name__}.{name}")

    core, training = part("diffscaler_core"), part("diffscaler_core.training")
    words = core.load_task(POCKET / "diffscaler" / "words.safetensors")
    model, _ = comfyui_base()
    latents = torch.randn(PICTURES, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    data = training.TrainingData(
        latents[None], torch.zeros(PICTURES, dtype=torch.long), (words.prompts[1],)
    )

    def ours(method: str) -> Callable[[int], None]:
        def run(steps: int) -> None:
            config = training.TrainingConfig(
                steps=steps, batch=args.batch, rank=8, method=method, save_every=0
            )
            denoiser = part("nodes.training").denoiser_of(model)
            with torch.inference_mode(False), torch.enable_grad():
                training.train_task(denoiser, data, config, words=words)

        return run

    def theirs(batch: int) -> Callable[[int], None]:
        return lambda steps: train_lora(model, latents, words, batch, steps)

    variants = {
        f"TrainLoraNode, batch {args.batch}": (theirs(args.batch), args.batch),
        "TrainLoraNode, batch 1": (theirs(1), 1),
        f"ours, diffscaler, batch {args.batch}": (ours("diffscaler"), args.batch),
        f"ours, lora, batch {args.batch}": (ours("lora"), args.batch),
    }
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(args.rounds):
        for name, (run, _) in variants.items():
            best[name] = min(best[name], per_step(run))
    first = best[next(iter(variants))]
    print("\n| variant | s per step | s per picture | step, ratio |")
    print("|---|---|---|---|")
    for name, (_, batch) in variants.items():
        seconds = best[name]
        cells = f"{seconds:.3f} | {seconds / batch:.4f} | {seconds / first:.2f}"
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
