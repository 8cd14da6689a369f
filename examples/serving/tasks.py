"""Many tasks on one pipeline: loaded by name when first asked for, least recently used ones out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffscaler_core.pipelines  # noqa: F401  (gives the pipeline its methods)
from diffscaler_core import DiffScalerError, TaskAdapter, load_task

from .requests import RequestError


class TaskFolder:
    """The tasks of a folder, as many of them on the pipeline as a byte budget allows.

    Attributes:
        hits: Tasks that a batch found loaded.
        misses: Tasks that a batch had to load.
    """

    def __init__(self, pipe: Any, folder: str | Path, budget: int) -> None:
        """Loads nothing yet.

        Args:
            pipe: Any pipeline the plugin knows.
            folder: Where `<name>.safetensors` lie; read anew for each task that is not loaded.
            budget: Bytes; the tasks of one batch stay loaded even if they are more.
        """
        self._pipe = pipe
        self._folder = Path(folder)
        self._budget = budget
        self._loaded: OrderedDict[str, TaskAdapter] = OrderedDict()
        self.hits = self.misses = 0

    def names(self) -> list[str]:
        """Returns what the folder has now."""
        return sorted(path.stem for path in self._folder.glob("*.safetensors"))

    @property
    def nbytes(self) -> int:
        """Bytes of the tasks that are loaded."""
        return sum(task.nbytes for task in self._loaded.values())

    def check(self, name: str) -> None:
        """Raises RequestError if there is no such task."""
        if not (self._folder / f"{name}.safetensors").is_file():
            raise RequestError(404, f"no task {name!r}; GET /v1/tasks lists them")

    def get(self, name: str, batch: Iterable[str] = ()) -> TaskAdapter:
        """Returns a task that is now on the pipeline.

        Args:
            name: The task.
            batch: Tasks that must stay, because they run in the same batch.

        Raises:
            RequestError: No such task, or it cannot run here.
        """
        if name in self._loaded:
            self.hits += 1
            self._loaded.move_to_end(name)
            return self._loaded[name]
        self.check(name)
        self.misses += 1
        try:
            task = load_task(self._folder / f"{name}.safetensors")
            if task.is_control:
                raise RequestError(422, f"task {name!r} needs a control picture, a prompt will not")
            self._pipe.load_diffscaler(task, name)
        except DiffScalerError as error:
            raise RequestError(422, str(error)) from error
        self._loaded[name] = task
        self._make_room({name, *batch})
        return task

    def _make_room(self, keep: set[str]) -> None:
        held = self.nbytes
        out = []
        for name, task in self._loaded.items():
            if held <= self._budget:
                break
            if name not in keep:
                out.append(name)
                held -= task.nbytes
        if out:
            self._pipe.delete_diffscaler(out)
        for name in out:
            del self._loaded[name]
