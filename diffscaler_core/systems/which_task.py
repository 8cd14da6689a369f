"""Which of several tasks made a picture? The one under which the base denoises it best.

"Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv:2303.16203): of several conditions,
a picture x0 belongs to the one with the least denoising error,

    score_k = mean over i of ‖εᵢ − ε^(xᵢ, tᵢ, c_k)‖²,    xᵢ = α(tᵢ)·x0 + σ(tᵢ)·εᵢ,

with the same (tᵢ, εᵢ) for every k, and with few probes first and more for the few best. There the
conditions are prompts; here they are tasks on one frozen base, prompts, or pairs of both.

Ours: the error is of what the base itself predicts (`ERRORS`; the paper's, of the noise, is there
too); the base without any task is told nothing and probed like a candidate, so that a score is
score_k − score_base; and the rule for "none of them". Differences are paired, so their spread over
the probes gives a standard error s; a candidate fits if its mean difference is below −threshold·s
(and, if asked for, no smaller than a share of the base's error). s holds how differences vary with
the noise level too, so it is rather too large than too small.

All tasks are attached once. A batch is made of groups, one candidate each, the base among them, so
a task costs what a few more rows cost, and nothing is ever swapped.

Shapes: pictures (N, C, H, W); latents (N, c, h, w).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError, first_names, unknown
from ..task import TaskAdapter
from ..training.bases.pipelines import as_denoiser
from ..training.conditioning import NULL, prompts_for
from ..training.denoiser import Condition, Denoiser, Trainable
from ..training.objective import Objective
from ..training.randomness import generator_for
from .ranking import Fit, Ranking

_NOISE = "which task"  # its stream of random numbers
_GOLDEN = (math.sqrt(5) - 1) / 2
_FIRST = 4  # probes before anything is dropped: fewer say little

#: (forward passes done, forward passes in all); what it raises ends the search.
OnProgress = Callable[[int, int], None]
#: (probes in all, candidates kept then)
Stage = tuple[int, int]


def _own(objective: Objective, t: Tensor) -> Tensor:
    return torch.ones_like(t)


def _of_noise(objective: Objective, t: Tensor) -> Tensor:
    """ε^ − ε = α/(α·d − σ·c) times the error of p = c·x0 + d·ε (see `objective.separate`)."""
    _, alpha, sigma = objective.at(t)
    factors = {
        "epsilon": torch.ones_like(alpha),
        "v": alpha / (alpha**2 + sigma**2),
        "flow": alpha / (alpha + sigma),
        "flow_reversed": alpha / (alpha + sigma),
        "x0": alpha / sigma,
    }
    return factors[objective.kind].float() ** 2


#: Name -> (objective, times (B,)) -> weights of the squared error of what the base predicts, (B,).
ERRORS: dict[str, Callable[[Objective, Tensor], Tensor]] = {"own": _own, "noise": _of_noise}


@dataclass(frozen=True)
class ProbeSettings:
    """How pictures are probed.

    Attributes:
        probes: Pairs (tᵢ, εᵢ) for the candidates that stay to the end.
        stages: (probes in all, candidates kept then), one after the other; the last number of
            probes is the end. ((n, 1),): no candidate is dropped before all have n probes. None:
            `halving`.
        batch: The most rows of one forward pass. Results do not depend on it but for rounding.
        threshold: A candidate fits if it beats the base by more than this many standard errors
        least: and by this share of the base's error, 0..1. Standard errors shrink as probes grow,
            so that a small advantage passes in the end; a share does not.
        low: Least noise, a time in 0..1.
        high: Most noise.
        error: A name in ERRORS.
        seed: Of the noise.
    """

    probes: int = 16
    stages: tuple[Stage, ...] | None = None
    batch: int = 32
    threshold: float = 3.0
    least: float = 0.0
    low: float = 0.0
    high: float = 1.0
    error: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what makes no sense.

        Raises:
            DiffScalerError: With the reason.
        """
        numbers = [n for n, _ in self.stages] if self.stages is not None else [self.probes]
        rising = all(a < b for a, b in itertools.pairwise(numbers))
        if not numbers or numbers[0] < 2 or not rising:
            raise DiffScalerError(
                f"probes must be at least 2 and grow from stage to stage, got {numbers}: from "
                f"one probe no spread can be told"
            )
        if self.stages is not None and min(keep for _, keep in self.stages) < 1:
            raise DiffScalerError("every stage must keep at least one candidate")
        if self.batch < 1 or not 0 <= self.low < self.high <= 1:
            raise DiffScalerError(
                f"batch must be at least 1, and 0 ≤ low < high ≤ 1; got batch {self.batch}, "
                f"low {self.low}, high {self.high}"
            )
        if not self.threshold >= 0 or not 0 <= self.least < 1:
            raise DiffScalerError(
                f"threshold must not be negative, least from 0 to below 1; got {self.threshold} "
                f"and {self.least}"
            )
        if self.error not in ERRORS:
            raise unknown("error", self.error, ERRORS)

    def stages_for(self, count: int) -> tuple[Stage, ...]:
        """Returns the stages for so many candidates."""
        return self.stages if self.stages is not None else halving(count, self.probes)


