"""The rows of one group: pictures are drawn, compared, timed and weighed."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..task import TaskAdapter
from ..training.data.cache import digest_of, encoder_key
from ..training.denoiser import Denoiser
from ..training.validation import validation_loss
from .distances import frechet_distance, kernel_distance, manifolds
from .drift import drift
from .features import FeatureNet
from .groups import Group, OnProgress
from .memory import allocated
from .pictures import load_strip, save_strip
from .reference import other_prompts, prompts_of
from .rows import Row, save_row, saved_row
from .sampling import Plan, Watch, decoded, drawn, turns
from .settings import EvaluationSettings

VERSION = 1  # of what is measured; rows of another number are measured anew
_STEPS_WEIGHED = 2  # of sampling, for memory: later ones take no more

#: A row and the pictures that the grid shows of it.
Measured = tuple[Row, list[Tensor]]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Measures one group.

    Attributes:
        denoiser: The base, held still.
        group: What is measured.
        net: What pictures are compared by.
        settings: How.
        words: Stored prompts of the base.
        folder: Where finished rows are kept; None: nowhere.
        progress: Told how far it is.
    """

    denoiser: Denoiser
    group: Group
    net: FeatureNet
    settings: EvaluationSettings
    words: TaskAdapter | None
    folder: Path | None
    progress: OnProgress

    def prepare(self) -> None:
        """Finds out what can be refused, before anything is measured.

        Raises:
            DiffScalerError: A task does not fit the base, or nobody knows a prompt of the drift.
        """
        for name, task in self.group.tasks.items():
            with self.denoiser.attached({name: task}):
                pass
            self._others(task)

    def rows(self) -> Iterator[Measured]:
        """Yields the references through the VAE, the base, then each task."""
        yield self._kept("ceiling", None, self._ceiling)
        base, pictures = self._kept("base", None, lambda: self._of("base", None))
        yield base, pictures
        for name, task in self.group.tasks.items():
            own = self._kept(name, task, lambda name=name, task=task: self._of(name, task))  # type: ignore[misc]
            yield replace(own[0], times_base=_ratio(own[0].seconds, base.seconds)), own[1]

    @cached_property
    def plan(self) -> Plan:
        """What is drawn: the prompts of the references in their proportions, or those asked for."""
        data, settings = self.group.reference.data, self.settings
        rows = turns(len(data), settings.pictures, settings.seed)
        index = data.index[rows]
        if settings.prompts:
            index = torch.arange(settings.pictures) % len(settings.prompts)

        def control(rows: Tensor) -> Tensor:
            return data.controls[0][torch.zeros_like(rows), rows]

        return Plan(self.group.asked, index, data.shape, control if data.controls else None, rows)

    @cached_property
    def base_key(self) -> str | None:
        """What tells the base and its weights from any other; None if that cannot be told."""
        return encoder_key(self.denoiser.model)

    @cached_property
    def real(self) -> Tensor:
        """Features of the references, (N, F)."""
        return self.net.of(self._told("features", self.group.reference.pictures()))

    def _told(self, what: str, pictures: Iterator[Tensor]) -> Iterator[Tensor]:
        reference = self.group.reference
        for i, picture in enumerate(pictures):
            self.progress(f"{reference.name}: {what}", i + 1, len(reference))
            yield picture

    def _ceiling(self) -> Measured:
        """Returns the row of the references themselves, encoded and decoded by the VAE."""
        reference = self.group.reference
        batches = reference.data.whole(self.settings.batch)
        through = (picture for batch in batches for picture in decoded(self.denoiser, batch.x0))
        made = self.net.of(self._told("through the VAE", through))
        wanted = [] if self.plan.rows is None else self.plan.rows.tolist()[: self.settings.columns]
        shown = {i: p for i, p in enumerate(reference.pictures()) if i in wanted}
        row = self._compared("references through the VAE", "ceiling", made)
        return row, [shown[i] for i in wanted]

    def _of(self, name: str, task: TaskAdapter | None) -> Measured:
        """Returns the row of the base, with a task or alone."""
        settings, watch = self.settings, Watch()
        found: list[Tensor] = []
        shown: list[Tensor] = []
        worn = contextlib.nullcontext() if task is None else self.denoiser.attached({name: task})
        with worn:
            for pictures in drawn(self.denoiser, self.plan, settings, watch):
                found.append(self.net(pictures))
                shown += list(pictures[: max(0, settings.columns - len(shown))])
                done = sum(map(len, found))
                self.progress(f"{self.group.reference.name}: {name}", done, len(self.plan))
            peak = self._peak()
            loss = self._validation()
        row = self._compared(name, "base" if task is None else "task", torch.cat(found))
        row = replace(row, seconds=watch.seconds, peak=peak, validation_loss=loss)
        return (row if task is None else self._with_costs(row, task)), shown

    def _compared(self, name: str, kind: str, made: Tensor) -> Row:
        kernel = kernel_distance(self.real, made, seed=self.settings.seed)
        overlap = manifolds(self.real, made, self.settings.neighbours)
        return Row(
            name=name,
            kind=kind,
            reference=self.group.reference.name,
            pictures=len(made),
            references=len(self.real),
            frechet=frechet_distance(self.real, made),
            kernel=kernel.mean,
            kernel_spread=kernel.spread,
            precision=overlap.precision,
            recall=overlap.recall,
            density=overlap.density,
            coverage=overlap.coverage,
        )

    def _peak(self) -> int:
        """Returns the bytes that one batch takes at its peak, above what is held before."""
        few = replace(self.settings, steps=_STEPS_WEIGHED)
        batch = self.plan.first(self.settings.batch)
        kind = self.denoiser.device.type
        return allocated(lambda: list(drawn(self.denoiser, batch, few)), kind).peak

    def _validation(self) -> float | None:
        """Returns the loss on some references, spread over all of them, with what is attached."""
        data, told = self.group.reference.data, self.group.told
        if told is None or not self.settings.validation:
            return None
        count = min(len(data), self.settings.validation)
        some = torch.linspace(0, len(data) - 1, count).round().int().tolist()
        return validation_loss(
            self.denoiser,
            data.select(some),
            told,
            batch=self.settings.batch,
            seed=self.settings.seed,
            held=True,
        )

    def _with_costs(self, row: Row, task: TaskAdapter) -> Row:
        """Returns a task's row with what it weighs, and how far it moves other pictures."""
        whole = sum(p.numel() for p in self.denoiser.model.parameters())
        row = replace(
            row,
            parameters=task.num_parameters,
            percent=100 * task.num_parameters / whole,
            bytes=task.nbytes,
        )
        if not self.settings.drift:
            return row
        self.progress(f"{self.group.reference.name}: drift", 0, self.settings.drift)
        moved = drift(self.denoiser, task, self._others(task), self.net, self.settings)
        return replace(row, drift=moved.features, drift_pixels=moved.pixels, drift_off=moved.off)

    def _others(self, task: TaskAdapter) -> Plan:
        """Returns what drift is measured on: prompts that are not the task's."""
        settings, shown = self.settings, self.group.reference.data.prompts
        names = settings.drift_prompts or other_prompts(
            task, (*self.group.asked.names, *shown), self.words, settings.drift
        )
        prompts = prompts_of(self.denoiser, names, None, self.words)
        index = torch.arange(settings.drift) % len(names)
        return Plan(prompts, index, self.group.reference.data.shape)

    def _kept(
        self, name: str, task: TaskAdapter | None, measure: Callable[[], Measured]
    ) -> Measured:
        """Returns a row of an earlier run if it was of the very same things, else measures it."""
        key = self._key(name, task)
        if self.folder is None or key is None:
            return measure()
        stem = re.sub(r"[^\w.-]+", "_", f"{self.group.reference.name}-{name}")[:80]
        file = self.folder / f"{stem}-{key[:8]}.json"
        row, pictures = saved_row(file, key), load_strip(file.with_suffix(".png"))
        if row is None or pictures is None:
            row, pictures = measure()
            save_strip(file.with_suffix(".png"), pictures)
            save_row(file, key, row)  # last: it says that the row is finished
        return row, pictures

    def _key(self, name: str, task: TaskAdapter | None) -> str | None:
        """Returns what tells a row from any other; None if the base cannot be told from others."""
        base, told = self.base_key, json.dumps(asdict(self.settings), sort_keys=True)
        asked = [_bits(getattr(self.group.asked, field)) for field in self.group.asked.fields]
        parts: list[str | bytes | int | None] = [VERSION, name, base, self.net.key, told]
        parts += [self.group.reference.key, *self.group.asked.names, *asked]
        if task is not None:
            parts += [json.dumps(task.info, sort_keys=True, default=str), *map(_bits, task.tensors)]
        return None if base is None else digest_of(*parts)


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
