"""A small denoiser that is told the time, and a task that asks for other things at other times."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscaler_core import TaskAdapter, new_task
from diffscaler_core.training.denoiser import Denoiser
from diffscaler_core.training.objective import Objective
from diffscaler_core.windows import TaskWindows, WindowPlan

WIDTH, COLOURS = 48, 12
BARS = torch.linspace(0.9999, 0.02, 1000) ** 2
OBJECTIVES = {
    "epsilon": Objective("epsilon", alphas_cumprod=BARS),
    "flow": Objective("flow", 1000.0),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_in, self.to_out = nn.Linear(COLOURS, WIDTH), nn.Linear(WIDTH, COLOURS)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.to_out(F.gelu(self.to_in(x) + told))


class Net(nn.Module):
    """Colours (B, 12, 1, 1) and the time to colours."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, WIDTH)
        self.transformer_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        waves = timestep.float()[:, None] / 1000 * torch.arange(1, 5) * torch.pi
        told = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        x = x.flatten(1)
        for block in self.transformer_blocks:
            x = x + block(x, told)
        return x[:, :, None, None]


def colours(count: int, seed: int) -> Tensor:
    """Returns pictures: colours of three kinds, (count, 12, 1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    kinds = 2 * torch.randn(3, COLOURS, generator=torch.Generator().manual_seed(9))
    which = torch.randint(3, (count,), generator=generator)
    own = 0.05 * torch.randn(count, COLOURS, generator=generator)
    return (kinds[which] + own)[:, :, None, None]


def inverted(x0: Tensor, t: Tensor) -> Tensor:
    """Returns what the task asks for: the picture, and its negative where t >= 0.5."""
    return torch.where((t >= 0.5).view(-1, 1, 1, 1), -x0, x0)


@functools.cache
def _trained(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Net()
    fit(_denoiser(net, kind), list(net.parameters()), 400, lambda x0, t: x0, 3e-3)
    return net.state_dict()


def base(kind: str = "flow") -> Denoiser:
    """Returns a base that predicts x0, trained on plain pictures."""
    net = Net()
    net.load_state_dict(_trained(kind))
    net.requires_grad_(False)
    return _denoiser(net, kind)


def _denoiser(net: Net, kind: str) -> Denoiser:
    return Denoiser(net, lambda x, timestep, told: net(x, timestep), OBJECTIVES[kind])


def fit(denoiser, parameters, steps, target, rate, batch=128) -> None:
    adam = torch.optim.Adam(parameters, rate)
    for step in range(steps):
        loss = loss_of(denoiser, target, batch, seed=step + 1)
        adam.zero_grad()
        loss.mean().backward()
        for group in adam.param_groups:
            group["lr"] = rate * (1 - step / steps)
        adam.step()


def loss_of(denoiser, target, batch: int, seed: int) -> Tensor:
    """Returns the error at times drawn evenly, (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    x0 = colours(batch, seed)
    noise = torch.randn(x0.shape, generator=generator)
    t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timestep, x_t = denoiser.objective.noisy(x0, noise, t)
    return (denoiser(x_t, timestep, {}) - target(x0, t)).pow(2).flatten(1).mean(1)


def trained(kind: str, plan: WindowPlan | None, rank: int = 4, change=None, steps: int = 300):
    """Returns (validation loss, the task) of the inverting task.

    Args:
        kind: The base's.
        plan: Its windows.
        rank: Its rank.
        change: (TaskAdapter) -> what is trained in its place.
        steps: Of training.
    """
    denoiser = base(kind)
    task = new_task(denoiser.model, "lora", rank, name="inverted", activation="relu", windows=plan)
    task = task if change is None else change(task)
    with denoiser.attached({"inverted": task}) as worn:
        worn.requires_grad_(True)
        fit(denoiser, list(worn.parameters_of("inverted").values()), steps, inverted, 1e-2)
        with torch.no_grad():
            return float(loss_of(denoiser, inverted, 4096, seed=10**6).mean()), worn.task()


def one_window(task: TaskAdapter) -> TaskAdapter:
    """Returns the task with the first range's window in every range: the mechanism off."""
    windows = task.windows
    assert windows is not None
    last = len(windows.edges) + 1
    runs = {
        layer: tuple((0, last, n) if first == 0 else (0, 0, n) for first, _, n in own)
        for layer, own in windows.runs.items()
    }
    return task.with_info(windows=TaskWindows(windows.edges, runs, windows.plan).facts)
