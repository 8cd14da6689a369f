"""Sending a run's numbers to TensorBoard, Weights & Biases, …: accelerate's trackers do it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DiffScalerError
from ..progress import BANDS, Progress

logger = logging.getLogger(__name__)
_EVERY = 10  # steps between values; a service is slower than a disk


class Tracker:
    """One accelerate tracker, fed with `Progress`; a service that fails never ends a run.

    Args:
        tracker: An `accelerate.tracking.GeneralTracker` that is started.
    """

    def __init__(self, tracker: Any) -> None:
        self.tracker, self._warned = tracker, False

    def log(self, now: Progress) -> None:
        """Sends a step's numbers; every tenth step's, and all that hold a validation."""
        due = now.step % _EVERY == 0 or now.step in (1, now.steps)
        if due or now.validation is not None:
            self._try(lambda: self.tracker.log(numbers(now), step=now.step))
        if now.samples:
            self._try(lambda: self._samples(now))

    def close(self) -> None:
        """Ends the run there."""
        self._try(self.tracker.finish)

    def _samples(self, now: Progress) -> None:
        from ..preview import to_image

        if self.tracker.name not in ("tensorboard", "wandb"):
            return  # the others take pictures in ways of their own
        import numpy as np

        pictures = [np.asarray(to_image(p).convert("RGB")) for p in now.samples or ()]
        name = f"{now.task}/samples" if now.task else "samples"
        if self.tracker.name == "tensorboard":
            values = {name: np.stack(pictures)}
            self.tracker.log_images(values, step=now.step, dataformats="NHWC")
        else:
            self.tracker.log_images({name: pictures}, step=now.step)

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # anything a service can do wrong
            if not self._warned:
                logger.warning("tracker %s: %s; training goes on", self.tracker.name, error)
            self._warned = True


def check_tracker(name: str) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        DiffScalerError: With what to install.
    """
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError:
        raise DiffScalerError("log_with needs accelerate; run: pip install accelerate") from None
    if name not in LOGGER_TYPE_TO_CLASS:
        raise DiffScalerError(f"this version of accelerate knows no tracker {name!r}; update it")
    if name not in {str(getattr(one, "value", one)) for one in get_available_trackers()}:
        raise DiffScalerError(f"log_with {name!r} is not installed; run: pip install {name}")


def start_tracker(name: str, run: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    """Returns a tracker of that kind, started, with the run's settings noted.

    Args:
        name: A tracker of accelerate's.
        run: The run's name there.
        folder: Where a tracker that writes files puts them.
        settings: The run's settings.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        folder.mkdir(parents=True, exist_ok=True)
        made = kind(run, logging_dir=str(folder))
    else:
        made = kind(run)
    if hasattr(made, "start"):  # accelerate before 1.8 starts a tracker as it is made
        made.start()
    tracker = Tracker(made)
    plain = {
        k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()
    }
    tracker._try(lambda: made.store_init_configuration(plain))
    return tracker


def numbers(now: Progress) -> dict[str, float]:
    """Returns a step's finite numbers under the names they have in a tracker."""
    before = f"{now.task}/" if now.task else ""
    values = {
        "loss": now.loss,
        "loss_mean": now.mean_loss,
        "learning_rate": now.learning_rate,
        "steps_per_second": now.rate,
        "memory_gib": now.memory / 2**30,
        "validation_loss": math.nan if now.validation is None else now.validation,
        "validation_loss_other_control": (
            math.nan if now.validation_other is None else now.validation_other
        ),
    }
    for i, band in enumerate(now.bands):
        values[f"loss_noise_{100 * BANDS[i]:.0f}_{100 * BANDS[i + 1]:.0f}"] = band
    return {before + name: value for name, value in values.items() if math.isfinite(value)}
