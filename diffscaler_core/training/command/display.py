"""What a terminal shows of a run: one moving line, and a line for each event. Needs rich."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from ..progress import Progress, by_noise
from ..run_folder import RunFolder
from .plan import duration, size_of

_QUIET = 30.0  # seconds between lines where the output is no terminal


class Display:
    """A run's moving line; use as a context, call with each `Progress`.

    Args:
        console: Where it is shown.
        steps: Of the run.
        folder: Where samples and checkpoints lie.
    """

    def __init__(self, console: Console, steps: int, folder: RunFolder) -> None:
        self.console, self.folder = console, folder
        self.steps_here = 0  # done by this process
        self._losses: dict[str, float] = {}
        self._checked: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._told = time.monotonic()
        text = TextColumn("[progress.description]{task.description}")
        self.bar = Bar(
            text, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.row = self.bar.add_task("training", total=steps, facts="")

    def __enter__(self) -> Display:
        """Starts to show."""
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the last state on the screen."""
        self.bar.stop()

    def __call__(self, now: Progress) -> None:
        """Shows a step, and what happened at it."""
        if self.steps_here == 0 and now.step > 1:
            self.say(f"going on after step {now.step - 1}, from {self.folder.checkpoints}")
        self.steps_here += 1
        self._losses[now.task] = now.mean_loss
        facts = self._facts(now)
        self.bar.update(self.row, completed=now.step, facts=facts)
        self._events(now)
        if not self.console.is_terminal and time.monotonic() - self._told > _QUIET:
            self.say(f"step {now.step} of {now.steps}: {facts}")

    def say(self, line: str, style: str = "") -> None:
        """Prints a line above the moving one."""
        self._told = time.monotonic()
        self.console.print(line, style=style or None, markup=False, highlight=False)

    def _facts(self, now: Progress) -> str:
        shown = [f"loss {_mean(self._losses):.4f}"]
        if now.validation is not None:
            self._checked[now.task] = now.validation
        if self._checked:
            shown.append(f"validation {_mean(self._checked):.4f}")
        if now.rate:
            shown.append(f"{now.rate:.1f} it/s" if now.rate >= 1 else f"{1 / now.rate:.1f} s/it")
        if math.isfinite(now.seconds_left):
            shown.append(f"{duration(now.seconds_left)} left")
        if now.memory:
            shown.append(size_of(now.memory))
        return ", ".join(shown)

    def _events(self, now: Progress) -> None:
        at = f"step {now.step}" + (f", {now.task}" if len(self._losses) > 1 else "")
        if now.validation is not None:
            best = now.validation < self._best.get(now.task, math.inf)
            if best:
                self._best[now.task] = now.validation
            said = f"validation loss {now.validation:.4f}{' (best so far)' if best else ''}"
            if now.validation_other is not None:
                said += f", {now.validation_other:.4f} with another picture's control"
                said += f"; training loss by noise {by_noise(now.bands)}"
            self.say(f"{at}: {said}")
        if now.samples:
            self.say(f"{at}: samples in {self.folder.samples}")
        if now.saved:
            self.say(f"{at}: checkpoint saved")
        for line in now.advice:
            self.say(f"{at}: {line}", "yellow")


class Encoding:
    """A moving line while pictures are encoded; call it with (done, all)."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Shows how many there are so far."""
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                console=self.console, transient=True, disable=not self.console.is_terminal,
            )  # fmt: skip
            self._bar.start()
            self._bar.add_task(f"encoding {self.what}", total=total)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Takes the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / max(1, len(values))
