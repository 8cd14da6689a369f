"""A toy base, two colours of pictures, a task for each and a router: seconds to make."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from diffscaler_core import TaskAdapter
from diffscaler_core.systems.router import Router
from diffscaler_core.systems.router_training import RouterSettings, train_router
from diffscaler_core.training import (
    Denoiser,
    Objective,
    TrainingConfig,
    TrainingData,
    train_task,
)

SIDE, WIDTH = 8, 24
PARTS = ("red", "blue")


class Block(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(SIDE * SIDE // 4, SIDE * SIDE // 4)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.narrow(torch.relu(self.wide(x)))


class Toy(nn.Module):
    """A flow model of 8 × 8 pixels in patches of 2 × 2."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=2)
        self.embed, self.time = nn.Linear(12, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(WIDTH, 12)
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        angles = t.float().unsqueeze(1) * torch.tensor([1.0, 2.0, 4.0, 8.0])
        h = self.embed(tokens) + self.time(torch.cos(angles)).unsqueeze(1)
        for block in self.blocks:
            h = block(h)
        grid = self.out(h).transpose(1, 2).unflatten(2, (SIDE // 2, SIDE // 2))
        return nn.functional.pixel_shuffle(grid, 2)


def toy_base() -> Denoiser:
    """Returns the toy, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Toy().eval().requires_grad_(False)
    return Denoiser(
        model=model, predict=lambda x, t, condition: model(x, t), objective=Objective("flow", 1.0)
    )


def pictures(part: str, count: int, seed: int) -> TrainingData:
    """Returns noisy squares of one colour."""
    generator = torch.Generator().manual_seed(seed + 100 * PARTS.index(part))
    colour = torch.tensor([0.8, -0.5, -0.8] if part == "red" else [-0.8, -0.5, 0.8])
    x0 = colour[:, None, None] + 0.2 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return TrainingData(x0[None], torch.zeros(count, dtype=torch.long), (part,))


def nothing(count: int) -> dict[str, Tensor]:
    """What a base without conditions is told."""
    return {}


@dataclass(frozen=True)
class Made:
    """What the tests share."""

    denoiser: Denoiser
    tasks: dict[str, TaskAdapter]
    router: Router
    fresh: dict[str, TrainingData]

    @property
    def toy(self) -> Toy:
        model = self.denoiser.model
        assert isinstance(model, Toy)
        return model


def make() -> Made:
    """Trains an expert on each colour, and a router on both."""
    denoiser = toy_base()
    seen = {part: pictures(part, 64, 1) for part in PARTS}
    tasks = {}
    for part, data in seen.items():
        config = TrainingConfig(
            name=part, steps=120, batch=32, rank=4, targets="all", lr=2e-2, lr_scale_shift=2e-2,
            warmup=5, validate_every=0, validation_share=0.0, sample_every=0, sample_steps=1,
            timesteps="uniform",
        )  # fmt: skip
        tasks[part] = train_task(denoiser, data, config)
    settings = RouterSettings(hidden=0, draws=16, steps=200)
    router = train_router(denoiser, seen, nothing, settings)
    return Made(denoiser, tasks, router, {part: pictures(part, 64, 2) for part in PARTS})
