"""Chosen ranks against even ones, at the same number of parameters, on the pocket base.

    python benchmarks/auto_rank.py                          # all of it, several hours on one core
    python benchmarks/auto_rank.py --budgets 2 4 --seeds 0  # some
    python benchmarks/auto_rank.py --table                  # what is known so far

Trains tasks of `pocket/train_tasks.py` on their pictures and takes the validation loss on pictures
that were never trained on, at fixed noise. Ways to spend the numbers of rank R everywhere:

    even         rank R in every layer
    gradient     rank "auto": what `choose_ranks` finds in the gradient's spectrum
    activation   by the spectrum of each layer's inputs, each layer's share of its own variance: the
                 criterion of EVA (arXiv:2410.07170), bought by worth per number as ours is
    shuffled     the gradient's spectra handed to other layers: what unevenness alone does

Results go into a JSON file as they come; what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pocket"))

from train_tasks import JOBS, pictures, split

from diffscaler_core import TaskAdapter, load_task, new_task
from diffscaler_core.atomic import write_whole
from diffscaler_core.auto_rank import RankChoice, Spectrum, allocate
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.targets import find_targets, resolve
from diffscaler_core.training import (
    Denoiser,
    Prompts,
    TaskRun,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    choose_ranks,
    prompts_for,
    train_tasks,
    validation_loss,
)
from diffscaler_core.training.learner import Learner

WAYS = ("even", "gradient", "activation", "shuffled")
PRECISION = "bf16"


class Bench:
    """One task's pictures, and what is told about them."""

    def __init__(self, denoiser: Denoiser, words: TaskAdapter, name: str, cache: Path) -> None:
        self.denoiser, self.words, self.name = denoiser, words, name
        self.data = self._pictures(cache, 1, JOBS[name].per_word)
        self.unseen = self._pictures(cache, 2, 6 if JOBS[name].learned else 2)

    def _pictures(self, cache: Path, seed: int, count: int) -> TrainingData:
        file = cache / f"{self.name}-{seed}-{count}.safetensors"
        if not file.is_file():
            seen, _, style = split(self.name)
            data = pictures(self.denoiser, seen, style, count, seed)
            cache.mkdir(parents=True, exist_ok=True)
            tensors = {"latents": data.latents.contiguous(), "index": data.index}
            save_file(tensors, file, {"prompts": json.dumps(data.prompts)})
        with safe_open(file, "pt") as kept:
            prompts = tuple(json.loads(kept.metadata()["prompts"]))
            return TrainingData(kept.get_tensor("latents"), kept.get_tensor("index"), prompts)

    def config(self, steps: int, seed: int, rank: int | str, budget: int) -> TrainingConfig:
        """The settings of `pocket/train_tasks.py`, at batch 16."""
        return TrainingConfig(
            name=self.name, rank=rank, rank_budget=budget, steps=steps, batch=16, lr=6e-3,
            lr_scale_shift=1e-2, lr_prompts=5e-2, precision=PRECISION, seed=seed,
            prompts="learned" if JOBS[self.name].learned else "stored", timestep_mean=0.3,
        )  # fmt: skip

    def prompts(self, config: TrainingConfig) -> Prompts:
        """The prompts a run starts from."""
        return prompts_for(self.denoiser, self.data.prompts, config.prompts, words=self.words)

    def choose(self, way: str, config: TrainingConfig) -> RankChoice | None:
        """Ranks by one of WAYS; None: even ones."""
        if way == "even":
            return None
        choice = choose_ranks(self.denoiser, self.data, config, words=self.words)
        if way == "activation":
            return respent(choice, self.inputs(config, choice))
        if way == "shuffled":
            order = list(choice.spectra)
            random.Random(1).shuffle(order)
            moved = zip(choice.spectra, order, strict=True)
            return respent(choice, {name: choice.spectra[other].gains for name, other in moved})
        return choice

    def inputs(self, config: TrainingConfig, choice: RankChoice) -> dict[str, tuple[float, ...]]:
        """Shares of variance of each layer's inputs, largest first, over the same looks."""
        model, sums = self.denoiser.model, dict[str, Tensor]()
        handles = []
        for target in find_targets(model):
            layer = resolve(model, target.name)
            assert layer is not None
            handles.append(layer.register_forward_hook(_note(sums, target.name)))
        probe = {"probe": new_task(model, "bitfit", name="probe")}
        try:
            with self.denoiser.held(), torch.no_grad(), self.denoiser.attached(probe) as worn:
                run = TaskRun("probe", self.data)
                learner = Learner(run, worn, self.prompts(config), None, config,
                                  self.denoiser.objective, self.denoiser.device)  # fmt: skip
                for step in range(8):
                    drawn = learner.draw(step)
                    when, x_t = self.denoiser.objective.noisy(drawn.x0, drawn.noise, drawn.t)
                    with self.denoiser.autocast(PRECISION):
                        self.denoiser(x_t, when, learner.condition(drawn))
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name in choice.spectra:
            values = torch.linalg.eigvalsh(sums[name]).flip(0).clamp(min=0)
            found[name] = tuple((values / values.sum()).tolist())
        return found

    def run(self, way: str, budget: int, steps: int, seed: int) -> dict[str, object]:
        """Trains one task; returns what came of it."""
        config = self.config(steps, seed, budget if way == "even" else "auto", budget)
        start = time.monotonic()
        choice = self.choose(way, config)
        chosen = time.monotonic() - start
        run = TaskRun(self.name, self.data, words=self.words, ranks=choice)
        task = train_tasks(self.denoiser, [run], config)[self.name]
        table = task if JOBS[self.name].learned else self.words
        told = prompts_for(self.denoiser, self.data.prompts, "stored", words=table, null=self.words)
        loss = validation_loss(self.denoiser, self.unseen, told, task, precision=PRECISION)
        return {
            "loss": loss,
            "parameters": task.num_parameters,
            "ranks": None if choice is None else dict(choice.ranks),
            "seconds_choosing": round(chosen, 1),
            "seconds": round(time.monotonic() - start, 1),
        }


