"""Makes docs/images/training_helpers.png: an alignment over steps, and the risks of two groups.

.venv/bin/python scripts/helpers_picture.py

Left: the pocket base learns the twenty ink drawings with `repa = "pocket"`; once the whole task and
the projector learn, once the projector alone. Right: a toy whose task can learn one number only,
shown 90 pictures at 0 and ten at 1; trained as usual, and with `debias`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from diffscaler_core import load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.training import (
    Denoiser,
    Objective,
    Progress,
    TaskRun,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    encode_folder,
    prompts_for,
    train_task,
    train_tasks,
)
from diffscaler_core.training.hidden_groups import picture_losses

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "images" / "training_helpers.png"
STEPS, MANY, FEW = 100, 90, 10
BLUE, ORANGE, LIGHT = "#0072B2", "#D55E00", "#c8c8c8"


def alignments() -> dict[str, list[float]]:
    """Returns the cosine at each step, of the whole task and of the projector alone."""
    base = as_denoiser(load_pipeline(ROOT / "assets" / "pocket"))
    assert base.encode is not None
    words = load_task(ROOT / "assets" / "pocket" / "diffscaler" / "words.safetensors")
    data = encode_folder(ROOT / "assets" / "examples" / "ink", 128, base.encode, name="ink")
    found = {}
    for name, whole in (("projector alone", False), ("task and projector", True)):
        told: list[float] = []

        def on_step(now: Progress, told: list[float] = told) -> None:
            told.append(now.alignment or 0.0)

        config = TrainingConfig(
            # the projector moves at lr, and so would subspaces; scales and shifts can stand still
            method="diffscaler" if whole else "scale_shift", lr=2e-3,
            lr_scale_shift=5e-3 if whole else 1e-12,
            steps=STEPS, batch=4, rank=4, schedule="constant",
            repa="pocket", repa_until=1.0, repa_width=256,
        )  # fmt: skip
        train_task(base, data, config, words=words, on_step=on_step)
        found[name] = told
    return found


class Constant(nn.Module):
    """A base that says 0 whatever it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Returns zeros, and what a task adds to them."""
        found: Tensor = self.blocks[0](x.movedim(1, -1)).movedim(-1, 1)
        return found


def group_risks() -> dict[str, tuple[float, float]]:
    """Returns the losses of the many and of the few, as usual and with `debias`."""
    model = Constant()
    base = Denoiser(model, lambda x, t, told: model(x), Objective("x0"), channels=2)
    middle = torch.cat([torch.zeros(MANY), torch.ones(FEW)]).view(-1, 1, 1, 1)
    noise = torch.randn(MANY + FEW, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    index = torch.zeros(MANY + FEW, dtype=torch.long)
    data = TrainingData((middle + 0.05 * noise)[None], index, ("all",))
    found, biased = {}, None
    for name, weight in (("as usual", 0.0), ("with debias", 1.0)):
        config = TrainingConfig(
            method="bitfit", targets=r".*", steps=150, batch=50, lr_scale_shift=2e-2, warmup=0,
            drop=0.0, debias=weight,
        )  # fmt: skip
        task = train_tasks(base, [TaskRun("task", data, biased=biased)], config)["task"]
        with base.held(), base.attached({"task": task}):
            losses = picture_losses(base, data, prompts_for(base, data.prompts), times=2)
        found[name] = (float(losses[:MANY].mean()), float(losses[MANY:].mean()))
        biased = task
    return found


def main() -> None:
    """Trains, draws, writes."""
    torch.set_num_threads(1)
    curves, bars = alignments(), group_risks()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (name, told), colour in zip(curves.items(), (LIGHT, BLUE), strict=True):
        width = 1.2 if colour == BLUE else 4
        left.plot(range(1, STEPS + 1), told, color=colour, label=name, lw=width)
        print(f"{name}: cosine {told[0]:.3f} at step 1, {told[-1]:.3f} at step {STEPS}")
    left.set(xlabel="step", ylabel="mean cosine", title="repa: a block and an encoder")
    left.legend(frameon=False, loc="lower right")
    for i, (name, colour) in enumerate((("the 90", BLUE), ("the 10", ORANGE))):
        values = [risk[i] for risk in bars.values()]
        places = [place + 0.36 * (i - 0.5) for place in range(len(bars))]
        drawn = right.bar(places, values, 0.34, color=colour, label=name)
        right.bar_label(drawn, fmt="%.2f", fontsize=8)
        print(f"{name}: loss {values[0]:.3f} as usual, {values[1]:.3f} with debias")
    right.set(ylabel="loss", title="debias: two hidden groups")
    right.set_xticks(range(len(bars)), list(bars))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT, dpi=110)
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
