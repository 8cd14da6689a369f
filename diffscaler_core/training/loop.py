"""The loop: a frozen base, one task's parameters, and nothing else that changes.

Knows no host: the base is a `Denoiser` (diffusers pipelines become one by themselves).
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Attachment, attach
from ..errors import DiffScalerError
from ..task import TaskAdapter, new_task
from ..version import __version__
from .conditioning import Prompts, prompts_for
from .config import TrainingConfig
from .data import TrainingData
from .denoiser import Denoiser
from .diffusers_bases import as_denoiser
from .frozen import frozen
from .objective import draw_times
from .optimizer import Ema, make_optimizer, rate_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run is, given to `on_step` after each step.

    Attributes:
        step: Steps done, from 1.
        steps: Steps in all.
        loss: This step's loss.
        mean_loss: Running mean over about 50 steps.
    """

    step: int
    steps: int
    loss: float
    mean_loss: float


#: Called after each step; returning True ends the run there, with the state so far.
OnStep = Callable[[Progress], bool | None]


class DivergedError(DiffScalerError):
    """The loss became NaN or Inf.

    Attributes:
        task: The task as it was after the last step with a finite loss.
    """

    def __init__(self, message: str, task: TaskAdapter) -> None:
        super().__init__(message)
        self.task = task


def train_task(
    base: Any,
    data: TrainingData,
    config: TrainingConfig | None = None,
    *,
    prompts: Prompts | None = None,
    words: TaskAdapter | None = None,
    task: TaskAdapter | None = None,
    on_step: OnStep | None = None,
    accelerator: Any = None,
) -> TaskAdapter:
    """Returns a task trained on pictures; the base is bit for bit what it was.

    Ctrl-C (KeyboardInterrupt) and an `on_step` that returns True end the run early; the task then
    is the state so far, and `info["training"]["steps_done"]` says how far.

    Args:
        base: A diffusers pipeline, or a `Denoiser`. It runs where it is, in its own dtype.
        data: From `encode_folder` or `encode_pictures`.
        config: The run's settings.
        prompts: What the base is told; default: `prompts_for(…, config.prompts, words=words)`.
        words: Stored prompts to look names up in.
        task: A task to go on from (it stays as it is); default: a new one, which changes nothing.
        on_step: Called with a `Progress` after each step.
        accelerator: An `accelerate.Accelerator` of a distributed launch: every process trains on
            its share of each batch, and gradients are averaged.

    Raises:
        DivergedError: The loss became NaN or Inf; `.task` is the last good state.
        DiffScalerError: Prompts that cannot be had, a task that does not fit, …
    """
    config = config or TrainingConfig()
    denoiser = as_denoiser(base)
    if prompts is None:
        prompts = prompts_for(
            denoiser,
            data.prompts,
            config.prompts,
            words=words,
            noise=config.prompt_noise,
            seed=config.seed,
        )
    if prompts.names != data.prompts:
        raise DiffScalerError(f"prompts {prompts.names} are not the data's {data.prompts}")
    task = _copy(task) if task is not None else _fresh(denoiser, config)
    with (
        frozen(denoiser.model, config.checkpointing),
        attach(denoiser.model, task, component=denoiser.component) as attachment,
    ):
        run = _Run(denoiser, data, prompts, attachment, config, accelerator)
        return run.train(on_step)


