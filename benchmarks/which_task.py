"""How often `which_task` names the task that drew a picture, by how many probes it is given.

    python benchmarks/which_task.py --plot docs/images/which_task.png

The four tasks of the pocket base and the base alone draw pictures, each from noise of its own. The
right answer is none of them for the base's own pictures, for pixels of pure noise, and for the
picture of a task that is no candidate. Pictures go through the VAE and back before they are judged.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffscaler_core import TaskAdapter, load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.systems.ranking import Ranking
from diffscaler_core.systems.ranking_chart import draw_ranking
from diffscaler_core.systems.which_task import ProbeSettings, which_task
from diffscaler_core.training import as_denoiser
from diffscaler_core.training.conditioning import Prompts, prompts_for
from diffscaler_core.training.denoiser import Denoiser
from diffscaler_core.training.preview import sample_latents
from diffscaler_core.training.randomness import generator_for

POCKET = Path(__file__).resolve().parent.parent / "assets" / "pocket"
TASKS = ("fruits", "smileys", "ink", "neon")
WORDS = ("cat", "house", "rocket", "tree", "fish", "heart", "owl", "car")
#: What is measured: a name, and how pictures are probed.
WAYS = {
    "8 probes": ProbeSettings(stages=((8, 1),)),
    "16 probes": ProbeSettings(stages=((16, 1),)),
    "up to 16 probes, halving": ProbeSettings(probes=16),
}
#: What counts as fitting: (threshold in standard errors, least share of the base's error).
RULES = {"2 std. errors": (2.0, 0.0), "3 std. errors": (3.0, 0.0), "3 and a fifth": (3.0, 0.2)}
#: Pictures for which the right answer is none of them -> the column.
OTHERS = {
    "without": "none, its task left out",
    "base": "none, of the base's",
    "noise": "none, of noise",
}


def drawn(
    denoiser: Denoiser,
    name: str,
    tasks: dict[str, TaskAdapter],
    words: TaskAdapter,
    count: int,
    seed: int,
) -> Iterator[Tensor]:
    """Yields pictures (1, 3, 128, 128) in −1..1 by a task, by the base, or of noise."""
    if name == "noise":
        for i in range(count):
            generator = generator_for(seed, "bench which task", name, i)
            yield torch.rand(1, 3, 128, 128, generator=generator) * 2 - 1
        return
    own = tasks.get(name)
    stored = own if own is not None and own.prompts else words
    asked = [word for word in (own.prompts if stored is own else WORDS) if word in stored.prompts]
    prompts: Prompts = prompts_for(denoiser, asked, "stored", words=stored, null=words)
    index = torch.arange(count) % len(asked)
    noise = [
        torch.randn(16, 16, 16, generator=generator_for(seed, "bench which task", name, i))
        for i in range(count)
    ]
    worn = contextlib.nullcontext() if own is None else denoiser.attached({name: own})
    with torch.no_grad(), denoiser.held(), worn:
        null = prompts.null(count)
        latents = sample_latents(denoiser, prompts(index), null, torch.stack(noise))
    assert denoiser.decode is not None
    with torch.no_grad():
        yield from denoiser.decode(latents).split(1)


def main() -> None:
    """Prints a line per picture and way while it runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=8, help="Pictures of each kind.")
    parser.add_argument("--seed", type=int, default=0, help="Of the pictures.")
    parser.add_argument("--plot", type=Path, help="A chart of one picture's ranking.")
    parser.add_argument("--json", type=Path, help="All rankings.")
    asked = parser.parse_args()
    denoiser = as_denoiser(load_pipeline(POCKET))
    folder = POCKET / "diffscaler"
    words = load_task(folder / "words.safetensors")
    tasks = {name: load_task(folder / f"{name}.safetensors") for name in TASKS}
    found: dict[str, list[tuple[str, Ranking]]] = {way: [] for way in WAYS}
    for kind in (*TASKS, "base", "noise"):
        for number, picture in enumerate(
            drawn(denoiser, kind, tasks, words, asked.count, asked.seed)
        ):
            for way, settings in WAYS.items():
                ranking = which_task(denoiser, picture, tasks, None, settings, words=words)
                found[way].append((kind, ranking))
                print(kind, number, way, ranking.sentence(), sep=" | ", flush=True)
                if asked.plot and (kind, number, way) == ("fruits", 0, "16 probes"):
                    buffer = io.BytesIO()
                    draw_ranking(ranking, picture[0]).save(buffer, "PNG")
                    asked.plot.write_bytes(buffer.getvalue())
    report(found)
    if asked.json:
        plain = {w: [(kind, r.plain()) for kind, r in own] for w, own in found.items()}
        asked.json.write_text(json.dumps(plain, indent=1), encoding="utf-8")


def report(found: dict[str, list[tuple[str, Ranking]]]) -> None:
    """Prints the table: a row per way and rule."""
    columns = ("forward passes", "its task is best", "its task", *OTHERS.values())
    print(f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for way, own in found.items():
        drawn_by = [(kind, ranking) for kind, ranking in own if kind in TASKS]
        forwards = sum(ranking.forwards for _, ranking in own) / len(own)
        best = share([ranking.best.name == kind for kind, ranking in drawn_by])
        for rule, (threshold, least) in RULES.items():
            ruled = [(k, replace(r, threshold=threshold, least=least)) for k, r in own]
            cells = [share([r.answer == k for k, r in ruled if k in TASKS])]
            # without halving nothing depends on the other candidates, so one can be taken away
            without = [without_truth(k, r) for k, r in ruled if k in TASKS]
            cells.append("" if "halving" in way else share([r.answer is None for r in without]))
            for kind in ("base", "noise"):
                cells.append(share([r.answer is None for k, r in ruled if k == kind]))
            print(f"| {way}, {rule} | {forwards:.0f} | {best} | {' | '.join(cells)} |")


def without_truth(kind: str, ranking: Ranking) -> Ranking:
    """Returns the ranking as it would be if the task that drew the picture were no candidate."""
    return replace(ranking, fits=tuple(fit for fit in ranking.fits if fit.name != kind))


def share(right: list[bool]) -> str:
    """Returns how many are right, as text."""
    return f"{sum(right)} of {len(right)}"


if __name__ == "__main__":
    main()
