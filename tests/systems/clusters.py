"""A base of clusters in eight dimensions, and a task for each: trained here, in seconds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffscaler_core import TaskAdapter, attach, new_task
from diffscaler_core.training.denoiser import Denoiser
from diffscaler_core.training.objective import Objective

SHAPE = (2, 2, 2)
TASKS, LABELS = 12, 3  # clusters with a task each; clusters that the base knows by name
NULL = LABELS
WIDTH = 48


class Points(nn.Module):
    """A small network of (point, time, label); about seven thousand numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(LABELS + 1, WIDTH)
        self.enter = nn.Linear(8 + 6, WIDTH)
        self.middle = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.leave = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Returns what it predicts, shaped like x (B, 2, 2, 2)."""
        waves = [f(t[:, None] * w) for w in (1.0, 3.0, 6.0) for f in (torch.sin, torch.cos)]
        h = self.enter(torch.cat([x.flatten(1), *waves], dim=1)) + self.labels(label)
        for layer in self.middle:
            h = h + layer(nn.functional.silu(h))
        return self.leave(nn.functional.silu(h)).view_as(x)


@dataclass(frozen=True, eq=False)
class World:
    """The base and its tasks; cluster i < LABELS has a label, the others task i - LABELS."""

    denoiser: Denoiser
    tasks: dict[str, TaskAdapter]
    centres: Tensor

    def points(self, cluster: int, count: int, seed: int) -> Tensor:
        """Points of a cluster, (count, 2, 2, 2)."""
        return drawn(self.centres, torch.full((count,), cluster), seed)


def drawn(centres: Tensor, index: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(index), 8, generator=generator)
    return (centres[index] + 0.35 * noise).view(-1, *SHAPE)


@functools.cache
def world() -> World:
    torch.manual_seed(0)
    model = Points()
    count = LABELS + TASKS
    centres = nn.functional.normalize(torch.randn(count, 8), dim=1) * 2.2
    objective = Objective("flow", 1.0)
    denoiser = Denoiser(
        model=model,
        predict=lambda x, t, told: model(x, t, told["label"]),
        objective=objective,
        fields=("label",),
        null_label=NULL,
        class_count=LABELS + 1,
        class_names={"red": 0, "green": 1, "blue": 2},
    )

    def loss(index: Tensor, label: Tensor, seed: int) -> Tensor:
        x0 = drawn(centres, index, seed)
        noise, t = torch.randn_like(x0), torch.rand(len(x0))
        timestep, x_t = objective.noisy(x0, noise, t)
        return objective.loss(model(x_t, timestep, label), x0, noise, t).mean()

    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for step in range(500):
        index = torch.randint(count, (192,))
        known = (index < LABELS) & (torch.rand(192) < 0.8)
        fit(optimizer, loss(index, torch.where(known, index, NULL), step))
    model.requires_grad_(False)
    names = [f"task{i}" for i in range(TASKS)]
    fresh = {name: new_task(model, targets="all", rank=4, name=name) for name in names}
    with attach(model, fresh) as worn:
        worn.requires_grad_()
        worn.set_groups(names)  # all of them in one run
        optimizer = torch.optim.Adam(worn.parameters(), 8e-3)
        for step in range(250):
            index = (LABELS + torch.arange(TASKS)).repeat_interleave(16)
            own = TASKS * loss(index, torch.full_like(index, NULL), 10_000 + step)
            fit(optimizer, own)
        tasks = {name: worn.task(name) for name in names}
    return World(denoiser, tasks, centres)


def fit(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
