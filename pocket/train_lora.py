"""Trains the LoRA file that the example of importing one reads: ink drawings, as a plain LoRA.

    python pocket/train_lora.py

It is a task of method "lora" by DiffScaler's own trainer, written as an ordinary LoRA in ComfyUI's
naming (`export_lora`): ComfyUI's own loader reads it, and *Import LoRA as DiffScaler Task* does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_tasks import losses, pictures, prompts_for, report, split

from diffscaler_core import export_lora, import_lora, load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.training import TrainingConfig, as_denoiser, train_task


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", type=Path, default=Path("assets/pocket"))
    parser.add_argument(
        "--out", type=Path, default=Path("assets/examples/loras/ink_lora.safetensors")
    )
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    denoiser = as_denoiser(load_pipeline(args.base))
    words = load_task(args.base / "diffscaler" / "words.safetensors")
    seen, _, style = split("ink")
    config = TrainingConfig(
        name="ink_lora", method="lora", rank=args.rank, steps=args.steps, batch=args.batch,
        lr=args.lr, prompts="stored", precision="bf16", timestep_mean=0.3,
    )  # fmt: skip
    data = pictures(denoiser, seen, style, 10, seed=1)
    task = train_task(denoiser, data, config, words=words, on_step=report)
    unseen = pictures(denoiser, seen, style, 2, seed=2)
    told = prompts_for(denoiser, seen, "stored", words=words)
    print(f"unseen pictures: loss {losses(denoiser, task, unseen, told)}")
    halves = {
        layer: {part: tensor.half() for part, tensor in own.items()}
        for layer, own in task.layers.items()
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    path = export_lora(task.replace(layers=halves), args.out, "comfyui")
    back = losses(denoiser, import_lora(path), unseen, told)
    print(f"as imported again: loss {back}; {path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
