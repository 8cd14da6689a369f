"""A picture drawn anew under another task, in its own noise. Pure functions; knows no host.

CycleDiffusion with the DPM-Encoder (arXiv:2210.05559): a stochastic sampler is a function from
noise to pictures. For a picture, find the noise that leads one task to it, and give that noise to
another task: what the noise fixes (what stands where) stays, what the task fixes changes. The paper
observes that separately trained models share this space roughly; tasks share one frozen base.

The paper writes it for diffusion; the same line in (α, σ) for flows is ours. With (x0^, ε^) from
`objective.separate`, a step from (α, σ) to the less noisy (α', σ') is

    x' = α'·x0^ + √(σ'² − c²)·ε^ + c·z,    c = η·σ'·√(1 − SNR/SNR'),    SNR = α²/σ²,

where z is fresh standard normal noise. c at η = 1 is the standard deviation of q(x' | x, x0) on any
path α·x0 + σ·ε; for α² + σ² = 1 it is DDIM's (arXiv:2010.02502, Eq. 16). It does not change when
samples are scaled, so both hosts use it as it stands. c ≤ σ', as η ≤ 1.

What the paper keeps of a step is z; we keep c·z, so nothing is ever divided by c, and the last
step, where c = 0, keeps what is left over.

Shapes: B batch; latents (B, C, …).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..task import TaskAdapter
from ..training.denoiser import Condition, Denoiser
from ..training.objective import Objective
from ..training.preview import predicted, sampling_times
from ..training.randomness import generator_for

#: (α, σ) of all rows.
Level = tuple[float, float]
#: (x (B, C, …), number of the step) -> (x0, ε), each like x.
Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]
#: () -> standard normal noise shaped like the latents.
Draw = Callable[[], Tensor]
Tasks = TaskAdapter | Mapping[str, TaskAdapter] | None

CLEAN: Level = (1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Code:
    """Pictures as one task's noise, for as many steps as there are levels but one.

    Attributes:
        start: Where sampling starts, (B, C, …).
        added: What each step adds to the sampler's mean, c·z; of the last, what is left over.
        path: What the pictures are at each level, the first and the last included.
    """

    start: Tensor
    added: tuple[Tensor, ...]
    path: tuple[Tensor, ...]


def spread_of(before: Level, after: Level, eta: float) -> float:
    """Returns c of the module docstring: how much of a step is fresh noise.

    Args:
        before: (α, σ) now.
        after: (α', σ') after the step, not noisier.
        eta: η in 0..1: 0 is the deterministic sampler, 1 draws from the posterior.
    """
    (alpha, sigma), (alpha_after, sigma_after) = before, after
    share = (alpha * sigma_after / (alpha_after * sigma)) ** 2
    return eta * sigma_after * math.sqrt(max(0.0, 1 - share))


def moved(x0: Tensor, noise: Tensor, after: Level, c: float) -> Tensor:
    """Returns the mean of a step: α'·x0 + √(σ'² − c²)·ε. See the module docstring."""
    alpha, sigma = after
    return alpha * x0 + math.sqrt(max(0.0, sigma**2 - c**2)) * noise


def encode(
    predict: Predict, latents: Tensor, levels: Sequence[Level], eta: float, draw: Draw
) -> Code:
    """Returns the noise that leads a task to these pictures. DPM-Encoder, arXiv:2210.05559.

    A path from noise to the pictures is drawn from q, step by step; what of each step the task
    does not predict is its noise.

    Args:
        predict: The task's prediction.
        latents: Clean latents, (B, C, …).
        levels: From the noisiest to `CLEAN`.
        eta: η; see `spread_of`.
        draw: Random source.
    """
    alpha, sigma = levels[0]
    x = alpha * latents + sigma * draw()
    path, added = [x], []
    for i, (before, after) in enumerate(itertools.pairwise(levels)):
        c = spread_of(before, after, eta)
        mean = moved(*predict(x, i), after, c)
        aim = moved(latents, (x - before[0] * latents) / before[1], after, c)
        aim = aim + c * draw() if c else aim
        added.append(aim - mean)
        x = mean + added[-1]  # not `aim`: decoding will see these very bits
        path.append(x)
    return Code(path[0], tuple(added), (*path[:-1], latents))


def decode(
    predict: Predict,
    code: Code,
    levels: Sequence[Level],
    eta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns what a task makes of a code, shaped like `Code.start`.

    Under the task that it was encoded with these are the pictures themselves.

    Args:
        predict: The task's prediction.
        code: From `encode`.
        levels: As there.
        eta: As there.
        mask: Where pictures may change, to be broadcast against (B, C, …), 0..1; None: everywhere.
    """
    x = code.start
    for i, (before, after) in enumerate(itertools.pairwise(levels)):
        x = moved(*predict(x, i), after, spread_of(before, after, eta)) + code.added[i]
        if mask is not None:
            x = mask * x + (1 - mask) * code.path[i + 1]
    return x


