"""A bank of many tasks for one base: those used last are at hand, the others in memory or in files.

    bank = TaskBank(pipe, "tasks/", device_bytes=2 << 30)
    with bank.rows(["watercolour", None, {"manga": 0.8}]):   # loaded by name if need be
        pipe(["a fox"] * 3)

A task passes through three places: a file; the computer's memory; *at hand*, attached to the model,
on the model's device and in its dtype. Between tasks at hand switching costs no copy. Whoever was
used longest ago makes room. Tasks that were loaded without the bank are never touched.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attach import Attachment, Row, Weight, attach, mix_of
from .errors import DiffScalerError, first_names, unknown
from .file_names import problem_of
from .files import load_task
from .task import TaskAdapter

Source = str | Path | Mapping[str, Any] | Callable[[str], TaskAdapter]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class BankStatistics:
    """What a bank has done so far.

    Attributes:
        hits: Times a task that was asked for was at hand.
        from_memory: Times it came from memory.
        from_files: Times it came from a file.
        evicted: Times a task at hand made room for another.
    """

    hits: int = 0
    from_memory: int = 0
    from_files: int = 0
    evicted: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requests that found their task at hand; 1 before the first."""
        asked = self.hits + self.from_memory + self.from_files
        return self.hits / asked if asked else 1.0


class _Seat(Protocol):
    """Where tasks are attached: a pipeline or a model."""

    @property
    def place(self) -> tuple[torch.device, torch.dtype | None]: ...

    def add(self, name: str, task: TaskAdapter) -> None: ...

    def drop(self, name: str) -> None: ...

    def activate(self, weights: Mapping[str, Weight]) -> None: ...

    def rows(self, rows: Sequence[Row]) -> AbstractContextManager[None]: ...


