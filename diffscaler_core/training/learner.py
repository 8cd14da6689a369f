"""One task in a run: its parameters, what it is shown, how it moves, what it remembers.

A run holds one learner per task; learners share the frozen base and nothing else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..auto_rank import RankChoice
from ..errors import DiffScalerError, first_names
from ..task import TaskAdapter
from .checkpoints import optimizer_state, restore_optimizer
from .conditioning import Prompts
from .config import TrainingConfig
from .data.batches import Batch, Batches, TrainingData
from .debias import GroupTable, group_risk
from .denoiser import Trainable
from .objective import Objective, draw_times
from .optimizer import BESIDE, Ema, make_optimizers, rate_at
from .progress import History
from .randomness import generator_for

if TYPE_CHECKING:
    from .aligner import Aligner

#: Streams of random numbers (see `generator_for`); the data has streams of its own.
_DRAWS, _PRIOR = 101, 102


@dataclass(frozen=True, eq=False)
class TaskRun:
    """One task to train, in a run of one or several.

    Attributes:
        name: The task's name.
        data: Its pictures.
        prompts: What the base is told about them; None: `prompts_for(…, config.prompts)`.
        words: Stored prompts to look names up in.
        task: A task to go on from (it stays as it is); None: a new one, which changes nothing.
        validation: Pictures that are never trained on; None: `config.validation_share` of `data`.
        prior: Pictures that the task must not forget (prior preservation, arXiv:2208.12242, Eq. 2).
        prior_prompts: What the base is told about those; None: as for `prompts`, never learned.
        seed: Of all that is random for this task; None: the config's.
        control: What its control pictures show, "" if it takes none; None: as the task to go on
            from, else as the config says.
        ranks: Of a new task, from `choose_ranks`; None: as the config says.
        biased: With `config.debias`: the task whose losses tell the pictures' groups; None: `task`,
            or the bare base.
        groups: With `config.debias`: the groups themselves, from `infer_groups`; None: inferred.
    """

    name: str
    data: Batches
    prompts: Prompts | None = None
    words: TaskAdapter | None = None
    task: TaskAdapter | None = None
    validation: Batches | None = None
    prior: Batches | None = None
    prior_prompts: Prompts | None = None
    seed: int | None = None
    control: str | None = None
    ranks: RankChoice | None = None
    biased: TaskAdapter | None = None
    groups: GroupTable | None = None


def control_kind(start: TaskAdapter | None, said: str | None) -> str:
    """Returns what a task's control pictures show, "" if it takes none.

    Args:
        start: The task to go on from, or None.
        said: What the run says they show; "": that there are none; None: nothing.

    Raises:
        DiffScalerError: It goes on from a task that is of the other kind.
    """
    if start is None:
        return said or ""
    own = str((start.info.get("control") or {}).get("kind") or "control")
    own = own if start.is_control else ""
    if said is not None and bool(said) != bool(own):
        raise DiffScalerError(
            f"task {start.name!r}, to go on from, takes "
            f"{f'control pictures ({own})' if own else 'no control pictures'}, but this run is to "
            f"train {f'control {said!r}' if said else 'without control'}; start a new task, or go "
            f"on from one of its kind"
        )
    return own


@dataclass(frozen=True)
class Drawn:
    """All that one step shows to one task, for the whole batch, on the CPU.

    Attributes:
        x0: Clean samples, (B, C, h, w).
        index: Which prompt each has, (B,).
        t: Times in 0..1, (B,).
        noise: Like x0.
        dropped: Which prompts are left out, (B,) of bool.
        prior: Which rows are prior pictures, (B,) of bool.
        perturbation: Noise on the prompts' embeddings, by field.
        told: The prompts themselves, by field, where they come with the pictures (a stream).
        control: Latents of the control pictures, like x0; None: the task takes none.
        kept: Factor on each row's control, (B,): 0 where it is left out.
        features: What an encoder sees in the clean pictures, (B, M, Z); None: nobody asked.
        groups: How far each row belongs to each hidden group, (B, G); None: nobody asked.
    """

    x0: Tensor
    index: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor
    prior: Tensor
    perturbation: Mapping[str, Tensor]
    told: Mapping[str, Tensor] | None = None
    control: Tensor | None = None
    kept: Tensor | None = None
    features: Tensor | None = None
    groups: Tensor | None = None

    def rows(self, part: slice, device: torch.device) -> Drawn:
        """Returns some rows of it, on a device."""

        def own(tensor: Tensor) -> Tensor:
            return tensor[part].to(device, non_blocking=True)

        return Drawn(
            x0=own(self.x0),
            index=own(self.index),
            t=own(self.t),
            noise=own(self.noise),
            dropped=own(self.dropped),
            prior=own(self.prior),
            perturbation={name: own(noise) for name, noise in self.perturbation.items()},
            told=None if self.told is None else {n: own(rows) for n, rows in self.told.items()},
            control=None if self.control is None else own(self.control),
            kept=None if self.kept is None else own(self.kept),
            features=None if self.features is None else own(self.features),
            groups=None if self.groups is None else own(self.groups),
        )


class Learner:
    """One task's state in a run.

    Args:
        run: What to train on.
        trainable: The tasks on the base.
        prompts: The run's prompts, ready.
        prior_prompts: The prior pictures', if there are any.
        config: The run's settings, as they are for this task.
        objective: What the base predicts.
        device: Where the base computes.
    """

    def __init__(
        self,
        run: TaskRun,
        trainable: Trainable,
        prompts: Prompts,
        prior_prompts: Prompts | None,
        config: TrainingConfig,
        objective: Objective,
        device: torch.device,
    ) -> None:
        self.run, self.name, self.config, self.objective = run, run.name, config, objective
        self.trainable = trainable
        self.seed = config.seed if run.seed is None else run.seed
        self.prompts = prompts.place(device)
        self.prior_prompts = None if prior_prompts is None else prior_prompts.place(device)
        learned = {
            f"prompts.{name}": parameter
            for name, parameter in prompts.named_parameters()
            if parameter.requires_grad
        }
        named = {**trainable.parameters_of(run.name), **learned}
        if not named:
            raise DiffScalerError(f"task {run.name!r} has nothing to train: no layer, no prompt")
        self._train(named)
        self.history = History()
        self.aligner: Aligner | None = None

    def _train(self, named: dict[str, nn.Parameter]) -> None:
        self.named = named
        self.params = list(named.values())
        self.optimizers = make_optimizers(named, self.config)
        self.ema = Ema(self.params, self.config.ema) if self.config.ema else None

    def align(self, aligner: Aligner) -> None:
        """Trains a projector beside the task (see `alignment.py`); before the first step."""
        self.aligner = aligner
        self._train({**self.named, **{f"{BESIDE}{n}": p for n, p in aligner.named.items()}})

    @cached_property
    def examples(self) -> Batch:
        """Up to eight pictures whose controls are shown on the way, always the same ones."""
        validation = self.run.validation
        data = self.run.data if validation is None or not len(validation) else validation
        if isinstance(data, TrainingData):
            return data.batch(min(8, len(data)), self.seed, 0)
        return next(iter(data.whole(8)))  # a batch would set a stream back to its start

    def draw(self, step: int) -> Drawn:
        """Returns what step number `step` (from 0) shows: a function of seed and step alone."""
        config, prior = self.config, self.run.prior
        generator = generator_for(self.seed, _DRAWS, step)
        count = 0 if prior is None else round(config.batch * config.prior_share)
        batch = self.run.data.batch(config.batch - count, self.seed, step)
        x0, index, control = batch.x0, batch.index, batch.control
        if control is None and config.control:
            raise DiffScalerError(
                f"task {self.name!r} is to learn from control pictures ({config.control}), but its "
                f"pictures have none: encode them with control or control_from"
            )
        if control is not None and not config.control:
            raise DiffScalerError(
                f"the pictures of task {self.name!r} come with control pictures, but it takes "
                f"none: say what they show (control), or encode the pictures without them"
            )
        if prior is not None and count:
            x0, index = self._with_prior(batch, prior.batch(count, self.seed + _PRIOR, step))
        # a control settles the layout: it matters at middle times, whatever the objective
        usual = "logit_normal" if self.objective.is_flow or config.control else "uniform"
        t = draw_times(
            len(x0),
            usual if config.timesteps == "auto" else config.timesteps,
            mean=config.timestep_mean,
            std=config.timestep_std,
            shift=config.timestep_shift,
            uniform_share=config.timestep_uniform,
            generator=generator,
        )
        noise = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(len(x0), generator=generator) < config.drop
        perturbation = self.prompts.draw_noise(
            len(x0), config.perturb, config.perturb_gamma, generator
        )
        is_prior = torch.arange(len(x0)) >= len(x0) - count
        drawn = Drawn(x0, index, t, noise, dropped, is_prior, perturbation, batch.condition)
        if config.debias and self.run.groups is not None and batch.pictures is not None:
            drawn = replace(drawn, groups=self.run.groups.weights[batch.pictures])
        if control is None:
            return drawn
        kept = (torch.rand(len(x0), generator=generator) >= config.control_drop) & ~is_prior
        control = torch.cat([control, control.new_zeros(count, *control.shape[1:])])
        return replace(drawn, control=control, kept=kept.float())

    def condition(self, drawn: Drawn) -> dict[str, Tensor]:
        """Returns what the base is told about drawn rows, and their control."""
        told = self._told(drawn)
        if drawn.control is not None and drawn.kept is not None:
            told |= {"control": drawn.control, "control_kept": drawn.kept}
        return told

    def _told(self, drawn: Drawn) -> dict[str, Tensor]:
        noise = drawn.perturbation or None
        if drawn.told is not None:
            return self.prompts.mixed(drawn.told, drawn.dropped, noise)
        told = self.prompts(torch.where(drawn.prior, 0, drawn.index), drawn.dropped, noise)
        if self.prior_prompts is None:
            return told  # type: ignore[no-any-return]
        others = self.prior_prompts(torch.where(drawn.prior, drawn.index, 0), drawn.dropped)
        return {
            name: torch.where(
                drawn.prior.view(-1, *(1,) * (rows.ndim - 1)), others[name].to(rows.dtype), rows
            )
            for name, rows in told.items()
        }

    def losses(self, output: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Returns (weighted, plain) losses per row, (B,); prior rows weigh `prior_weight`."""
        plain = self.objective.loss(output, drawn.x0, drawn.noise, drawn.t)
        return plain * self._weights(drawn), plain.detach()

    def risk(self, weighted: Tensor, drawn: Drawn) -> Tensor:
        """Returns rows' weighted losses (B,) as the one number to lower: their mean, as a rule."""
        if drawn.groups is None:
            return weighted.mean()
        return group_risk(weighted, drawn.groups, self.config.debias)

    def clip(self) -> Tensor:
        """Cuts this task's gradient to the config's norm, by itself; returns what it was."""
        norm: Tensor = nn.utils.clip_grad_norm_(self.params, self.config.clip or math.inf)
        return norm

    @property
    def rate(self) -> float:
        """The learning rate of the first group of parameters, now."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def set_rates(self, step: int) -> None:
        """Sets the learning rates of step number `step`."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate_at(step, self.config)

    def clear(self) -> None:
        """Drops the gradients."""
        for parameter in self.params:
            parameter.grad = None

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a context in which the parameters are what would be saved: their running mean."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped(self.params)

    def snapshot(self) -> list[Tensor]:
        """Returns copies of the parameters (of their mean, if that is what is saved)."""
        source = self.params if self.ema is None else self.ema.mean
        return [tensor.detach().clone() for tensor in source]

    @torch.no_grad()
    def go_back(self, snapshot: list[Tensor]) -> None:
        """Puts a snapshot back, as all that is left of a run that went wrong."""
        for parameter, kept in zip(self.params, snapshot, strict=True):
            parameter.copy_(kept)
        self.ema = None

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors of this task's state, for a checkpoint."""
        found: dict[str, Tensor] = {f"parameters/{name}": p for name, p in self.named.items()}
        if self.ema is not None:
            mean = zip(self.named, self.ema.mean, strict=True)
            found |= {f"ema/{name}": tensor for name, tensor in mean}
        for i, optimizer in enumerate(self.optimizers):
            own, _ = optimizer_state(optimizer)
            found |= {f"optimizer/{i}/{name}": tensor for name, tensor in own.items()}
        losses = torch.tensor(self.history.losses, dtype=torch.float64).view(-1, 2)
        return {f"{self.name}/{name}": tensor for name, tensor in found.items()} | {
            f"{self.name}/losses": losses
        }

    def facts(self) -> dict[str, Any]:
        """Returns the rest of this task's state as JSON can hold it."""
        history = {**self.history.state(), "losses": []}
        return {
            "history": history,
            "optimizers": [optimizer_state(optimizer)[1] for optimizer in self.optimizers],
            "images": len(self.run.data),
            "prompts": list(self.prompts.names),
            "ranks": None if self.run.ranks is None else self.run.ranks.state(),
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Puts a checkpoint's state back.

        Raises:
            DiffScalerError: It is of other layers, shapes or prompts.
        """
        prefix = f"{self.name}/"
        own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        saved = {n[len("parameters/") :]: t for n, t in own.items() if n.startswith("parameters/")}
        other = [n for n, p in self.named.items() if n not in saved or saved[n].shape != p.shape]
        other += [name for name in saved if name not in self.named]
        if other:
            raise DiffScalerError(
                f"the checkpoint holds other parameters than this run trains: {first_names(other)}"
            )
        for name, parameter in self.named.items():
            parameter.copy_(saved[name])
        if self.ema is not None:
            for (name, parameter), mean in zip(self.named.items(), self.ema.mean, strict=True):
                mean.copy_(own.get(f"ema/{name}", parameter))
        for i, optimizer in enumerate(self.optimizers):
            start = f"optimizer/{i}/"
            state = {n[len(start) :]: t for n, t in own.items() if n.startswith(start)}
            restore_optimizer(optimizer, state, facts["optimizers"][i])
        losses = [(int(s), float(v)) for s, v in own["losses"].tolist()]
        self.history = History.of({**facts["history"], "losses": losses})

    def _weights(self, drawn: Drawn) -> Tensor:
        adapted = self._weights_of(drawn.t, retain=False)
        if self.run.prior is None:
            return adapted
        retained = self._weights_of(drawn.t, retain=True)
        return torch.where(drawn.prior, self.config.prior_weight * retained, adapted)

    def _weights_of(self, t: Tensor, retain: bool) -> Tensor:
        config = self.config
        return self.objective.weights(
            t, config.weighting, gamma=config.snr_gamma, tau=config.chain_tau, retain=retain
        )

    def _with_prior(self, batch: Batch, prior: Batch) -> tuple[Tensor, Tensor]:
        if batch.condition is not None:
            raise DiffScalerError("prior pictures need training pictures from a folder, no stream")
        if batch.x0.shape[1:] != prior.x0.shape[1:]:
            raise DiffScalerError(
                f"the prior pictures are {tuple(prior.x0.shape[1:])} as latents, the task's "
                f"{tuple(batch.x0.shape[1:])}: prepare both at one size, without buckets"
            )
        return torch.cat([batch.x0, prior.x0]), torch.cat([batch.index, prior.index])
