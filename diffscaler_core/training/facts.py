"""What a run says of itself in a task file, and whether a checkpoint is of the same run."""

from __future__ import annotations

import contextlib
import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import DiffScalerError
from ..file_names import harmless
from ..version import __version__
from .config import TrainingConfig
from .learner import Learner

logger = logging.getLogger(__name__)

#: Settings that a run cannot change half-way.
_FIXED = (
    *("method", "activation", "gamma_blocks", "rank", "rank_budget", "targets", "exclude"),
    *("experts", "time_route", "route_alpha", "route_beta"),
    *("optimizer", "ema"),
    *("repa", "repa_block", "repa_width", "debias_groups"),
    *("at_resolution", "control", "control_rank", "control_activation", "control_embedding"),
)


def versions() -> dict[str, str]:
    """Returns the versions of the libraries a run depends on."""
    found = {"diffscaler": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def check_same_run(
    facts: Mapping[str, Any], config: TrainingConfig, learners: Sequence[Learner], folder: Path
) -> None:
    """Makes sure that a checkpoint's run can go on as this one; says what has changed.

    Raises:
        DiffScalerError: It trained other parameters, or other tasks.
    """
    before, now = facts["config"], plain_settings(config)
    fixed = [key for key in _FIXED if before.get(key, now[key]) != now[key]]
    changed = [f"{key} {before.get(key)}, now {now[key]}" for key in fixed]
    names = [learner.name for learner in learners]
    if sorted(facts["tasks"]) != sorted(names):
        changed.append(f"tasks {sorted(facts['tasks'])}, now {sorted(names)}")
    if changed:
        raise DiffScalerError(
            f"{str(folder)!r} holds checkpoints of another run ({'; '.join(changed)}); "
            f"give another folder, or start anew there with resume 'never'"
        )
    other = [k for k in now if k in before and before[k] != now[k] and k != "steps"]
    if other:
        told = ", ".join(f"{key} {before[key]}, now {now[key]}" for key in other)
        logger.warning("going on with other settings than before: %s", told)
    for learner in learners:
        images = facts["tasks"][learner.name]["images"]
        if images != len(learner.run.data):
            logger.warning(
                "task %r had %d pictures before, now %d",
                learner.name,
                images,
                len(learner.run.data),
            )


def plain_settings(config: TrainingConfig) -> dict[str, Any]:
    """Returns the settings as JSON would give them back."""
    settings = asdict(config)
    return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in settings.items()}


def training_facts(learner: Learner, step: int, seconds: float) -> dict[str, Any]:
    """Returns settings that differ from the defaults, a few always, and what came of them."""
    settings, default = plain_settings(learner.config), plain_settings(TrainingConfig())
    elsewhere = ("name", "method", "rank")  # the task says these itself
    always = ("steps", "batch", "lr", "lr_scale_shift", "seed")
    kept = {
        key: value
        for key, value in settings.items()
        if key in always or (key not in elsewhere and value != default[key])
    }
    if "repa" in kept:  # an encoder may be a file of this machine
        kept["repa"] = harmless(Path(kept["repa"]).name)
    history, chosen = learner.history, learner.run.ranks
    facts = {
        **kept,
        "seed": learner.seed,
        "steps_done": step,
        "images": len(learner.run.data),
        "objective": learner.objective.kind,
        "loss": None if math.isnan(history.mean_loss) else round(history.mean_loss, 5),
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    if history.validations:
        best = dict(history.validations)[history.best_step]
        facts |= {
            "validation_loss": round(history.validations[-1][1], 5),
            "best_validation_loss": round(best, 5),
            "best_step": history.best_step,
        }
    if chosen is not None:
        facts["rank_choice"] = {
            "budget": chosen.budget,
            "spent": chosen.spent,
            "energy": round(chosen.kept, 3),
            "confirmed": round(chosen.confirmed, 3),
        }
    if history.others:
        facts["validation_loss_other_control"] = round(history.others[-1][1], 5)
    bands = [None if math.isnan(band) else round(band, 5) for band in history.bands]
    if learner.config.control and any(bands):
        facts["loss_by_noise"] = bands
    return facts