class TaskBank:
    """Tasks by name, loaded when they are asked for.

    Not for two threads that run the model at once; `prefetch` may come from any thread.

    Args:
        base: A diffusers pipeline, or a model.
        source: A folder of `.safetensors` files, asked for by their names without the ending;
            {name: path or TaskAdapter}; or a function name -> TaskAdapter.
        device_bytes: How much the tasks at hand may hold. (What is computed from those that act
            comes on top; see `Ensemble`.)
        host_bytes: How much those in memory may hold beside.

    Attributes:
        statistics: What it has done so far.

    Raises:
        DiffScalerError: No such folder.
    """

    def __init__(
        self,
        base: Any,
        source: Source,
        *,
        device_bytes: int = 1 << 30,
        host_bytes: int = 4 << 30,
    ) -> None:
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        self.statistics = BankStatistics()
        self._seat: _Seat = _OnModel(base) if isinstance(base, nn.Module) else _OnPipeline(base)
        self._source = Path(source) if isinstance(source, str) else source
        if isinstance(self._source, Path) and not self._source.is_dir():
            raise DiffScalerError(f"no folder {str(self._source)!r} to take tasks from")
        self._at_hand: OrderedDict[str, int] = OrderedDict()  # name -> bytes, used last comes last
        self._in_memory: OrderedDict[str, TaskAdapter] = OrderedDict()
        self._active: set[str] = set()
        self._lock = threading.RLock()

    @property
    def at_hand(self) -> tuple[str, ...]:
        """The tasks that are attached, the one used longest ago first."""
        return tuple(self._at_hand)

    @property
    def in_memory(self) -> tuple[str, ...]:
        """The tasks that are in memory, the one used longest ago first."""
        return tuple(self._in_memory)

    @property
    def device_bytes_held(self) -> int:
        """Bytes of the tasks at hand."""
        return sum(self._at_hand.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Every task there is, as far as the source can list them."""
        if isinstance(self._source, Path):
            return tuple(sorted(p.stem for p in self._source.glob("*.safetensors")))
        return tuple(self._source) if isinstance(self._source, Mapping) else self.in_memory

    def need(self, names: Sequence[str]) -> None:
        """Brings tasks to hand, all of them or none; others make room.

        Raises:
            UnknownNameError: The source has no such task.
            DiffScalerError: A broken file, a task for another base, or more than fits at once.
        """
        names = list(dict.fromkeys(names))
        with self._lock:
            missing = [name for name in names if name not in self._at_hand]
            # everything is read before anything is moved
            ready = {name: self._placed(self._read(name)) for name in missing}
            kept = {name for name in self._at_hand if name in names or name in self._active}
            needed = sum(self._at_hand[name] for name in kept)
            wanted = needed + sum(_bytes_of(task) for task in ready.values())
            if wanted > self.device_bytes:
                raise DiffScalerError(
                    f"{len(kept) + len(ready)} tasks need {_mib(wanted)} at once "
                    f"({first_names([*kept, *ready])}), but the bank may hold "
                    f"{_mib(self.device_bytes)}: raise device_bytes, or mix fewer tasks in a batch"
                )
            self._make_room(wanted - needed, kept)
            self._add(ready)
            for name in names:
                self._at_hand.move_to_end(name)
            self.statistics.hits += len(names) - len(missing)

    def prefetch(self, names: Sequence[str]) -> None:
        """Reads tasks into memory, so that `need` finds them there; from any thread.

        Raises:
            UnknownNameError: The source has no such task.
            DiffScalerError: A broken file.
        """
        for name in names:
            if name not in self._at_hand and name not in self._in_memory:
                task = self._from_source(name)
                with self._lock:
                    self._remember(name, task)

    def activate(self, weights: str | Mapping[str, Weight]) -> None:
        """Makes tasks the active ones, for all rows: a name, or {name: strength}.

        They stay at hand until others are activated.
        """
        weights = {weights: 1.0} if isinstance(weights, str) else dict(weights)
        before, self._active = self._active, set(weights)
        try:
            self.need(list(weights))
        except BaseException:
            self._active = before
            raise
        self._seat.activate(weights)

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Iterator[None]:
        """Runs another task for each prompt of a call (or row of a model's batch) in one forward.

        Args:
            rows: One entry each: a task's name, a mix {name: strength}, or None for the base.
        """
        mixes = [mix_of(row) for row in rows]
        self.need([name for mix in mixes for name in mix])
        with self._seat.rows(rows):
            yield

    def release(self, names: Sequence[str] | None = None) -> None:
        """Takes tasks off the model; None: all that the bank attached."""
        with self._lock:
            for name in list(self._at_hand) if names is None else names:
                if name in self._at_hand:
                    self._seat.drop(name)
                    del self._at_hand[name]
                    self._active.discard(name)

    def _read(self, name: str) -> TaskAdapter:
        if name in self._in_memory:
            self.statistics.from_memory += 1
            self._in_memory.move_to_end(name)
            return self._in_memory[name]
        task = self._from_source(name)
        self.statistics.from_files += 1
        self._remember(name, task)
        return task

    def _from_source(self, name: str) -> TaskAdapter:
        if isinstance(self._source, Path):
            # a name is one file's in the folder, whatever it holds: no path leads out of it
            path = self._source / f"{name}.safetensors"
            if name != Path(name).name or problem_of(path.name) or not path.is_file():
                raise unknown("task", name, self.names)
            return load_task(path)
        if isinstance(self._source, Mapping):
            if name not in self._source:
                raise unknown("task", name, tuple(self._source))
            own = self._source[name]
            return own if isinstance(own, TaskAdapter) else load_task(own)
        return self._source(name)

    def _remember(self, name: str, task: TaskAdapter) -> None:
        self._in_memory[name] = task
        held = sum(own.nbytes for own in self._in_memory.values())
        while held > self.host_bytes and self._in_memory:
            held -= self._in_memory.popitem(last=False)[1].nbytes

    def _placed(self, task: TaskAdapter) -> TaskAdapter:
        """Returns a task where the model computes, so that nothing is moved when it acts."""
        device, dtype = self._seat.place
        layers = {
            layer: {part: _moved(part, t, device, dtype) for part, t in own.items()}
            for layer, own in task.layers.items()
        }
        extras = {n: _moved(n.rpartition(".")[2], t, device, dtype) for n, t in task.extras.items()}
        return task.replace(layers=layers, extras=extras)

    def _make_room(self, wanted: int, kept: set[str]) -> None:
        held = self.device_bytes_held
        for name in list(self._at_hand):
            if held + wanted <= self.device_bytes:
                return
            if name not in kept:
                self._seat.drop(name)
                held -= self._at_hand.pop(name)
                self.statistics.evicted += 1

    def _add(self, tasks: Mapping[str, TaskAdapter]) -> None:
        added: list[str] = []
        try:
            for name, task in tasks.items():
                self._seat.add(name, task)
                added.append(name)
                self._at_hand[name] = _bytes_of(task)
        except BaseException:
            for name in added:
                self._seat.drop(name)
                self._at_hand.pop(name, None)
            raise


class _OnModel:
    """A model on its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attached: Attachment | None = None

    @property
    def place(self) -> tuple[torch.device, torch.dtype | None]:
        return _place_of(self._model)

    def add(self, name: str, task: TaskAdapter) -> None:
        if self._attached is None:
            self._attached = attach(self._model, {name: task}, 0.0)
        else:
            self._attached.add(self._model, name, task)

    def drop(self, name: str) -> None:
        if self._attached is None:
            return
        self._attached.drop(name)
        if not self._attached.names:
            self._attached.remove()
            self._attached = None

    def activate(self, weights: Mapping[str, Weight]) -> None:
        if self._attached is not None:
            self._attached.set_weights(weights)

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Iterator[None]:
        if self._attached is None:
            yield
            return
        self._attached.set_rows(rows)
        try:
            yield
        finally:
            self._attached.set_rows(None)


class _OnPipeline:
    """A diffusers pipeline; its plugin is imported here, as not everybody has diffusers."""

    def __init__(self, pipe: Any) -> None:
        from . import pipelines
        from .plugin.models import add_task, models_for, models_of

        self._pipe, self._plugin = pipe, pipelines
        self._add, self._models_for, self._models_of = add_task, models_for, models_of

    @property
    def place(self) -> tuple[torch.device, torch.dtype | None]:
        return _place_of(next(iter(self._models_of(self._pipe).values())))

    def add(self, name: str, task: TaskAdapter) -> None:
        models = self._models_for(task, self._models_of(self._pipe), type(self._pipe).__name__)
        self._add(name, task, models)

    def drop(self, name: str) -> None:
        self._plugin.delete_diffscaler(self._pipe, name)

    def activate(self, weights: Mapping[str, Weight]) -> None:
        self._plugin.set_diffscaler(self._pipe, list(weights), list(weights.values()))

    def rows(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        return self._plugin.diffscaler_rows(self._pipe, rows)


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Returns where a model computes; None for the dtype of one whose weights are quantised."""
    parameter = next(model.parameters(), torch.zeros(()))
    dtype = parameter.dtype if parameter.dtype in _DTYPES else None
    return parameter.device, dtype


def _moved(part: str, t: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if device.type == "meta":
        return t
    # scales and shifts are small and are summed up in 32 bits: they stay as they are
    return t.to(device, dtype if part in ("down", "up") else None)


def _bytes_of(task: TaskAdapter) -> int:
    """Returns the bytes that are attached: stored prompts are not."""
    layered = [t for own in task.layers.values() for t in own.values()]
    return sum(t.nbytes for t in (*layered, *task.extras.values()))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