def levels_of(objective: Objective, times: Tensor) -> list[Level]:
    """Returns the levels at falling times in 0..1; the last is `CLEAN`."""
    _, alphas, sigmas = objective.at(times[:-1])
    return [*zip(alphas.tolist(), sigmas.tolist(), strict=True), CLEAN]


@torch.no_grad()
def translate(
    denoiser: Denoiser,
    latents: Tensor,
    source: Tasks = None,
    target: Tasks = None,
    *,
    source_prompt: Condition | None = None,
    target_prompt: Condition | None = None,
    null: Condition | None = None,
    steps: int = 30,
    eta: float = 1.0,
    strength: float = 0.8,
    guidance: float = 1.0,
    seed: int = 0,
    shift: float = 3.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns pictures of one task as another task's, as latents (B, C, h, w).

    Args:
        denoiser: The base, as `as_denoiser(pipe)` gives it.
        latents: Of the pictures, from `denoiser.encode`.
        source: The task, or tasks by name, that the pictures are of; None: the base's own.
        target: What they are to become.
        source_prompt: What they show, one row each.
        target_prompt: What they are to show; None: the same.
        null: The null prompt, one row each, for guidance.
        steps: Predictions to encode, and as many to decode.
        eta: How much of a step is noise, 0..1. What is not noise, the target's own prediction
            carries on: less of the picture stays.
        strength: The time that encoding goes back to, 0..1: 1 is pure noise; less keeps more.
        guidance: Classifier-free guidance of the target; the source's is 1 (as in the paper's
            code). With another guidance than 1 the source task does not give the picture back.
        seed: Of the noise.
        shift: Of a flow's times; see `sample_latents`.
        mask: Where pictures may change, to be broadcast against the latents, 0..1.

    Raises:
        DiffScalerError: A number lies outside its range.
    """
    check(steps, eta, strength)
    told = source_prompt or {}
    new, nothing = told if target_prompt is None else target_prompt, null or {}
    x0 = latents.to(denoiser.device, torch.float32)
    random = generator_for(seed, "translate")
    times = sampling_times(denoiser.objective, steps, shift, x0.device, strength)
    levels = levels_of(denoiser.objective, times)

    def draw() -> Tensor:
        return torch.randn(x0.shape, generator=random).to(x0)

    with denoiser.held():
        with _wearing(denoiser, source):
            code = encode(
                lambda x, i: predicted(denoiser, x, times[i], told, nothing),
                x0, levels, eta, draw,
            )  # fmt: skip
        with _wearing(denoiser, target):
            return decode(
                lambda x, i: predicted(denoiser, x, times[i], new, nothing, guidance),
                code, levels, eta, None if mask is None else mask.to(x0),
            )  # fmt: skip


def check(steps: int, eta: float, strength: float) -> None:
    """Refuses settings that no translation has.

    Raises:
        DiffScalerError: A number lies outside its range.
    """
    if steps < 1 or not 0 <= eta <= 1 or not 0 < strength <= 1:
        raise DiffScalerError(
            f"a translation takes 1 step or more, eta in 0..1 and strength above 0 up to 1; got "
            f"steps {steps}, eta {eta:g}, strength {strength:g}"
        )


def _wearing(denoiser: Denoiser, tasks: Tasks) -> ExitStack:
    """Returns a context in which the base runs these tasks, if any."""
    stack = ExitStack()
    if tasks is not None:
        named = {tasks.name: tasks} if isinstance(tasks, TaskAdapter) else dict(tasks)
        if named:
            stack.enter_context(denoiser.attached(named))
    return stack
