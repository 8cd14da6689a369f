"""Trains the pocket base's example tasks on drawn pictures, through DiffScaler's own trainer.

    python pocket/train_tasks.py                    # all four
    python pocket/train_tasks.py --only fruits ink  # some

Two new subjects (fruits, smileys), each class with a prompt that is learned and stored in the
task's file; two styles (ink, neon) of the base's own words, trained on two thirds of them, so that
the other third shows what the style does to words it never saw. Writes `<task>.safetensors` with a
thumbnail of the task's own samples, and contact sheets to look at.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from draw import draw_arrays
from torch import Tensor
from words import SETS

from diffscaler_core import TaskAdapter, combine_tasks, load_task, save_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.thumbnails import encode_thumbnail
from diffscaler_core.training import (
    Denoiser,
    Progress,
    Prompts,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    encode_pictures,
    preview,
    prompts_for,
    train_task,
    validation_loss,
)
from diffscaler_core.training.preview import grid

RANK, HELD_OUT = 8, 3  # every third word is kept from the styles' training
LICENSE = "Apache-2.0"
CREDIT = "Trained on pictures drawn from Noto Color Emoji (SIL OFL 1.1) and DejaVu Sans."


@dataclass(frozen=True)
class Job:
    """One task to train: which pictures, how many per word, and what the file says."""

    title: str
    description: str
    per_word: int
    show: tuple[str, ...]  # four words for the thumbnail
    learned: bool  # True: new classes with prompts of their own


JOBS = {
    "fruits": Job("Fruits", "Six fruits the base never saw. ", 48,
                  ("strawberry", "banana", "watermelon", "cherries"), True),
    "smileys": Job("Smileys", "Six faces the base never saw. ", 48,
                   ("smile", "cool", "love", "angry"), True),
    "ink": Job("Ink", "Pen drawings on cream paper, of any word. ", 10,
               ("cat", "sailboat", "guitar", "owl"), False),
    "neon": Job("Neon", "Glowing tubes at night, of any word. ", 10,
                ("cat", "sailboat", "guitar", "owl"), False),
}  # fmt: skip


def pictures(
    denoiser: Denoiser, words: tuple[str, ...], style: str, count: int, seed: int
) -> TrainingData:
    """Drawn pictures as latents."""
    drawn = torch.from_numpy(draw_arrays(words, style, count, seed)).permute(0, 3, 1, 2)
    prompts = [word for word in words for _ in range(count)]

    def encode(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return denoiser.encode(pixels)  # type: ignore[misc]

    return encode_pictures(lambda i: drawn[i] / 127.5 - 1, prompts, encode)


def split(name: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """(words to train on, words kept back, style) of a job."""
    words, style = SETS[name]
    if JOBS[name].learned:
        return words, (), style
    kept = words[HELD_OUT - 1 :: HELD_OUT]
    return tuple(word for word in words if word not in kept), kept, style


def report(now: Progress) -> None:
    """A line now and then."""
    if now.step % 50 == 0 or now.step == now.steps:
        print(f"  step {now.step}/{now.steps} loss {now.mean_loss:.4f}", flush=True)


def losses(denoiser: Denoiser, task: TaskAdapter, data: TrainingData, prompts: Prompts) -> str:
    """Loss on unseen pictures, base against task."""
    base = validation_loss(denoiser, data, prompts)
    return f"{base:.4f} -> {validation_loss(denoiser, data, prompts, task):.4f}"


def train(
    name: str, denoiser: Denoiser, words: TaskAdapter, args: argparse.Namespace
) -> TaskAdapter:
    """Trains one job and prints what it did to pictures and words it never saw."""
    job, (seen, kept, style) = JOBS[name], split(name)
    data = pictures(denoiser, seen, style, job.per_word, seed=1)
    print(f"{name}: {len(data)} pictures of {len(seen)} words", flush=True)
    config = TrainingConfig(
        name=name, rank=RANK, steps=args.steps, batch=args.batch, lr=args.lr,
        lr_scale_shift=args.lr_scale_shift, lr_prompts=args.lr_prompts,
        prompts="learned" if job.learned else "stored", precision=args.precision, seed=args.seed,
        timestep_mean=0.3,  # as the base was trained
    )  # fmt: skip
    start = time.monotonic()
    task = train_task(denoiser, data, config, words=words, on_step=report)
    print(f"  {time.monotonic() - start:.0f} s")
    unseen = pictures(denoiser, seen, style, 2, seed=2)
    told = prompts_for(denoiser, seen, "stored", words=task if job.learned else words, null=words)
    print(f"  unseen pictures: loss {losses(denoiser, task, unseen, told)}")
    if kept:
        data = pictures(denoiser, kept, style, 4, seed=2)
        told = prompts_for(denoiser, kept, "stored", words=words)
        print(f"  unseen words: loss {losses(denoiser, task, data, told)}", flush=True)
    return task


def finished(name: str, task: TaskAdapter, denoiser: Denoiser, words: TaskAdapter) -> TaskAdapter:
    """The task as its file holds it: half precision, facts, thumbnail."""
    job = JOBS[name]
    told = prompts_of(denoiser, job.show, task, words)
    shown = preview(denoiser, task, told, (16, 16, 16), seed=3)
    halves = {
        layer: {part: tensor.half() for part, tensor in own.items()}
        for layer, own in task.layers.items()
    }
    spec = {
        "title": job.title,
        "description": job.description + CREDIT,
        "license": LICENSE,
        "thumbnail": encode_thumbnail(grid(shown, columns=2)),
    }
    return task.replace(layers=halves, modelspec=spec).with_info(license=LICENSE)


def prompts_of(
    denoiser: Denoiser, names: tuple[str, ...], task: TaskAdapter, words: TaskAdapter
) -> Prompts:
    """Prompts of some names: the task's own where it stores them, else the base's words."""
    table = task if names[0] in task.prompts else words
    return prompts_for(denoiser, names, "stored", words=table, null=words)


def sheet(
    name: str, task: TaskAdapter, denoiser: Denoiser, words: TaskAdapter, args: argparse.Namespace
) -> None:
    """Writes samples to look at; for a style: words it never saw below words it saw."""
    seen, kept, _ = split(name)
    names = seen if JOBS[name].learned else (*seen[:16], *kept[:16])
    told = prompts_of(denoiser, names, task, words)
    count = 4 if JOBS[name].learned else 1
    shown = preview(denoiser, task, told, (16, 16, 16), per_prompt=count, seed=5)
    grid(shown, columns=8).save(args.work / f"task_{name}.png")


def stack_sheet(
    subject: str, style: str, denoiser: Denoiser, words: TaskAdapter, args: argparse.Namespace
) -> None:
    """Writes a new subject in a new style: two tasks that never met, at strength 1 each."""
    tasks = [load_task(args.out / f"{name}.safetensors") for name in (subject, style)]
    names = SETS[subject][0]
    told = prompts_of(denoiser, names, tasks[0], words)
    rows = [
        preview(denoiser, task, told, (16, 16, 16), seed=5)
        for task in (tasks[0], combine_tasks(tasks))
    ]
    grid(rows[0] + rows[1], columns=len(names)).save(args.work / f"stack_{subject}_{style}.png")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", type=Path, default=Path("assets/pocket"))
    parser.add_argument("--out", type=Path, default=Path("assets/pocket/diffscaler"))
    parser.add_argument("--work", type=Path, default=Path(".cache/pocket"))
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--lr-scale-shift", type=float, default=1e-2)
    parser.add_argument("--lr-prompts", type=float, default=5e-2)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    denoiser = as_denoiser(load_pipeline(args.base))
    words = load_task(args.base / "diffscaler" / "words.safetensors")
    for name in args.only:
        task = train(name, denoiser, words, args)
        path = save_task(finished(name, task, denoiser, words), args.out / f"{name}.safetensors")
        sheet(name, load_task(path), denoiser, words, args)
        print(f"  {path}: {path.stat().st_size / 2**20:.2f} MiB", flush=True)
        if task.info["training"]["steps_done"] < args.steps:
            print("stopped early")
            return 130
    for subject in ("fruits", "smileys"):
        for style in ("ink", "neon"):
            if all((args.out / f"{n}.safetensors").is_file() for n in (subject, style)):
                stack_sheet(subject, style, denoiser, words, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
