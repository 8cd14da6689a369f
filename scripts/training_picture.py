"""Makes docs/images/first_task.jpg: what twenty pictures make of the pocket base, and how long.

    .venv/bin/python scripts/training_picture.py

Runs the command of docs/training.md as a user would, then draws words of the training pictures and
words that are not among them, with and without the new task, from the same noise.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffscaler_core import load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.training import as_denoiser, prompts_for, sample_prompts
from diffscaler_core.training.preview import to_image

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "assets" / "examples" / "ink"
SEEN = ("cat", "house", "rocket", "owl", "frog")
UNSEEN = ("rabbit", "pig", "heart", "sailboat", "butterfly")
CELL, GAP, MARGIN, LINE = 96, 6, 12, 22


def train(folder: Path) -> tuple[Path, float]:
    """Returns the task that the documented command makes, and the seconds it took."""
    out = folder / "my_ink.safetensors"
    start = time.perf_counter()
    subprocess.run(
        [
            str(Path(sys.executable).with_name("diffscaler")), "train",
            "--base", "assets/pocket", "--data", str(PICTURES.relative_to(ROOT)),
            "--out", str(out), "--lr", "0.005",
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    return out, time.perf_counter() - start


def draw(words: tuple[str, ...], file: Path | None) -> list[Image.Image]:
    """Returns the pocket base's pictures of some words, with a task on or not."""
    base = as_denoiser(load_pipeline(ROOT / "assets" / "pocket"))
    known = load_task(ROOT / "assets" / "pocket" / "diffscaler" / "words.safetensors")
    prompts = prompts_for(base, words, "stored", words=known)
    tasks = {} if file is None else {"ink": load_task(file)}
    with base.held(), base.attached(tasks):
        return [to_image(p) for p in sample_prompts(base, prompts, (16, 16, 16), seed=1)]


def sheet(rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Returns rows of pictures, each under its title."""
    width = 2 * MARGIN + 10 * CELL + 9 * GAP
    height = 2 * MARGIN + len(rows) * (LINE + CELL) + (len(rows) - 1) * 2 * GAP
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    y = MARGIN
    for title, pictures in rows:
        pen.text((MARGIN, y), title, fill="black", font=font)
        for i, picture in enumerate(pictures):
            small = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
            image.paste(small, (MARGIN + i * (CELL + GAP), y + LINE))
        y += LINE + CELL + 2 * GAP
    return image


def main() -> None:
    """Trains, draws, writes."""
    torch.set_num_threads(2)
    files = sorted(PICTURES.glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        task, seconds = train(Path(folder))
        print(f"{len(files)} pictures, {seconds:.0f} s from start to file")
        shown = [Image.open(path).convert("RGB") for path in files]
        rows = [
            (f"What it was shown: {len(files)} pictures", shown[:10]),
            ("", shown[10:20]),
            ("The base, words of those pictures, then other words", draw(SEEN + UNSEEN, None)),
            ("The base with the new task, same noise", draw(SEEN + UNSEEN, task)),
        ]
        target = ROOT / "docs" / "images" / "first_task.jpg"
        target.parent.mkdir(exist_ok=True)
        sheet(rows).save(target, quality=88)
        print(target)


if __name__ == "__main__":
    main()
