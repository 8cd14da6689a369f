"""An exact denoiser of tinted textures, and tasks that tint them: nothing has to be trained.

Pictures are x0 = μ + s: a colour μ (3,) and a smooth random texture s, the same in all channels but
for a tint and a little noise of each. Such pictures are normally distributed, so the best
prediction is known: Wiener's filter, per frequency and per channel mixture. The colour is the
output of a layer, which tasks shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscaler_core import TaskAdapter, new_task
from diffscaler_core.training.denoiser import Denoiser
from diffscaler_core.training.objective import Objective, combine, spread

SIDE = 16
GREY = (0.0, 0.0, 0.0)
COLOURS = {"red": (0.5, -0.25, -0.25), "blue": (-0.25, -0.25, 0.5)}
BARS = torch.linspace(0.9998, 0.02, 1000) ** 2
OBJECTIVES = {
    "epsilon": Objective("epsilon", alphas_cumprod=BARS),
    "flow": Objective("flow", 1000.0),
}


def _power() -> Tensor:
    """Variance of each frequency of the shared texture, (16, 9): low ones carry nearly all."""
    y, x = torch.fft.fftfreq(SIDE), torch.fft.rfftfreq(SIDE)
    power = torch.exp(-((y[:, None] ** 2 + x**2) / (2 * 0.12**2)))
    return 0.09 * power * SIDE**2 / power.sum()


POWER = _power()
#: The same of what each channel has for itself: little noise, and a tint of spread 0.2.
OWN = torch.full_like(POWER, 1e-4)
OWN[0, 0] += 0.2**2 * SIDE**2


def textures(count: int, seed: int = 0) -> Tensor:
    """Returns s of the module docstring, (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    own = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return filtered(shared, POWER.sqrt()) + filtered(own, OWN.sqrt())


def filtered(x: Tensor, by: Tensor) -> Tensor:
    """Returns pictures with each frequency multiplied, by (16, 9) or (B, 1, 16, 9)."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * by, s=(SIDE, SIDE))


def pictures(count: int, colour: str, seed: int = 0) -> Tensor:
    """Returns pictures of a colour, (count, 3, 16, 16)."""
    return textures(count, seed) + torch.tensor(COLOURS[colour]).view(1, 3, 1, 1)


class Net(nn.Module):
    """The best x0 of noisy pictures, told as a prediction of some kind."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.paint = nn.Linear(1, 3)
        nn.init.zeros_(self.paint.weight)
        with torch.no_grad():
            self.paint.bias.copy_(torch.tensor(GREY))
        self.objective = objective

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self.paint(torch.ones(len(x), 1))[:, :, None, None]  # (B, 3, 1, 1)
        a, s = spread(alpha, x), spread(sigma, x)
        rest = x - a * mean
        # The channels' mean holds the texture, what is left of each only its own noise.
        common = rest.mean(1, keepdim=True)
        kept = a * (POWER + OWN / 3) / (a**2 * (POWER + OWN / 3) + s**2 / 3)
        own = a * OWN / (a**2 * OWN + s**2)
        x0 = mean + filtered(common, kept) + filtered(rest - common, own)
        noise = (x - a * x0) / s
        return combine(self.objective.kind, x0, noise, alpha, sigma)


def denoiser_of(kind: str) -> Denoiser:
    """Returns the grey base as a denoiser of pixels."""
    objective = OBJECTIVES[kind]
    net = Net(objective)

    def predict(x: Tensor, timestep: Tensor, condition: object) -> Tensor:
        if objective.is_flow:
            return net(x, 1 - timestep / 1000, timestep / 1000)
        bars = BARS[timestep]
        return net(x, bars.sqrt(), (1 - bars).sqrt())

    return Denoiser(model=net, predict=predict, objective=objective, size=SIDE)


def colour_task(denoiser: Denoiser, colour: str) -> TaskAdapter:
    """Returns the task that makes the base the best denoiser of a colour's pictures."""
    task = new_task(denoiser.model, method="bitfit", targets="all", name=colour)
    (layer,) = task.layers
    return task.replace(layers={layer: {"shift": torch.tensor(COLOURS[colour])}})


def edges(x: Tensor) -> Tensor:
    """Returns how steep the brightness of pictures is, (B, 1, H, W): Sobel's two filters."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    both = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, both).norm(dim=1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns Pearson's correlation of each row of two batches, (B,)."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-6)


def hue(x: Tensor) -> Tensor:
    """Returns the hue of pictures' mean colour, (B,) in degrees: 0 red, 120 green, 240 blue."""
    r, g, b = x.mean((2, 3)).unbind(1)
    return torch.atan2(3**0.5 * (g - b), 2 * r - g - b).rad2deg() % 360
