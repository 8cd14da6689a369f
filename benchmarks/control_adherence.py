"""How well results keep to their control: ours beside a ControlNet and other ways, same data.

    python benchmarks/control_adherence.py --kind silhouette --methods ours controlnet

On the pocket base, with pairs it draws itself (pocket/control_pictures.py). Every method trains by
the same trainer on the same pictures, noise and times; where rates are listed, each is tried for
the whole run and the best validation loss counts. Scores are of 64 controls nobody trained on, own
against shuffled; the ceiling is the real pictures', through the VAE. Results are added to a JSON
file, so a run can be continued method by method; `--report` prints the table and draws the sheet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "pocket"))

from control_methods import METHODS, Foreign, on  # noqa: E402
from control_pictures import SCORES, SEEN, controls, pairs, pictures  # noqa: E402

from diffscaler_core import TaskAdapter, load_task  # noqa: E402
from diffscaler_core.pocket import load_pipeline  # noqa: E402
from diffscaler_core.training import (  # noqa: E402
    Denoiser,
    Progress,
    TrainingConfig,
    as_denoiser,
    prompts_for,
    train_task,
    validation_loss,
)
from diffscaler_core.training.preview import grid, sample_controls  # noqa: E402

POCKET = ROOT / "assets" / "pocket"
PER_WORD, SEED, UNSEEN_SEED, WORDS = 24, 21, 22, 32
COMMON = {
    "rank": 8,
    "batch": 16,
    "lr": 6e-3,
    "lr_scale_shift": 1e-2,
    "lr_control": 6e-3,
    "prompts": "stored",
}


def report(now: Progress) -> None:
    """A line now and then."""
    if now.step % 250 == 0:
        bands = " ".join(f"{band:.3f}" for band in now.bands)
        print(f"  {now.step}/{now.steps} {now.mean_loss:.4f} by noise {bands}", flush=True)


class Bench:
    """The base, its pairs, and what is measured on them."""

    def __init__(self, kind: str, timestep_mean: float) -> None:
        self.kind, self.timestep_mean = kind, timestep_mean
        self.pipe = load_pipeline(POCKET)
        self.denoiser = as_denoiser(self.pipe)
        self.words = load_task(POCKET / "diffscaler" / "words.safetensors")
        self.data = pairs(self.denoiser, kind, SEEN, PER_WORD, SEED)
        names = SEEN[:WORDS]
        self.unseen = pairs(self.denoiser, kind, names, 2, UNSEEN_SEED)
        self.real = pictures(names, 2, UNSEEN_SEED)
        self.shown = controls(kind, names, 2, UNSEEN_SEED)
        self.told = prompts_for(self.denoiser, self.unseen.prompts, "stored", words=self.words)

    def train(
        self, name: str, rate: float | None, steps: int, seed: int
    ) -> tuple[dict[str, Any], Denoiser, TaskAdapter]:
        """One run of one method; returns its figures, and what it takes to use it."""
        method = METHODS[name]
        config = method.config(
            {
                **COMMON,
                "steps": steps,
                "seed": seed,
                "name": name,
                "control": self.kind,
                "timestep_mean": self.timestep_mean,
            },
            rate,
        )
        denoiser, network = self.denoiser, None
        if method.network is not None:
            network = method.network(self.pipe.transformer)
            denoiser = on(denoiser, network)
        started = time.monotonic()
        task = train_task(denoiser, self.data, config, words=self.words, on_step=report)
        seconds = (time.monotonic() - started) / steps
        count = task.num_parameters
        if network is not None:
            count = sum(p.numel() for p in network.parameters())
        figures = {
            "rate": config.lr,
            "parameters": count,
            "train_step": seconds,
            **self.scores(denoiser, task, config),
        }
        return figures, denoiser, task

    @torch.no_grad()
    def scores(
        self, denoiser: Denoiser, task: TaskAdapter, config: TrainingConfig
    ) -> dict[str, Any]:
        """Losses and overlaps on controls nobody trained on."""
        loss = validation_loss(denoiser, self.unseen, self.told, task, times=8)
        started = time.monotonic()
        shown = self.sample(denoiser, task)
        seconds = time.monotonic() - started
        results = torch.stack(shown[1::2])
        return {
            "loss": loss,
            **self.overlap(results),
            "frechet": self.frechet(results),
            "seconds_to_sample": seconds,
        }

    def sample(self, denoiser: Denoiser, task: TaskAdapter | None) -> list[Tensor]:
        """The unseen controls, each followed by its result."""
        examples = next(self.unseen.whole(len(self.unseen)))
        worn = contextlib.nullcontext() if task is None else denoiser.attached({task.name: task})
        with denoiser.held(), worn:
            return sample_controls(denoiser, self.told, examples, seed=5, steps=20, guidance=3.0)

    def overlap(self, results: Tensor) -> dict[str, float]:
        """Mean overlap with the own control and with others'."""
        score = SCORES[self.kind]
        own = float(score(results, self.shown).mean())
        others = [float(score(results, self.shown.roll(2 * k, 0)).mean()) for k in range(3, 9)]
        return {"own": own, "shuffled": statistics.mean(others)}

    def frechet(self, results: Tensor) -> float:
        """Distance of results to the real pictures, in the means and spreads of VAE latents."""
        one, other = (self.features(pixels) for pixels in (results, self.real))
        return float(frechet(one, other))

    def features(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 32): mean and spread of each channel of the VAE's latents."""
        encode = self.denoiser.encode
        assert encode is not None
        latents = torch.cat([encode(part) for part in pixels.split(16)]).flatten(2)
        return torch.cat([latents.mean(-1), latents.std(-1)], dim=1).double()


