"""One run: steps, looks at the losses, validations, samples, checkpoints. Knows no host.

A batch is a function of seed and step, so a run is the same in one go, resumed, or on many devices.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..files import save_task
from ..task import TaskAdapter
from .advice import about_ranks, after_validation
from .checkpoints import newest_checkpoint, save_checkpoint
from .config import TrainingConfig
from .denoiser import Denoiser, Trainable
from .facts import check_same_run, plain_settings, training_facts, versions
from .launch import Launch
from .learner import Drawn, Learner
from .meters import Pace, memory_held
from .objective import band_means
from .preview import sample_controls, sample_prompts
from .progress import OnStep, Progress
from .run_folder import RunFolder
from .signals import stop_requests
from .validation import validation_loss

logger = logging.getLogger(__name__)

#: On an accelerator, steps between looks at the loss: reading it makes the device wait.
LOOK_EVERY = 10


class DivergedError(DiffScalerError):
    """The loss became NaN or Inf.

    Attributes:
        tasks: The tasks as they were when the loss was last finite, by name.
    """

    def __init__(self, message: str, tasks: dict[str, TaskAdapter]) -> None:
        super().__init__(message)
        self.tasks = tasks

    @property
    def task(self) -> TaskAdapter:
        """The first of the tasks."""
        return next(iter(self.tasks.values()))


class Engine:
    """One run: its learners, the step it is at, and where its state is kept."""

    def __init__(
        self,
        denoiser: Denoiser,
        trainable: Trainable,
        learners: Sequence[Learner],
        config: TrainingConfig,
        launch: Launch,
        folder: RunFolder | None,
    ) -> None:
        self.denoiser, self.trainable, self.learners = denoiser, trainable, learners
        self.config, self.launch, self.folder = config, launch, folder
        self.device = denoiser.device
        # 16-bit floats of few exponent bits need their gradients scaled up on the way
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step, self.kept_step, self.pace = 0, 0, Pace()
        self.pending: list[tuple[int, Tensor]] = []
        self.look_every = 1 if self.device.type == "cpu" else LOOK_EVERY
        self.good = [learner.snapshot() for learner in learners]
        self.good_step = 0

    def begin(self, resume: str) -> None:
        """Goes on from the folder's newest checkpoint, if it is asked to and there is one."""
        self.first_look()
        if self.folder is None:
            return
        found = newest_checkpoint(self.folder.checkpoints) if resume == "auto" else None
        if found is not None:
            check_same_run(found.facts, self.config, self.learners, self.folder.path)
            for learner in self.learners:
                learner.restore(found.tensors, found.facts["tasks"][learner.name])
            self.scaler.load_state_dict(found.facts["scaler"])
            self.step = self.good_step = found.step
            self.pace.seconds = float(found.facts["seconds"])
            self.good = [learner.snapshot() for learner in self.learners]
            logger.info("going on from %s", found.path)
        if self.launch.is_main:
            facts = {"tasks": [learner.name for learner in self.learners], "versions": versions()}
            self.folder.start(self.config, facts, self.step)
            for learner in self.learners if self.step == 0 else ():
                if learner.run.ranks is not None:
                    own = learner.name if len(self.learners) > 1 else ""
                    self.folder.ranks(learner.run.ranks, own)

    @torch.no_grad()
    def first_look(self) -> None:
        """Runs the base on one picture: what cannot work fails here, before any training.

        On one of a task with control pictures, that is, and on one of a task without, where a run
        has both.

        Layers that read one input find each other at their first call and share a product from
        then on, which rounds differently. With this look the first step, of a new run as of a
        resumed one, computes as all others do.
        """
        kinds = {bool(learner.config.control): learner for learner in reversed(self.learners)}
        for learner in kinds.values():
            drawn = learner.draw(self.step).rows(slice(0, 1), self.device)
            timestep, x_t = self.denoiser.objective.noisy(drawn.x0, drawn.noise, drawn.t)
            with self.denoiser.autocast(self.config.precision), self._alone(learner):
                self.denoiser(x_t, timestep, learner.condition(drawn))

    def train(self, on_step: OnStep | None) -> dict[str, TaskAdapter]:
        """Runs to the end, or to an early one; returns the tasks as they are then."""
        consistent = True
        self.kept_step = self.step
        # Processes that stop at different steps would wait for each other for ever.
        with stop_requests(self.launch.processes == 1) as stop:
            try:
                while self.step < self.config.steps and not stop.requested:
                    consistent = False
                    self.advance()
                    consistent = True
                    reports = self.look()
                    if on_step is not None and any([on_step(report) for report in reports]):
                        break
            except KeyboardInterrupt:
                logger.warning("interrupted after %d of %d steps", self.step, self.config.steps)
                if not consistent:
                    raise
            except DivergedError:
                raise
            except BaseException:
                # A host's interrupt, a full disk in on_step, …: what is whole is kept.
                if consistent and self.kept_step < self.step:
                    self.save()
                raise
            if self.kept_step < self.step:
                self.look_now()
                self.save()
        if stop.signal is not None:
            logger.warning("%s: stopped after %d steps", stop.signal.name, self.step)
        stop.pass_on()
        return {learner.name: self.task(learner) for learner in self.learners}

    def advance(self) -> None:
        """Does one optimiser step for every task.

        Raises:
            DivergedError: A loss or gradient is not finite; the parameters are the last good ones.
        """
        config, learners = self.config, self.learners
        drawn = [learner.draw(self.step) for learner in learners]
        for learner in learners:
            learner.clear()
        seen: list[list[Tensor]] = [[] for _ in learners]
        own = config.batch // self.launch.processes
        for part in range(config.accumulate):
            rows = slice(part * own // config.accumulate, (part + 1) * own // config.accumulate)
            shares = [self._share(*each, rows) for each in zip(learners, drawn, strict=True)]
            for group in _alike(learners, shares):
                self._backward([(learners[i], shares[i], seen[i]) for i in group])
        norms = []
        for learner in learners:
            self.launch.average_gradients(learner.params)
            for optimizer in learner.optimizers:
                self.scaler.unscale_(optimizer)
            norms.append(learner.clip())
        told = torch.stack([torch.stack(each).nanmean(0) for each in seen])  # (K, 1 + bands)
        if not self.scaler.is_enabled():  # which has its own way with infinite gradients
            told[:, 0] += 0 * torch.stack(norms).to(told)  # a NaN or Inf there shows in the loss
        self.pending.append((self.step + 1, told))
        if self.look_every == 1:
            self.look_now()
        for learner in learners:
            learner.set_rates(self.step)
            for optimizer in learner.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.step += 1
        for learner in learners:
            if learner.ema is not None:
                learner.ema.update(learner.params, self.step)

    def _share(self, learner: Learner, drawn: Drawn, rows: slice) -> Drawn:
        """Returns this process's part of a batch: every P-th row, and of these some."""
        index, processes = self.launch.index, self.launch.processes
        mine = slice(index + rows.start * processes, rows.stop * processes, processes)
        share = drawn.rows(mine, self.device)
        if learner.aligner is None or not learner.aligner.weight(self.step):
            return share
        features = learner.aligner.features(drawn.x0[mine])
        return replace(share, features=features.to(self.device, non_blocking=True))

    def _backward(self, group: Sequence[tuple[Learner, Drawn, list[Tensor]]]) -> None:
        """Computes the gradients of one part of the batch of one or several tasks, in one pass."""
        objective = self.denoiser.objective
        if len(self.learners) > 1:
            self.trainable.set_groups([learner.name for learner, _, _ in group])
        x0, noise, t = (
            torch.cat([getattr(drawn, field) for _, drawn, _ in group])
            for field in ("x0", "noise", "t")
        )
        told = [learner.condition(drawn) for learner, drawn, _ in group]
        condition = {name: torch.cat([each[name] for each in told]) for name in told[0]}
        timestep, x_t = objective.noisy(x0, noise, t)
        first, drawn, _ = group[0]
        looked: AbstractContextManager[list[Any]] = contextlib.nullcontext([])
        if first.aligner is not None and drawn.features is not None:
            looked = first.aligner.looking()
        with self.denoiser.autocast(self.config.precision), looked as found:
            output = self.denoiser(x_t, timestep, condition)
        total = self._aligned(group, found, x_t) / self.config.accumulate
        for (learner, drawn, seen), own in zip(group, output.chunk(len(group)), strict=True):
            weighted, plain = learner.losses(own, drawn)
            loss = learner.risk(weighted, drawn)
            total = total + loss / self.config.accumulate
            seen.append(torch.cat([loss.detach().view(1), band_means(plain, drawn.t)]))
        self.scaler.scale(total).backward()

    def _aligned(
        self, group: Sequence[tuple[Learner, Drawn, list[Tensor]]], found: list[Any], x_t: Tensor
    ) -> Tensor:
        """Returns the tasks' alignment losses (see `alignment.py`), weighted, as one sum."""
        total = x_t.new_zeros((), dtype=torch.float32)
        hidden: tuple[Tensor, ...] = ()
        for i, (learner, drawn, _) in enumerate(group):
            if learner.aligner is None or drawn.features is None:
                continue
            hidden = hidden or learner.aligner.hidden(found, x_t).chunk(len(group))
            own = hidden[i]
            aligned = learner.aligner.loss(own, drawn.features)
            total = total + learner.aligner.weight(self.step) * aligned
        return total

    def look_now(self) -> None:
        """Reads the losses of the steps since the last look.

        Raises:
            DivergedError: One is not finite; the parameters are those of the last good look.
        """
        if not self.pending:
            return
        values = self.launch.mean(torch.stack([told for _, told in self.pending])).tolist()
        for (step, _), per_task in zip(self.pending, values, strict=True):
            for learner, (loss, *bands) in zip(self.learners, per_task, strict=True):
                if not math.isfinite(loss):
                    self._diverge(learner, step, loss)
                learner.history.add(step, loss, bands)
        self.pending.clear()
        if self.look_every > 1:
            self.good = [learner.snapshot() for learner in self.learners]
            self.good_step = self.step

    def look(self) -> list[Progress]:
        """Validates, draws samples and saves where it is time to; returns one report per task."""
        config, step = self.config, self.step
        last = step == config.steps
        self.pace.tick()
        validate = last or (config.validate_every and step % config.validate_every == 0)
        sample = (last and self.folder is not None) or (
            config.sample_every and step % config.sample_every == 0
        )
        save = last or (config.save_every and step % config.save_every == 0)
        if last or validate or save or step % self.look_every == 0:
            self.look_now()
        reports = []
        for learner in self.learners:
            validation, other = self.validate(learner) if validate else (None, None)
            reports.append(
                Progress(
                    step=step,
                    steps=config.steps,
                    loss=learner.history.losses[-1][1] if learner.history.losses else math.nan,
                    mean_loss=learner.history.mean_loss,
                    task=learner.name,
                    rate=self.pace.rate,
                    seconds_left=self.pace.left(config.steps - step),
                    memory=memory_held(self.device),
                    learning_rate=learner.rate,
                    bands=tuple(learner.history.bands),
                    validation=validation,
                    validation_other=other,
                    samples=self.samples(learner) if sample else None,
                    alignment=self._alignment(learner),
                    advice=self._advice(learner, validation is not None),
                )
            )
        if save:
            done = self.save()
            reports = [replace(report, saved=done) for report in reports]
        if validate or sample or save:
            self.pace.skip()
        if self.folder is not None and self.launch.is_main:
            for report in reports:
                self.folder.log(report)
                if report.samples is not None:
                    name = report.task if len(reports) > 1 else ""
                    self.folder.show(step, report.samples, 4, name)
            if validate or last:
                self.folder.curve({learner.name: learner.history for learner in self.learners})
        return reports

    def validate(self, learner: Learner) -> tuple[float | None, float | None]:
        """Returns a task's loss on its validation pictures; the best state so far is kept.

        Of a control task also the loss with other pictures' controls.
        """
        data = learner.run.validation
        if data is None:
            return None, None

        def taken(others: bool) -> float:
            return validation_loss(
                self.denoiser,
                data,
                learner.prompts,
                times=self.config.validation_times,
                batch=self.config.batch,
                precision=self.config.precision,
                held=True,
                others=others,
            )

        with learner.averaged(), self._alone(learner):
            loss = taken(others=False)
            other = taken(others=True) if learner.config.control else math.nan
        if math.isfinite(other):
            learner.history.others.append((self.step, other))
        best = learner.history.validated(self.step, loss)
        if best and self.folder is not None and self.launch.is_main:
            with _disk_may_be_full("the best task so far"):
                save_task(self.task(learner), self.folder.best_of(learner.name))
        return loss, other if math.isfinite(other) else None

    @torch.no_grad()
    def samples(self, learner: Learner) -> list[Tensor] | None:
        """Returns two pictures per prompt, of at most eight prompts, from the same noise always.

        Of a control task: eight control pictures, each followed by what became of it.
        """
        if not (self.launch.is_main or self.launch.sharded):  # sharded: it takes all of them
            return None
        with (
            learner.averaged(),
            self._alone(learner),
            self.denoiser.autocast(self.config.precision),
        ):
            if learner.config.control:
                return sample_controls(
                    self.denoiser,
                    learner.prompts,
                    learner.examples,
                    seed=learner.seed,
                    steps=self.config.sample_steps,
                    guidance=self.config.guidance,
                )
            return sample_prompts(
                self.denoiser,
                learner.prompts.first(8),
                learner.run.data.shape,
                per_prompt=2,
                seed=learner.seed,
                steps=self.config.sample_steps,
                guidance=self.config.guidance,
            )

    def save(self) -> bool:
        """Writes a checkpoint; says whether it is on the disk. A full disk does not end a run."""
        self.kept_step = self.step  # or cannot be: there is no use in trying at once again
        if self.folder is None:
            return False
        done = False
        if self.launch.is_main:
            tensors: dict[str, Tensor] = {}
            for learner in self.learners:
                tensors |= learner.tensors()
            facts = {
                "config": plain_settings(self.config),
                "tasks": {learner.name: learner.facts() for learner in self.learners},
                "scaler": self.scaler.state_dict(),
                "seconds": self.pace.seconds,
            }
            with _disk_may_be_full("a checkpoint"):
                save_checkpoint(
                    self.folder.checkpoints, self.step, tensors, facts, self.config.keep
                )
                done = True
        self.launch.wait()
        return done

    def task(self, learner: Learner) -> TaskAdapter:
        """Returns a task as it is now, with its facts and learned prompts."""
        prompts = learner.prompts
        with learner.averaged():
            task = self.trainable.task(learner.name)
            conditioning = prompts.stored() if prompts.learned else dict(task.conditioning)
        names = list(prompts.names) if prompts.learned else list(task.prompts)
        facts: dict[str, Any] = {"training": training_facts(learner, self.step, self.pace.seconds)}
        facts["prompts"] = names
        if self.config.at_resolution != 1:
            facts["resolution"] = self.config.at_resolution
        if "label" in prompts.fields:
            labels = torch.as_tensor(prompts.label).tolist()
            facts["classes"] = task.classes | dict(zip(prompts.names, labels, strict=True))
        return task.replace(conditioning=conditioning).with_info(**facts)

    def _alignment(self, learner: Learner) -> float | None:
        if learner.aligner is None or self.step % self.look_every:
            return None
        return learner.aligner.told()

    def _advice(self, learner: Learner, validated: bool) -> tuple[str, ...]:
        """Returns what there is to say after this step."""
        chosen, last = learner.run.ranks, self.step == self.config.steps
        first = about_ranks(chosen) if chosen is not None and self.step == 1 else ()
        return (*first, *(after_validation(learner.history, last) if validated else ()))

    @contextlib.contextmanager
    def _alone(self, learner: Learner) -> Iterator[None]:
        """Lets every row run this task, for as long as the context lasts."""
        if len(self.learners) > 1:
            self.trainable.set_groups([learner.name])
        yield

    def _diverge(self, learner: Learner, step: int, loss: float) -> None:
        config = self.config
        self.pending.clear()
        if self.look_every > 1:
            self.step = self.good_step
            for each, good in zip(self.learners, self.good, strict=True):
                each.go_back(good)
        which = f" of task {learner.name!r}" if len(self.learners) > 1 else ""
        raise DivergedError(
            f"the loss{which} became {loss} at step {step} of {config.steps}, so training stopped "
            f"with the state after step {self.step}; lower the learning rates (lr {config.lr:g}, "
            f"lr_scale_shift {config.lr_scale_shift:g}), or load the base in float32 or bfloat16",
            {each.name: self.task(each) for each in self.learners},
        )


def _alike(learners: Sequence[Learner], shares: Sequence[Drawn]) -> list[list[int]]:
    """Returns the tasks whose rows can go through the base together: same sizes of everything."""
    groups: dict[Any, list[int]] = {}
    for i, (learner, share) in enumerate(zip(learners, shares, strict=True)):
        told = tuple(
            getattr(learner.prompts, n).shape[1:] if share.told is None else share.told[n].shape[1:]
            for n in learner.prompts.fields
        )
        groups.setdefault((share.x0.shape, told, share.control is None), []).append(i)
    return list(groups.values())


@contextlib.contextmanager
def _disk_may_be_full(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, DiffScalerError) as error:
        reason = getattr(error, "strerror", None) or error
        logger.warning("%s could not be saved: %s; training goes on", what, reason)
