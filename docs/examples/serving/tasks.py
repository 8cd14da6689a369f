"""A folder of tasks behind a bank: found by name, read ahead of their batch, fit for a prompt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffscaler_core import DiffScalerError, TaskAdapter, TaskBank, UnknownNameError, load_task

from .requests import RequestError


class TaskFolder:
    """The tasks of a folder, as many of them on the pipeline as a byte budget allows."""

    def __init__(self, pipe: Any, folder: str | Path, device_bytes: int, host_bytes: int) -> None:
        """Reads nothing yet.

        Args:
            pipe: Any pipeline the plugin knows.
            folder: Where `<name>.safetensors` lie; files may come while the server runs.
            device_bytes: Of the tasks that stay on the pipeline.
            host_bytes: Of those that stay in memory beside.
        """
        self._folder = Path(folder)
        self._bank = TaskBank(pipe, self._read, device_bytes=device_bytes, host_bytes=host_bytes)
        self._prompts: dict[str, TaskAdapter] = {}  # of each task in the bank, without its layers
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Returns what the folder has now."""
        return sorted(path.stem for path in self._folder.glob("*.safetensors"))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The tasks on the pipeline, the one used longest ago first."""
        return self._bank.at_hand

    @property
    def device_bytes(self) -> int:
        """Bytes of the tasks on the pipeline."""
        return self._bank.device_bytes_held

    def prefetch(self, names: Sequence[str]) -> None:
        """Reads tasks into memory, beside a batch under way; from any thread.

        Raises:
            RequestError: No such task, or it cannot run here.
        """
        try:
            self._bank.prefetch(names)
        except DiffScalerError as error:
            raise RequestError(422, str(error)) from error

    def hold(self, names: Sequence[str]) -> None:
        """Brings all these tasks to the pipeline, or none; others make room.

        Raises:
            RequestError: No such task, or it cannot run here.
            DiffScalerError: One was made for another base, or they are too many at once.
        """
        try:
            self._bank.need(names)
        except UnknownNameError as error:
            raise RequestError(404, str(error)) from error

    def prompt_of(self, name: str) -> TaskAdapter:
        """Returns the prompts a task brings along. It must be on the pipeline."""
        return self._prompts[name]

    def _read(self, name: str) -> TaskAdapter:
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            raise RequestError(404, f"no task {name!r}; GET /v1/tasks lists them")
        task = load_task(path)
        if task.is_control:
            raise RequestError(422, f"task {name!r} needs a control picture, a prompt will not do")
        with self._lock:
            kept = {name, *self._bank.at_hand, *self._bank.in_memory}
            if len(self._prompts) > 2 * len(kept):
                self._prompts = {n: own for n, own in self._prompts.items() if n in kept}
            self._prompts[name] = task.replace(layers={}, extras={})
        return task