def frechet(one: Tensor, other: Tensor) -> Tensor:
    """Fréchet distance of two sets of features taken as Gaussians."""
    (mean_1, cov_1), (mean_2, cov_2) = ((x.mean(0), torch.cov(x.T)) for x in (one, other))
    root = torch.linalg.eigvals(cov_1 @ cov_2).real.clamp(min=0).sqrt().sum()
    return (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * root


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kind", choices=SCORES, default="silhouette")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rates", nargs="*", type=float, help="in place of a method's own")
    parser.add_argument("--timestep-mean", type=float, default=0.9, help="0.3 as the base trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/control_adherence"))
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--picture", type=Path, help="draw ours beside the others here and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.kind}_{args.steps}_{args.timestep_mean:g}.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if args.report:
        print(table(found))
        return
    if args.picture:
        compare(args.out, args.kind, best_of(found)).save(args.picture, quality=88)
        return
    bench = Bench(args.kind, args.timestep_mean)
    if "base" not in found:
        base = torch.stack(bench.sample(bench.denoiser, None)[1::2])
        seen = bench.denoiser
        with torch.no_grad():
            through = seen.decode(seen.encode(bench.real))  # type: ignore[misc]
        found["base"] = {
            "loss": validation_loss(bench.denoiser, bench.unseen, bench.told, times=8),
            **bench.overlap(base),
            "frechet": bench.frechet(base),
        }
        found["ceiling"] = {**bench.overlap(through), "frechet": bench.frechet(through)}
        grid(list(base), 16).save(args.out / f"{args.kind}_base.png")
    for name in args.methods:
        rates = METHODS[name].rates
        for rate in (rates and args.rates) or rates or (None,):
            key = name if rate is None else f"{name} {rate:g}"
            if key in found:
                continue
            print(key, flush=True)
            figures, denoiser, task = bench.train(name, rate, args.steps, args.seed)
            found[key] = figures
            print("  " + json.dumps(figures), flush=True)
            file.write_text(json.dumps(found, indent=1))
            pictures_of = bench.sample(denoiser, task)
            grid(pictures_of, 16).save(args.out / f"{args.kind}_{key.replace(' ', '_')}.png")
            with denoiser.attached({task.name: task}) as worn:
                if isinstance(worn, Foreign):
                    worn.network.remove()
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """The results as Markdown; of several rates the best."""
    rows = ["| method | parameters | own | shuffled | loss | Fréchet | training step |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, (_, f) in best_of(found).items():
        title = METHODS[name].title if name in METHODS else name
        if METHODS.get(name) and METHODS[name].rates:
            tried = sum(key.startswith(f"{name} ") for key in found)
            title += f" (lr {f['rate']:g}, the best of {tried} tried)"
        cells = [f"{f.get('parameters', 0):,}" if "parameters" in f else "–"]
        cells += [f"{f[k]:.3f}" for k in ("own", "shuffled")]
        cells += [f"{f['loss']:.4f}" if "loss" in f else "–", f"{f['frechet']:.3f}"]
        cells += [f"{f['train_step']:.3f} s" if "train_step" in f else "–"]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def best_of(found: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns each method's best run by validation loss: name -> (its key, its figures)."""
    best: dict[str, tuple[str, dict[str, Any]]] = {}
    for key, figures in found.items():
        name = key.partition(" ")[0]
        if name not in best or figures.get("loss", 0) < best[name][1].get("loss", 0):
            best[name] = (key, figures)
    return best


def compare(out: Path, kind: str, best: dict[str, tuple[str, dict[str, Any]]]) -> Image.Image:
    """Returns rows of controls, and of what the base, ours and a ControlNet make of them."""
    side, chosen = 128, (0, 6, 15, 17, 24, 28, 33, 40, 46, 62)
    rows = {"control": ("image", 0), "no control": ("base", 0)}
    rows |= {"ours": ("image", 1), "ControlNet": ("controlnet", 1)}
    left = 110
    page = Image.new("RGB", (left + len(chosen) * side, len(rows) * side), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for y, (label, (name, offset)) in enumerate(rows.items()):
        key = best[name][0].replace(" ", "_") if name in best else name
        sheet = Image.open(out / f"{kind}_{key}.png").convert("RGB")
        each = 1 if name == "base" else 2
        draw.text((8, y * side + side // 2 - 8), label, "black", font)
        for x, number in enumerate(chosen):
            row, column = divmod(each * number + offset, 16)
            cell = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            page.paste(sheet.crop(cell), (left + x * side, y * side))
    return page


if __name__ == "__main__":
    main()