def halving(count: int, probes: int) -> tuple[Stage, ...]:
    """Returns stages in which the better half goes on with twice the probes, to one candidate.

    Successive halving (arXiv:1502.07943). The first stage has at least 4 probes, or all of them.
    """
    rounds = max(1, math.ceil(math.log2(max(count, 1))))
    stages: dict[int, int] = {}
    for i in range(rounds):
        number = max(probes >> (rounds - 1 - i), min(_FIRST, probes))
        stages[number] = max(1, math.ceil(count / 2 ** (i + 1)))  # of equal numbers the last counts
    return tuple(stages.items())


@dataclass(frozen=True, eq=False)
class Candidate:
    """One answer.

    Attributes:
        task: Name of its task; None: the base itself, told something.
        told: What the model is told, one row; None: nothing, as the base it is compared with.
        prompt: What that is called.
    """

    task: str | None
    told: Condition | None = None
    prompt: str | None = None


def which_task(
    base: Any,
    pictures: Tensor,
    tasks: Mapping[str, TaskAdapter],
    prompts: Mapping[str | None, Sequence[str]] | None = None,
    settings: ProbeSettings | None = None,
    *,
    words: TaskAdapter | None = None,
    nothing: Condition | None = None,
    latents: bool = False,
    on_progress: OnProgress | None = None,
) -> Ranking:
    """Returns which task fits one picture, or several pictures taken together.

    Args:
        base: A diffusers pipeline, or a `Denoiser`.
        pictures: (N, C, H, W) or (C, H, W) in −1..1, at a size that the base draws.
        tasks: Name -> task, at strength 1 (for others, `scale_task`).
        prompts: Task -> names of prompts, each of them a candidate with that task; None as the
            task: with the base alone. Tasks that are left out are told nothing.
        settings: How; None: the defaults.
        words: Stored prompts of the base, if it has no text encoder.
        nothing: What a model that is told nothing is told, one row; None: the null prompt.
        latents: The pictures are latents already.
        on_progress: Told how far it is; what it raises ends the search, and the base is as before.

    Raises:
        DiffScalerError: No candidate, a task that takes control pictures, or a prompt nobody knows.
        MismatchError: A task does not fit the base.
    """
    return next(
        which_tasks(
            base, [pictures], tasks, prompts, settings,
            words=words, nothing=nothing, latents=latents, on_progress=on_progress,
        )
    )  # fmt: skip


@torch.no_grad()
def which_tasks(
    base: Any,
    pictures: Iterable[Tensor],
    tasks: Mapping[str, TaskAdapter],
    prompts: Mapping[str | None, Sequence[str]] | None = None,
    settings: ProbeSettings | None = None,
    *,
    words: TaskAdapter | None = None,
    nothing: Condition | None = None,
    latents: bool = False,
    on_progress: OnProgress | None = None,
) -> Iterator[Ranking]:
    """Yields the ranking of each of several pictures, with one attach for all; see `which_task`.

    A picture's ranking does not depend on the others.
    """
    denoiser, settings = as_denoiser(base), settings or ProbeSettings()
    told = nothing if nothing is not None else _told_nothing(denoiser, tasks, words)
    candidates = _candidates(denoiser, tasks, prompts or {}, words)
    encode = None if latents else denoiser.encode
    worn = denoiser.attached(tasks) if tasks else contextlib.nullcontext()
    with denoiser.held(), worn as trainable:
        for picture in pictures:
            rows = picture if picture.ndim > 3 else picture[None]
            x0 = encode(rows.to(denoiser.device)) if encode is not None else rows
            search = _Search(denoiser, trainable, x0.float(), candidates, told, settings)
            yield search.run(on_progress or (lambda done, total: None))


