"""How much of a fully fine-tuned model a task can hold, by rank: weights, losses, pictures.

    python benchmarks/extraction.py                 # trains if it has to, measures, draws
    python benchmarks/extraction.py --report        # prints what was measured

Every weight of the pocket base is trained on one drawn style, by the trainer that trains tasks, at
each of the rates; the best by its loss on unseen pictures is kept in .cache, so that later runs
only measure (what the JSON file has already is kept). Tasks of several ranks are extracted from it
and put on the base: how far are their weights, their loss on pictures nobody trained on, and their
pictures from the same noise from the fine-tuned model's own?
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "pocket"))

from train_tasks import pictures, split  # noqa: E402

from diffscaler_core import TaskAdapter, load_task  # noqa: E402
from diffscaler_core.extraction import extract_task  # noqa: E402
from diffscaler_core.pocket import load_pipeline  # noqa: E402
from diffscaler_core.training import (  # noqa: E402
    Denoiser,
    Progress,
    TrainingConfig,
    as_denoiser,
    prompts_for,
    validation_loss,
)
from diffscaler_core.training.baselines import train_baseline  # noqa: E402
from diffscaler_core.training.preview import grid, preview, sample_prompts  # noqa: E402

POCKET = ROOT / "assets" / "pocket"
RANKS = (1, 2, 4, 8, 16, 32, 192)
FULL = 192  # the smaller side of every layer in the blocks
WAYS: dict[str, tuple[str, ...]] = {
    "with scale": ("scale", "shift", "subspace"),
    "without": ("shift", "subspace"),
}
SHAPE = (16, 16, 16)
SHOWN = 10  # columns of the sheet
ROWS = (1, 4, 16, FULL)


class Bench:
    """The base, the pictures, and what is measured on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.base = as_denoiser(load_pipeline(POCKET))
        self.words = load_task(POCKET / "diffscaler" / "words.safetensors")
        self.seen, self.kept, self.style = split(args.style)
        self.unseen = pictures(self.base, self.seen, self.style, 2, seed=2)
        self.told = prompts_for(self.base, self.seen, "stored", words=self.words)
        half = args.pictures // 2
        self.names = (*self.seen[:half], *self.kept[: args.pictures - half])
        self.drawn = prompts_for(self.base, self.names, "stored", words=self.words)

    def tuned(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The fine-tuned weights of the best rate, and the loss of every rate."""
        args, losses = self.args, {}
        best: tuple[float, Path] | None = None
        for rate in args.rates:
            file = args.cache / f"{args.style}_{args.steps}_{args.batch}_{rate:g}.safetensors"
            if not file.is_file():
                self.fine_tune(rate, file)
            loss = self.loss(self.with_weights(load_file(file)))
            losses[f"{rate:g}"] = loss
            print(f"full fine-tuning at {rate:g}: loss {loss:.4f}", flush=True)
            if best is None or loss < best[0]:
                best = (loss, file)
        assert best is not None
        return load_file(best[1]), {"losses": losses, "steps": args.steps, "batch": args.batch}

    def fine_tune(self, rate: float, file: Path) -> None:
        """Trains every weight of the base and writes them."""
        args = self.args
        data = pictures(self.base, self.seen, self.style, args.per_word, seed=1)
        config = TrainingConfig(
            name="whole", steps=args.steps, batch=args.batch, lr=rate, seed=args.seed,
            prompts="stored", precision="bf16", timestep_mean=0.3,
        )  # fmt: skip

        def report(now: Progress) -> None:
            if now.step % 100 == 0:
                print(f"  {now.step}/{now.steps} loss {now.mean_loss:.4f}", flush=True)

        started = time.monotonic()
        train_baseline(self.base, data, config, words=self.words, on_step=report).save(file)
        print(f"  {time.monotonic() - started:.0f} s", flush=True)

    def with_weights(self, weights: dict[str, Tensor]) -> Denoiser:
        """The pocket base with other weights."""
        pipe = load_pipeline(POCKET)
        pipe.transformer.load_state_dict({**pipe.transformer.state_dict(), **weights})
        return as_denoiser(pipe)

    def loss(self, denoiser: Denoiser, task: TaskAdapter | None = None) -> float:
        """The loss on pictures nobody trained on."""
        return validation_loss(denoiser, self.unseen, self.told, task, times=4)

    def draw(self, denoiser: Denoiser, task: TaskAdapter | None = None) -> Tensor:
        """Pictures of every name from the same noise, (N, 3, H, W) in 0..1."""
        if task is None:
            with denoiser.held():
                shown = sample_prompts(denoiser, self.drawn, SHAPE, seed=3)
        else:
            shown = preview(denoiser, task, self.drawn, SHAPE, seed=3)
        return (torch.stack(shown).clamp(-1, 1) + 1) / 2


def picture_error(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """RMSE over all, in grey levels of 255, and the mean over pictures of their PSNR in dB."""
    squares = (found - wanted).square().flatten(1).mean(1)
    # a picture that is the same to the last digit counts as 100 dB
    psnr = [min(100.0, -10 * math.log10(max(float(one), 1e-30))) for one in squares]
    return {"rmse": 255 * math.sqrt(float(squares.mean())), "psnr": sum(psnr) / len(psnr)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that has not been measured yet, and the sheet of pictures."""
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    bench = Bench(args)
    weights, training = bench.tuned()
    if found.get("training") != training:
        found = {"training": training}
    tuned = bench.with_weights(weights)
    wanted, before = bench.draw(tuned), bench.draw(bench.base)
    rows = {"base": before, "fine-tuned": wanted}

    def row(name: str, figures: dict[str, Any]) -> None:
        print(name, json.dumps(figures), flush=True)
        found[name] = figures
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))

    if "base" not in found:
        trained = load_task(POCKET / "diffscaler" / f"{args.style}.safetensors")
        count = sum(p.numel() for p in tuned.model.parameters())
        steps = dict(trained.info["training"])["steps_done"]
        row("fine-tuned", {"loss": bench.loss(tuned), "parameters": count})
        row("base", {"loss": bench.loss(bench.base), **picture_error(before, wanted)})
        own = {"parameters": trained.num_parameters, "steps": steps}
        row("trained task", {"loss": bench.loss(bench.base, trained), **own})
    for way, parts in WAYS.items():
        for rank in RANKS:
            name, on_sheet = f"{way} {rank}", way == next(iter(WAYS)) and rank in ROWS
            if name in found and not on_sheet:
                continue
            extraction = extract_task(tuned.model, bench.base.model, rank, parts=parts)
            task, report = extraction.task, extraction.report
            drawn = bench.draw(bench.base, task)
            if on_sheet:
                rows["full rank" if rank == FULL else f"rank {rank}"] = drawn
            if name not in found:
                figures = {"kept": report.kept, "weight_error": report.error}
                figures |= {"parameters": task.num_parameters, **picture_error(drawn, wanted)}
                row(name, {**figures, "loss": bench.loss(bench.base, task)})
    every = list(range(0, len(bench.names), max(1, len(bench.names) // SHOWN)))[:SHOWN]
    sheet({label: drawn[every] for label, drawn in rows.items()}, args.picture)
    return found


def sheet(rows: dict[str, Tensor], file: Path) -> None:
    """Writes the rows of pictures, (N, 3, H, W) in 0..1, with their names on the left."""
    left, side = 110, 96
    count = len(next(iter(rows.values())))
    page = Image.new("RGB", (left + count * side, len(rows) * side), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for y, (label, drawn) in enumerate(rows.items()):
        line = grid([one * 2 - 1 for one in drawn], count).resize((count * side, side), 1)
        page.paste(line, (left, y * side))
        pen.text((8, y * side + side // 2 - 8), label, "black", font)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.save(file, quality=85)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| | parameters | change kept | weight error | loss | RMSE | PSNR |", "|" + "---|" * 7]

    def line(title: str, f: dict[str, Any], count: int | None) -> str:
        cells: Sequence[str] = [
            f"{count:,}" if count else "–",
            f"{f['kept']:.1%}" if "kept" in f else "–",
            f"{f['weight_error']:.3f}" if "kept" in f else "–",
            f"{f['loss']:.4f}",
            f"{f['rmse']:.1f}" if "rmse" in f else "–",
            "–" if "psnr" not in f else "equal" if f["psnr"] > 99 else f"{f['psnr']:.1f} dB",
        ]
        return f"| {title} | {' | '.join(cells)} |"

    lines.append(line("base", found["base"], None))
    for way in WAYS:
        for rank in RANKS:
            f = found[f"{way} {rank}"]
            shown = "full rank" if rank == FULL else f"rank {rank}"
            lines.append(line(f"extracted, {way}, {shown}", f, f["parameters"]))
    lines.append(line("fine-tuned model", found["fine-tuned"], found["fine-tuned"]["parameters"]))
    own = found["trained task"]
    lines.append(line(f"task trained in its place, {own['steps']} steps", own, own["parameters"]))
    return "\n".join(lines)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--style", default="ink", choices=("ink", "neon"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--per-word", type=int, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3])
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "extraction")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "extraction.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "extraction.jpg")
    parser.add_argument("--report", action="store_true", help="print what was measured")
    args = parser.parse_args()
    if not args.report:
        torch.set_num_threads(args.threads)
        measure(args)
    print(table(json.loads(args.out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
