"""A run's folder: settings, log, samples, curve. A disk that refuses never ends a run.

    config.toml                what the run was told; `diffscaler train config.toml` reads it
    log.jsonl                  one JSON line per step that was looked at
    samples/step-000100.png    pictures drawn on the way
    checkpoints/               what a run resumes from (see `checkpoints.py`)
    curve.png                  the losses, if matplotlib is installed
    ranks.png                  the ranks that were chosen (rank "auto"), likewise
    groups.json                the hidden groups of the pictures (`debias`), and a report
    <name>-best.safetensors    the task with the lowest validation loss
    <name>.safetensors         the finished task, if no other place was given

Works without rich, matplotlib and diffusers: inside ComfyUI there are none.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import write_whole
from ..auto_rank import RankChoice
from ..file_names import harmless
from .config import TrainingConfig
from .config_file import dump
from .debias import GroupTable
from .progress import History, Progress
from .settings import RunSettings

logger = logging.getLogger(__name__)
_SECONDS = 5.0  # between writes of the log
_WAITING = 10_000  # lines kept while the disk refuses


class RunFolder:
    """One run's files; nothing is written before `start`.

    Args:
        path: The folder; made when something is written.
        settings: What the run was told beside its `TrainingConfig`, for config.toml.
        main: False in all processes but one of a distributed run: writes nothing.
    """

    def __init__(
        self, path: str | Path, settings: RunSettings | None = None, *, main: bool = True
    ) -> None:
        self.path = Path(path)
        self.settings, self.main, self.name = settings, main, "task"
        self._lines: list[str] = []
        self._written, self._warned, self._torn = time.monotonic(), False, False

    def __fspath__(self) -> str:
        """Lets the folder stand where a path is asked for."""
        return str(self.path)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Where samples lie."""
        return self.path / "samples"

    @property
    def log_file(self) -> Path:
        """The log."""
        return self.path / "log.jsonl"

    @property
    def best_file(self) -> Path:
        """The state with the lowest validation loss."""
        return self.best_of(self.name)

    def best_of(self, task: str) -> Path:
        """Returns where the best state of one of several tasks goes."""
        return self.path / f"{harmless(task)}-best.safetensors"

    def start(self, config: TrainingConfig, facts: Mapping[str, object], resumed_at: int) -> None:
        """Makes the folder, writes config.toml, and cuts the log back to where the run goes on.

        Args:
            config: The run's settings.
            facts: What else is worth noting; plain values, for people to read.
            resumed_at: Steps done by the checkpoint the run goes on from; 0: from the start.
        """
        self.name, self._lines = config.name, []
        if not self.main:
            return
        with self._disk():
            text = dump(config, self.settings, **{str(k): v for k, v in facts.items()})
            _write(self.path / "config.toml", text.encode())
        with self._disk():
            kept = "".join(f"{line}\n" for line in _until(self.log_file, resumed_at))
            if kept or self.log_file.exists():
                _write(self.log_file, kept.encode())

    def log(self, progress: Progress) -> None:
        """Notes one step; written every few seconds, and at once with a checkpoint."""
        if not self.main:
            return
        self._lines.append(json.dumps(_entry(progress), ensure_ascii=False))
        due = time.monotonic() - self._written > _SECONDS
        if due or progress.saved or progress.validation is not None:
            self.flush()

    def flush(self) -> None:
        """Writes what `log` has noted so far."""
        self._written = time.monotonic()
        if not self._lines:
            return
        with self._disk():
            self.path.mkdir(parents=True, exist_ok=True)
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + "\n".join(self._lines) + "\n")
            self._lines, self._torn = [], False
            return
        self._torn = True  # some of it may have been written
        del self._lines[:-_WAITING]

    def show(
        self, step: int, pictures: Sequence[Tensor], columns: int, task: str = ""
    ) -> Path | None:
        """Writes samples as one picture.

        Args:
            step: Steps done.
            pictures: (3 or 1, H, W) in −1..1, row by row.
            columns: Pictures per row.
            task: Which task drew them, where a run trains several.

        Returns:
            The file, or None if there is none.
        """
        from .preview import grid

        if not pictures or not self.main:
            return None
        name = f"step-{step:06d}" + (f"-{harmless(task)}" if task else "")
        with self._disk():
            buffer = io.BytesIO()
            grid(pictures, columns).save(buffer, "PNG")
            return _write(self.samples / f"{name}.png", buffer.getvalue())
        return None

    def curve(self, history: History | Mapping[str, History]) -> Path | None:
        """Draws the losses into curve.png; None if that cannot be done here."""
        if not self.main:
            return None

        def draw(file: io.BytesIO) -> None:
            from .curves import draw_curves

            self.flush()
            title = self.name if isinstance(history, History) else ""
            draw_curves(history, file, title=title, log=read_log(self.log_file))

        return self._drawn("curve.png", draw)

    def ranks(self, choice: RankChoice, task: str = "") -> Path | None:
        """Draws chosen ranks into ranks.png; None if that cannot be done here.

        Args:
            choice: The ranks.
            task: Whose they are, where a run trains several.
        """

        def draw(file: io.BytesIO) -> None:
            from .rank_chart import draw_ranks

            draw_ranks(choice, file, title=task or self.name)

        return self._drawn(f"ranks-{harmless(task)}.png" if task else "ranks.png", draw)

    def groups(self, table: GroupTable, task: str = "") -> Path | None:
        """Writes which hidden groups the pictures belong to; named as `ranks`."""
        if not self.main:
            return None
        with self._disk():
            text = json.dumps(table.state(), ensure_ascii=False, indent=1)
            return _write(self._groups_file(task), text.encode())
        return None

    def kept_groups(self, task: str = "") -> GroupTable | None:
        """Returns the groups that an earlier part of the run wrote, None if there are none."""
        try:
            return GroupTable.of(json.loads(self._groups_file(task).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            return None

    def _groups_file(self, task: str) -> Path:
        return self.path / (f"groups-{harmless(task)}.json" if task else "groups.json")

    def _drawn(self, name: str, draw: Callable[[io.BytesIO], None]) -> Path | None:
        """Draws into a file of that name; None if that cannot be done here."""
        buffer = io.BytesIO()
        try:
            draw(buffer)
        except ImportError:  # no matplotlib
            return None
        except Exception as error:  # a picture is worth no run
            logger.warning("%s could not be drawn: %s", name, error)
            return None
        with self._disk():
            return _write(self.path / name, buffer.getvalue())
        return None

    def close(self) -> None:
        """Writes what is left."""
        self.flush()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Turns what the disk refuses into one warning per run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "%s cannot be written (%s); training goes on without it",
                    error.filename or self.path,
                    error.strerror or error,
                )
            self._warned = True


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a log.jsonl; a line cut short by a crash is left out."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    entries.append(entry)
    return entries


def _until(path: Path, step: int) -> list[str]:
    kept = [entry for entry in read_log(path) if entry["step"] <= step] if step else []
    return [json.dumps(entry, ensure_ascii=False) for entry in kept]


def _entry(now: Progress) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": now.step}
    if now.task:
        entry["task"] = now.task
    entry |= {
        "loss": _number(now.loss),
        "mean_loss": _number(now.mean_loss),
        "lr": _number(now.learning_rate),
        "bands": [_number(band) for band in now.bands],
        "rate": _number(now.rate, 3),
        "memory": now.memory,
    }
    if now.validation is not None:
        entry["validation"] = _number(now.validation)
    if now.validation_other is not None:
        entry["validation_other"] = _number(now.validation_other)
    if now.alignment is not None:
        entry["alignment"] = _number(now.alignment)
    if now.saved:
        entry["saved"] = True
    if now.advice:
        entry["advice"] = list(now.advice)
    return entry


def _number(value: float, digits: int = 7) -> float | None:
    """Returns a number as JSON has it: NaN and Inf are null."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _write(path: Path, data: bytes) -> Path:
    write_whole(path, data)
    return path
