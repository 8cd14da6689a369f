"""Trains the pocket base's task *refine*: a coarse picture becomes a sharp one.

    python scripts/train_refine.py     writes assets/tasks/refine.safetensors; goes on if it stopped

Pictures are drawn as for the other control tasks (`pocket/control_pictures.py`), and their coarse
versions made of them (`training/data/coarse.py`). Every seventh word is kept from the training;
prints how near results come to pictures nobody trained on, and writes a sheet to look at.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "pocket"))

from control_pictures import CACHE, SEEN, UNSEEN, pictures  # noqa: E402

from diffscaler_core import TaskAdapter, load_task, save_task  # noqa: E402
from diffscaler_core.combine import cast_task  # noqa: E402
from diffscaler_core.pocket import load_pipeline  # noqa: E402
from diffscaler_core.thumbnails import encode_thumbnail  # noqa: E402
from diffscaler_core.training import (  # noqa: E402
    Denoiser,
    Progress,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    encode_pictures,
    prompts_for,
    train_task,
)
from diffscaler_core.training.data.coarse import KINDS, Coarse  # noqa: E402
from diffscaler_core.training.preview import grid, sample_controls  # noqa: E402

NAME = "refine"
SHOWN = ("cat", "sailboat")  # on the thumbnail
#: A coarse picture says nothing of the text, so the rank goes to the image's stream.
EXCLUDE = r".*(add_[qkv]_proj|to_add_out|ff_context|norm1_context).*"
#: The base's last layers are adapted too: what the control shows can be drawn as it is then, past
#: the blocks.
TARGETS = r"transformer_blocks\..*|proj_out|norm_out\.linear"
#: JPEG, the hardest, is shown as often as the others together.
COARSE = Coarse(kinds=("jpeg", "jpeg", "blur", "low_resolution"))
RANK = 32
#: Times lie at more noise than usual: it is there that a picture's colours are settled, and ten
#: steps of a sampler are mostly there.
SETTINGS: dict[str, Any] = {
    "steps": 20000, "batch": 8, "lr": 2e-3, "lr_scale_shift": 4e-3, "lr_control": 3e-3,
    "timestep_mean": 1.0, "drop": 0.1, "save_every": 1000,
}  # fmt: skip
#: So many pictures of each word, drawn so many times over.
PER_WORD, DRAWN = 8, 10
LICENSE = "Apache-2.0"
ABOUT = (
    "Coarse pictures (blurred, of low resolution, through heavy JPEG) become sharp. Trained on "
    "pictures drawn from Noto Color Emoji (SIL OFL 1.1) and DejaVu Sans."
)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--base", type=Path, default=ROOT / "assets" / "pocket")
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tasks")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "pocket")
    parser.add_argument("--drawn", type=int, default=DRAWN)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    denoiser = as_denoiser(load_pipeline(args.base))
    words = load_task(args.base / "diffscaler" / "words.safetensors")
    config = TrainingConfig(
        name=NAME, control=NAME, rank=RANK, targets=TARGETS, exclude=EXCLUDE, prompts="stored",
        **{**SETTINGS, "steps": args.steps},
    )  # fmt: skip
    start = time.monotonic()
    data = pairs(denoiser, SEEN, PER_WORD, range(21, 21 + args.drawn), COARSE)
    print(f"{len(data)} pairs, {time.monotonic() - start:.0f} s", flush=True)
    task = train_task(denoiser, data, config, words=words, folder=args.work / NAME, on_step=report)
    print(f"trained, {time.monotonic() - start:.0f} s", flush=True)
    for names, which in ((SEEN[:8], "seen"), (UNSEEN, "unseen")):
        look(task, denoiser, words, names, which, args.work)
    task = finished(task, denoiser, words)
    path = save_task(task, args.out / f"{NAME}.safetensors")
    print(f"{path}: {task.num_parameters:,} parameters, {path.stat().st_size:,} bytes")
    return 0


def pairs(
    denoiser: Denoiser,
    words: Sequence[str],
    per_word: int,
    seeds: Sequence[int],
    make: Coarse,
) -> TrainingData:
    """Pictures and their coarse versions as latents; encoded once and kept."""
    drawn = torch.cat([pictures(words, per_word, seed) for seed in seeds])
    encode = denoiser.encode
    assert encode is not None
    return encode_pictures(
        drawn.__getitem__,
        [word for word in words for _ in range(per_word)] * len(seeds),
        encode,
        control_from=make,
        cache=CACHE,
        encoder_key=denoiser.encoder_key,
    )


def report(now: Progress) -> None:
    """A line now and then."""
    if now.step % 500 == 0 or now.step == now.steps:
        print(f"  {now.step}/{now.steps} loss {now.mean_loss:.4f}, {now.rate:.2f}/s", flush=True)


def look(
    task: TaskAdapter,
    denoiser: Denoiser,
    words: TaskAdapter,
    names: Sequence[str],
    which: str,
    folder: Path,
) -> None:
    """Prints how near coarse and refined pictures are to the true ones; writes them as a sheet."""
    true = pictures(names, 1, seed=122)
    sheet: list[Tensor] = []
    for kind in KINDS:
        test = pairs(denoiser, names, 1, [122], Coarse(kinds=(kind,)))
        whole = next(test.whole(len(test)))
        told = prompts_for(denoiser, test.prompts, "stored", words=words)
        with denoiser.held(), denoiser.attached({NAME: task}):
            shown = sample_controls(denoiser, told, whole, seed=5, steps=10, guidance=1)
        coarse, refined = torch.stack(shown[0::2]), torch.stack(shown[1::2])
        near = [float(psnr(each, true).mean()) for each in (coarse, refined)]
        print(
            f"  {which} words, {kind}: coarse {near[0]:.2f}, refined {near[1]:.2f} dB", flush=True
        )
        sheet += [picture for row in zip(coarse, refined, true, strict=True) for picture in row]
    folder.mkdir(parents=True, exist_ok=True)
    grid(sheet, columns=6).save(folder / f"{NAME}_{which}.png")


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures (N, 3, H, W) in −1..1, in dB, (N,)."""
    return 10 * torch.log10(4 / (one - other).square().flatten(1).mean(1))


def finished(task: TaskAdapter, denoiser: Denoiser, words: TaskAdapter) -> TaskAdapter:
    """The task as its file holds it: half precision, facts, thumbnail."""
    test = pairs(denoiser, SHOWN, 1, [22], COARSE)
    told = prompts_for(denoiser, test.prompts, "stored", words=words)
    with denoiser.held(), denoiser.attached({NAME: task}):
        shown = sample_controls(denoiser, told, next(test.whole(2)), seed=3, guidance=1)
    spec = {
        "title": "Refine",
        "description": ABOUT,
        "license": LICENSE,
        "thumbnail": encode_thumbnail(grid(shown, columns=2)),
    }
    return cast_task(task.replace(modelspec=spec).with_info(license=LICENSE), torch.float16)


if __name__ == "__main__":
    sys.exit(main())