class _Run:
    """One run's state: parameters, optimiser, random source, step."""

    def __init__(
        self,
        denoiser: Denoiser,
        data: TrainingData,
        prompts: Prompts,
        attachment: Attachment,
        config: TrainingConfig,
        accelerator: Any = None,
    ) -> None:
        self.denoiser, self.data, self.config = denoiser, data, config
        self.accelerator = accelerator
        self.device = denoiser.device
        self.attachment = attachment.to(self.device).requires_grad_(True)
        self.prompts = prompts.to(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)  # on the CPU for every device
        self.optimizer = make_optimizer(attachment, prompts, config)
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = Ema(self.params, config.ema) if config.ema else None
        self.step, self.loss, self.mean_loss, self.seconds = 0, math.nan, math.nan, 0.0

    def train(self, on_step: OnStep | None) -> TaskAdapter:
        """Runs to the end, or to an early one; returns the task as it is then."""
        start = time.perf_counter()
        try:
            while self.step < self.config.steps:
                self.advance()
                now = Progress(self.step, self.config.steps, self.loss, self.mean_loss)
                if on_step is not None and on_step(now):
                    break
        except KeyboardInterrupt:
            logger.warning("interrupted after %d of %d steps", self.step, self.config.steps)
        self.seconds = time.perf_counter() - start
        return self.task()

    def advance(self) -> None:
        """Does one optimiser step.

        Raises:
            DivergedError: Loss or gradient is not finite; the parameters are left as they were.
        """
        loss = self.batch_loss()
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)
            for param in self.params:
                if param.grad is not None:
                    param.grad = self.accelerator.reduce(param.grad, "mean")
        norm = nn.utils.clip_grad_norm_(self.params, self.config.clip or math.inf)
        self.loss = float(loss.detach())
        if not math.isfinite(self.loss) or not math.isfinite(float(norm)):
            raise DivergedError(self._diverged(), self.task())
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate_at(self.step, self.config)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.params, self.step)
        share = max(1 / self.step, 1 / 50)
        before = 0.0 if self.step == 1 else self.mean_loss
        self.mean_loss = before + share * (self.loss - before)

    def batch_loss(self) -> Tensor:
        """Draws one batch and returns its mean loss."""
        config, generator = self.config, self.generator
        objective = self.denoiser.objective
        usual = "logit_normal" if objective.is_flow else "uniform"
        x0, index = self.data.batch(config.batch, generator)
        t = draw_times(
            config.batch,
            usual if config.timesteps == "auto" else config.timesteps,
            mean=config.timestep_mean,
            std=config.timestep_std,
            shift=config.timestep_shift,
            uniform_share=config.timestep_uniform,
            generator=generator,
        )
        noise = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(config.batch, generator=generator) < config.drop
        drawn = [self._own(tensor) for tensor in (x0, index, t, noise, dropped)]
        x0, index, t, noise, dropped = drawn
        timestep, x_t = objective.noisy(x0, noise, t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = self.denoiser.predict(x_t, timestep, self.prompts(index, dropped))
        return objective.loss(output, x0, noise, t, config.weighting).mean()

    def task(self) -> TaskAdapter:
        """Returns the task as it is now, with its facts and learned prompts."""
        swap = self.ema.swapped(self.params) if self.ema is not None else contextlib.nullcontext()
        with swap:
            task = self.attachment.task()
            conditioning = self.prompts.stored() if self.prompts.learned else {}
        names = list(self.prompts.names) if self.prompts.learned else list(task.prompts)
        conditioning = conditioning or dict(task.conditioning)
        facts: dict[str, Any] = {"training": self._facts(), "prompts": names}
        if "label" in self.prompts.fields:
            labels = torch.as_tensor(self.prompts.label).tolist()
            facts["classes"] = dict(zip(self.prompts.names, labels, strict=True))
        return task.replace(conditioning=conditioning).with_info(**facts)

    def _own(self, drawn: Tensor) -> Tensor:
        """Returns this process's share of what was drawn for all, on the device."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            drawn = drawn[self.accelerator.process_index :: self.accelerator.num_processes]
        return drawn.to(self.device)

    def _facts(self) -> dict[str, Any]:
        """Returns settings that differ from the defaults, a few always, and what came of them."""
        settings, default = asdict(self.config), asdict(TrainingConfig())
        elsewhere = ("name", "method", "rank")  # the task says these itself
        always = ("steps", "batch", "lr", "lr_scale_shift", "seed")
        kept = {
            key: value
            for key, value in settings.items()
            if key in always or (key not in elsewhere and value != default[key])
        }
        return {
            **kept,
            "steps_done": self.step,
            "images": len(self.data),
            "objective": self.denoiser.objective.kind,
            "loss": None if math.isnan(self.mean_loss) else round(self.mean_loss, 5),
            "seconds": round(self.seconds, 1),
            "versions": versions(),
        }

    def _diverged(self) -> str:
        return (
            f"the loss became {self.loss} at step {self.step + 1} of {self.config.steps}, so "
            f"training stopped with the state before it; lower the learning rates "
            f"(lr {self.config.lr:g}, lr_scale_shift {self.config.lr_scale_shift:g}), or load the "
            f"base in float32 or bfloat16"
        )


def versions() -> dict[str, str]:
    """Returns the versions of the libraries a run depends on."""
    found = {"diffscaler": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _fresh(denoiser: Denoiser, config: TrainingConfig) -> TaskAdapter:
    return new_task(
        denoiser.model,
        config.method,
        config.rank,
        config.targets,
        config.name,
        exclude=config.exclude,
        component=denoiser.component,
        seed=config.seed,
    )


def _copy(task: TaskAdapter) -> TaskAdapter:
    """Returns the task on float32 tensors of its own; attaching alone would share them."""
    layers = {
        name: {part: t.detach().to(torch.float32, copy=True) for part, t in tensors.items()}
        for name, tensors in task.layers.items()
    }
    return task.replace(layers=layers)