def _note(sums: dict[str, Tensor], name: str) -> object:
    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0].flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + x.T @ x

    return hook


def respent(choice: RankChoice, gains: dict[str, tuple[float, ...]]) -> RankChoice:
    """The same budget, spent by other spectra."""
    spectra = {n: Spectrum(gains[n], own.cost) for n, own in choice.spectra.items()}
    return replace(choice, ranks=allocate(spectra, choice.budget, 64), spectra=spectra)


def table(results: dict[str, dict[str, float]]) -> str:
    """Means over seeds, one row per task and budget; the loss above, its spread in brackets."""
    rows: dict[tuple[str, int, int], dict[str, list[dict[str, float]]]] = {}
    for key, found in results.items():
        name, steps, way, budget, _ = key.split("/")
        own = rows.setdefault((name, int(steps), int(budget)), {})
        own.setdefault(way, []).append(found)
    lines = ["| task | steps | numbers | " + " | ".join(WAYS) + " |"]
    lines.append("|---|---|---|" + "---|" * len(WAYS))
    for (name, steps, budget), ways in sorted(rows.items()):
        cells = []
        for way in WAYS:
            losses = [found["loss"] for found in ways.get(way, ())]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            cells.append(f"{statistics.mean(losses):.4f}{spread}" if losses else "")
        most = max(found["parameters"] for own in ways.values() for found in own)
        lines.append(f"| {name} | {steps} | rank {budget}: {most:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", type=Path, default=Path("assets/pocket"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/auto_rank_measured.json"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/auto_rank"))
    parser.add_argument("--tasks", nargs="+", choices=JOBS, default=["fruits", "ink"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[4, 2, 1, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="Train nothing, print the table.")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if not args.table:
        torch.set_num_threads(args.threads)
        denoiser = as_denoiser(load_pipeline(args.base))
        words = load_task(args.base / "diffscaler" / "words.safetensors")
        benches = {name: Bench(denoiser, words, name, args.cache) for name in args.tasks}
        todo = [
            (name, way, budget, seed)
            for seed in args.seeds
            for budget in args.budgets
            for way in args.ways
            for name in args.tasks
        ]
        for name, way, budget, seed in todo:
            key = f"{name}/{args.steps}/{way}/{budget}/{seed}"
            if key not in results:
                results[key] = benches[name].run(way, budget, args.steps, seed)
                print(key, f"{results[key]['loss']:.4f}", flush=True)
                write_whole(args.out, json.dumps(results, indent=1).encode())
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
