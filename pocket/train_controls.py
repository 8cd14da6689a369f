"""Trains the pocket base's control tasks: edges to picture, silhouette to picture.

    python pocket/train_controls.py                # both
    python pocket/train_controls.py --only edges

Pairs are drawn (control_pictures.py): a subject anywhere, turned and scaled. Every seventh word is
kept from the training. Writes `<task>.safetensors` with a thumbnail of controls and results, and
contact sheets to look at; prints how well results keep to controls nobody trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from control_pictures import KINDS, SCORES, SEEN, UNSEEN, controls, pairs

from diffscaler_core import TaskAdapter, load_task, save_task
from diffscaler_core.combine import cast_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.thumbnails import encode_thumbnail
from diffscaler_core.training import (
    Denoiser,
    Progress,
    TrainingConfig,
    as_denoiser,
    prompts_for,
    train_task,
    validation_loss,
)
from diffscaler_core.training.preview import grid, sample_controls

TITLES = {
    "edges": ("Edges", "Pictures along white edges on black (Canny 0.1, 0.2). "),
    "silhouette": ("Silhouette", "Pictures that fill a white silhouette on black. "),
}
#: What each was trained with. Edges want more: all of the rank in the blocks' image stream, as a
#: control says nothing of the text; and more noise than the base saw (its mean was 0.3), as there
#: it is settled where things stand.
SETTINGS: dict[str, dict[str, Any]] = {
    "silhouette": {"rank": 8, "steps": 2500, "timestep_mean": 0.3},
    "edges": {
        "rank": 16,
        "steps": 3000,
        "timestep_mean": 0.9,
        "exclude": r".*(add_[qkv]_proj|to_add_out|ff_context|norm1_context).*",
    },
}
SHOWN = ("cat", "sailboat")  # on the thumbnail
LICENSE = "Apache-2.0"
CREDIT = "Trained on pictures drawn from Noto Color Emoji (SIL OFL 1.1) and DejaVu Sans."


def report(now: Progress) -> None:
    """A line now and then."""
    if now.step % 100 == 0 or now.step == now.steps:
        bands = " ".join(f"{band:.3f}" for band in now.bands)
        print(f"  {now.step}/{now.steps} loss {now.mean_loss:.4f} by noise {bands}", flush=True)


def train(
    kind: str, denoiser: Denoiser, words: TaskAdapter, args: argparse.Namespace
) -> TaskAdapter:
    """Trains one task and prints how well it keeps to unseen controls, of seen and unseen words."""
    data = pairs(denoiser, kind, SEEN, args.per_word, seed=21)
    print(f"{kind}: {len(data)} pairs of {len(SEEN)} words", flush=True)
    steps = args.steps or SETTINGS[kind]["steps"]
    config = TrainingConfig(
        **{**SETTINGS[kind], "steps": steps}, name=kind, control=kind, batch=args.batch,
        lr=args.lr, lr_scale_shift=args.lr_scale_shift, lr_control=args.lr_control,
        prompts="stored", precision=args.precision, seed=args.seed,
    )  # fmt: skip
    start = time.monotonic()
    task = train_task(denoiser, data, config, words=words, on_step=report)
    print(f"  {time.monotonic() - start:.0f} s")
    for names, which in ((SEEN[:32], "seen"), (UNSEEN, "unseen")):
        test = pairs(denoiser, kind, names, 2, seed=22)
        told = prompts_for(denoiser, names, "stored", words=words)
        base, loss = (validation_loss(denoiser, test, told, t) for t in (None, task))
        with denoiser.held(), denoiser.attached({kind: task}):
            shown = sample_controls(
                denoiser, told, next(test.whole(len(test))), seed=5, guidance=args.guidance
            )
        results, own = torch.stack(shown[1::2]), controls(kind, names, 2, seed=22)
        score = SCORES[kind]
        kept, shuffled = (float(score(results, c).mean()) for c in (own, own.roll(6, 0)))
        print(
            f"  {which} words: loss {base:.4f} -> {loss:.4f}; overlap with the own control "
            f"{kept:.3f}, with another {shuffled:.3f}",
            flush=True,
        )
        grid(shown, columns=16).save(args.work / f"control_{kind}_{which}.png")
    return task


def finished(kind: str, task: TaskAdapter, denoiser: Denoiser, words: TaskAdapter) -> TaskAdapter:
    """The task as its file holds it: half precision, facts, thumbnail."""
    told = prompts_for(denoiser, SHOWN, "stored", words=words)
    test = pairs(denoiser, kind, SHOWN, 1, seed=22)
    with denoiser.held(), denoiser.attached({kind: task}):
        shown = sample_controls(denoiser, told, next(test.whole(2)), seed=3)
    title, description = TITLES[kind]
    spec = {
        "title": title,
        "description": description + CREDIT,
        "license": LICENSE,
        "thumbnail": encode_thumbnail(grid(shown, columns=2)),
    }
    task = task.replace(modelspec=spec).with_info(license=LICENSE)
    return cast_task(task, torch.float16)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", type=Path, default=Path("assets/pocket"))
    parser.add_argument("--out", type=Path, default=Path("assets/pocket/diffscaler"))
    parser.add_argument("--work", type=Path, default=Path(".cache/pocket"))
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--per-word", type=int, default=24)
    parser.add_argument("--steps", type=int, help="in place of SETTINGS'")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--lr-scale-shift", type=float, default=1e-2)
    parser.add_argument("--lr-control", type=float, default=6e-3)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    denoiser = as_denoiser(load_pipeline(args.base))
    words = load_task(args.base / "diffscaler" / "words.safetensors")
    for kind in args.only:
        task = finished(kind, train(kind, denoiser, words, args), denoiser, words)
        path = save_task(task, args.out / f"{kind}.safetensors")
        print(f"  {path}: {task.num_parameters:,} parameters, {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