@dataclass(eq=False)
class _Search:
    """The probes of one picture (or several, taken together).

    A sample is a picture with a probe's time and a noise of its own: sample i is picture i % N at
    probe i // N. Candidates have the errors of the first so many samples; the base's name is None.
    """

    denoiser: Denoiser
    trainable: Trainable | None
    x0: Tensor
    candidates: Mapping[str, Candidate]
    nothing: Condition
    settings: ProbeSettings
    errors: dict[str | None, list[float]] = field(default_factory=dict)
    forwards: int = 0

    def run(self, progress: OnProgress) -> Ranking:
        alive = list(self.candidates)
        stages = self.settings.stages_for(len(alive))
        last: dict[str, int] = {}
        total = self._total(stages)
        for number, (probes, keep) in enumerate(stages):
            self._probe([None, *alive], probes * len(self.x0), total, progress)
            alive.sort(key=lambda name: self._fit(name).difference)  # stable: equal ones as given
            last |= dict.fromkeys(alive, number)
            alive = alive[: keep if number < len(stages) - 1 else 1]
        fits = sorted(map(self._fit, self.candidates), key=lambda f: (-last[f.name], f.difference))
        return Ranking(
            fits=tuple(fits),
            base_error=float(torch.tensor(self.errors[None], dtype=torch.float64).mean()),
            threshold=self.settings.threshold,
            least=self.settings.least,
            margin=self._margin(fits),
            forwards=self.forwards,
            full_forwards=len(self.errors[None]) * (1 + len(self.candidates)),
        )

    def _total(self, stages: Sequence[Stage]) -> int:
        """Returns how many forward passes the stages take."""
        alive, before, total = len(self.candidates), 0, 0
        for probes, keep in stages:
            total += (probes - before) * len(self.x0) * (alive + 1)
            alive, before = min(alive, keep), probes
        return total

    def _probe(
        self, names: Sequence[str | None], count: int, total: int, progress: OnProgress
    ) -> None:
        """Brings the errors of these candidates to so many samples."""
        start = len(self.errors.get(None, ()))
        for same in _of_one_shape(names, self._told):
            for group in _chunks(same, self.settings.batch):
                share = max(1, self.settings.batch // len(group))
                for samples in _chunks(range(start, count), share):
                    found = self._errors(group, samples)
                    for name, own in zip(group, found, strict=True):
                        self.errors.setdefault(name, []).extend(own)
                    self.forwards += len(group) * len(samples)
                    progress(self.forwards, total)

    def _errors(self, names: Sequence[str | None], samples: Sequence[int]) -> list[list[float]]:
        """Returns each candidate's error on each sample, by one forward pass."""
        objective, device = self.denoiser.objective, self.denoiser.device
        pictures = len(self.x0)
        x0 = torch.stack([self.x0[i % pictures] for i in samples]).to(device)
        noise = torch.stack([self._noise(*divmod(i, pictures)) for i in samples]).to(device)
        t = torch.tensor([self._time(i // pictures) for i in samples], device=device)
        timestep, x_t = objective.noisy(x0, noise, t)
        count = len(names)
        told = [self._told(name) for name in names]
        condition = {
            field: torch.cat([_repeated(own[field], len(samples), device) for own in told])
            for field in told[0]
        }
        if self.trainable is not None:
            tasks = [None if name is None else self.candidates[name].task for name in names]
            self.trainable.set_groups(tasks)
        output = self.denoiser(_tiled(x_t, count), _tiled(timestep, count), condition)
        loss = objective.loss(output, _tiled(x0, count), _tiled(noise, count), _tiled(t, count))
        loss = loss.view(count, len(samples)) * ERRORS[self.settings.error](objective, t)
        return loss.double().tolist()

    def _noise(self, probe: int, picture: int) -> Tensor:
        generator = generator_for(self.settings.seed, _NOISE, probe, picture)
        return torch.randn(self.x0.shape[1:], generator=generator)

    def _time(self, probe: int) -> float:
        """Returns a probe's time: however many come first, they lie evenly between low and high.

        (½ + i·φ) mod 1 with the golden ratio φ; the paper's evenly spaced times are another set for
        each number of probes, so that fewer are no beginning of more.
        """
        low, high = self.settings.low, self.settings.high
        return low + (high - low) * ((0.5 + probe * _GOLDEN) % 1)

    def _told(self, name: str | None) -> Condition:
        own = None if name is None else self.candidates[name].told
        return self.nothing if own is None else own

    def _differences(self, name: str, other: str | None = None) -> Tensor:
        """Returns one's error minus the other's (the base's) on the samples that both have."""
        pairs = zip(self.errors[name], self.errors[other], strict=False)
        return torch.tensor([a - b for a, b in pairs], dtype=torch.float64)

    def _fit(self, name: str) -> Fit:
        differences, own = self._differences(name), self.candidates[name]
        base = torch.tensor(self.errors[None][: len(differences)], dtype=torch.float64)
        return Fit(
            name=name,
            task=own.task,
            prompt=own.prompt,
            probes=len(differences) // len(self.x0),
            difference=float(differences.mean()),
            standard_error=_standard_error(differences),
            share=-float(differences.mean()) / float(base.mean()),
        )

    def _margin(self, fits: Sequence[Fit]) -> tuple[float, float] | None:
        if len(fits) < 2:
            return None
        gap = self._differences(fits[1].name, fits[0].name)
        return float(gap.mean()), _standard_error(gap)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _of_one_shape(
    names: Sequence[str | None], told: Callable[[str | None], Condition]
) -> list[list[str | None]]:
    """Returns the candidates that can share a batch: those whose conditions have one shape."""
    found: dict[Any, list[str | None]] = {}
    for name in names:
        key = tuple((field, tuple(rows.shape)) for field, rows in sorted(told(name).items()))
        found.setdefault(key, []).append(name)
    return list(found.values())


def _tiled(values: Tensor, times: int) -> Tensor:
    """Returns (B, …) `times` times, one after the other."""
    return values.repeat(times, *(1,) * (values.ndim - 1))


def _repeated(row: Tensor, times: int, device: torch.device) -> Tensor:
    return row.to(device).expand(times, *row.shape[1:])


def _candidates(
    denoiser: Denoiser,
    tasks: Mapping[str, TaskAdapter],
    prompts: Mapping[str | None, Sequence[str]],
    words: TaskAdapter | None,
) -> dict[str, Candidate]:
    """Returns the candidates by name: a task's, a prompt's, or "task: prompt"."""
    strange = [str(name) for name in prompts if name is not None and name not in tasks]
    if strange:
        raise DiffScalerError(f"prompts for {first_names(strange)}, but there is no such task")
    controls = [name for name, task in tasks.items() if task.is_control]
    if controls:
        raise DiffScalerError(
            f"{first_names(controls)} takes control pictures, and what a picture's control was "
            f"nobody knows: leave such tasks out"
        )
    found: dict[str, Candidate] = {}
    for task in (*tasks, *([None] if None in prompts else [])):
        own = tuple(prompts.get(task, ()))
        if not own and task is not None:
            found[task] = Candidate(task)
            continue
        table = _table(denoiser, own, None if task is None else tasks[task], words)
        for prompt, told in zip(own, table, strict=True):
            name = prompt if task is None else f"{task}: {prompt}"
            if name in found:
                raise DiffScalerError(f"two candidates are called {name!r}; name tasks apart")
            found[name] = Candidate(task, told, prompt)
    if not found:
        raise DiffScalerError("there is no candidate; give at least one task or one prompt")
    return found


def _table(
    denoiser: Denoiser,
    names: Sequence[str],
    task: TaskAdapter | None,
    words: TaskAdapter | None,
) -> list[dict[str, Tensor]]:
    """Returns what each prompt tells the model, one row each."""
    from ..evaluation.reference import prompts_of  # which needs Pillow

    prompts = prompts_of(denoiser, tuple(names), task, words).place(denoiser.device)
    return [prompts(torch.tensor([i])) for i in range(len(names))]


def _told_nothing(
    denoiser: Denoiser, tasks: Mapping[str, TaskAdapter], words: TaskAdapter | None
) -> dict[str, Tensor]:
    """Returns the null prompt, one row.

    Raises:
        DiffScalerError: Nobody knows it.
    """
    if not denoiser.fields:
        return {}
    if "label" in denoiser.fields:
        if denoiser.null_label is None:
            raise DiffScalerError(
                "this base has no class for nothing; say what it is told (nothing={'label': …})"
            )
        return {"label": torch.tensor([denoiser.null_label])}
    table = next((t for t in (words, *tasks.values()) if t and NULL in t.prompts), None)
    if table is None and denoiser.encode_text is None:
        raise DiffScalerError(
            "the null prompt is not known: this base has no text encoder, and no task stores it; "
            "give a file of stored prompts (words)"
        )
    source = "encoded" if table is None else "stored"
    return prompts_for(denoiser, [NULL], source, words=table, null=table).null(1)
