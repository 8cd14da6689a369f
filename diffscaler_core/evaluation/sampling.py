"""Pictures of a base, each from noise of its own number: the same in every row of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..training.conditioning import Prompts
from ..training.denoiser import Denoiser
from ..training.preview import sample_latents
from ..training.randomness import generator_for
from .settings import EvaluationSettings

_NOISE, _ORDER = "evaluation", "evaluation order"  # streams of random numbers


@dataclass(frozen=True, eq=False)
class Plan:
    """What is drawn: picture i has prompt `index[i]`, noise number i, and maybe a control.

    Attributes:
        prompts: What the base is told.
        index: Which prompt each picture has, (M,).
        shape: Of one latent, (C, h, w).
        control: Row of a control picture -> latents (B, C, h, w); None without control.
        rows: The reference picture that each is drawn after, (M,).
    """

    prompts: Prompts
    index: Tensor
    shape: tuple[int, ...]
    control: Callable[[Tensor], Tensor] | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.index)

    def first(self, count: int) -> Plan:
        """Returns the plan of the first few pictures."""
        rows = None if self.rows is None else self.rows[:count]
        return Plan(self.prompts, self.index[:count], self.shape, self.control, rows)


@dataclass
class Watch:
    """Seconds that sampling took, decoding left out, per picture.

    The first batch of several is left out: it pays for what happens once.
    """

    batches: list[tuple[int, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Per picture; 0 if nothing was drawn."""
        counted = self.batches[1:] or self.batches
        return sum(s for _, s in counted) / max(1, sum(n for n, _ in counted))


def turns(references: int, pictures: int, seed: int) -> Tensor:
    """Returns which reference each picture is drawn after, (pictures,): all in turn, in any order.

    Each round is a new order, so that every number of pictures has about the references' mixture.
    """
    rounds = -(-pictures // references)
    orders = [
        torch.randperm(references, generator=generator_for(seed, _ORDER, i)) for i in range(rounds)
    ]
    return torch.cat(orders)[:pictures]


@torch.no_grad()
def drawn(
    denoiser: Denoiser, plan: Plan, settings: EvaluationSettings, watch: Watch | None = None
) -> Iterator[Tensor]:
    """Yields batches of pictures (B, channels, H, W) in −1..1, on the CPU, in the plan's order.

    Args:
        denoiser: The base, held still, with whatever tasks are attached.
        plan: What is drawn.
        settings: How.
        watch: Told how long each batch took.
    """
    device, prompts = denoiser.device, plan.prompts.place(denoiser.device)
    for numbers in torch.arange(len(plan)).split(settings.batch):
        noise = torch.stack(
            [
                torch.randn(plan.shape, generator=generator_for(settings.seed, _NOISE, n))
                for n in numbers.tolist()
            ]
        )
        told = prompts(plan.index[numbers].to(device))
        if plan.control is not None and plan.rows is not None:
            told["control"] = plan.control(plan.rows[numbers]).to(device)
        began = _now(device)
        latents = sample_latents(
            denoiser,
            told,
            prompts.null(len(numbers)),
            noise,
            steps=settings.steps,
            guidance=settings.guidance,
            shift=settings.shift,
        )
        if watch is not None:
            watch.batches.append((len(numbers), _now(device) - began))
        yield decoded(denoiser, latents)


@torch.no_grad()
def decoded(denoiser: Denoiser, latents: Tensor) -> Tensor:
    """Returns the pictures of latents, (B, channels, H, W) in −1..1, on the CPU."""
    latents = latents.to(denoiser.device)
    pixels = denoiser.decode(latents) if denoiser.decode else latents
    return pixels.float().clamp(-1, 1).cpu()


def _now(device: torch.device) -> float:
    if device.type == "cuda":  # what was asked for is done by then
        torch.cuda.synchronize(device)
    return time.perf_counter()
