"""Schedules in diffusers: where in sampling a call of the denoiser is, read off its scheduler.

No callback and no hook on the scheduler: what it holds when the denoiser is called says enough.
Percents are those of ComfyUI, so a schedule means the same in both hosts:

- flow matching: 1 − t, t the time before it was shifted, σ = α t / (1 + (α − 1) t), where α is the
  scheduler's `shift`, or e^μ of a shift that depends on the size that is drawn;
- noise or v prediction on discrete times 0 … N − 1: 1 − timestep / (N − 1);
- continuous noise levels (EDM): linear in log σ, from the highest to the lowest.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .affiner import PARTS
from .errors import DiffScalerError
from .pipeline_call import Call, given_by_name
from .schedule import Schedule


def percent_of(call: Call, pipe: Any) -> float:
    """Returns the percent of sampling time, 0..1, at which a call of the denoiser is made.

    Args:
        call: The call.
        pipe: The pipeline whose scheduler counts the steps, or None.

    Raises:
        DiffScalerError: No scheduler, or one whose time nobody knows.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise DiffScalerError(
            f"a task has a schedule, but no pipeline with a scheduler shows where in sampling this "
            f"call of {type(call.model).__name__} is: call it in one, or set no schedule"
        )
    mu = call.running.get("mu") if scheduler.config.get("use_dynamic_shifting") else None
    known = _known.get(scheduler)
    if known is None or known.timesteps is not scheduler.timesteps or known.mu != mu:
        # once per sampling, as the numbers may lie on a GPU
        known = _Percents(scheduler.timesteps, mu, _percents(scheduler, mu))
        _known[scheduler] = known
    return known.percents[min(call.index(scheduler), len(known.percents) - 1)]


class _Percents(NamedTuple):
    """The percents of all steps of one sampling, and what they were computed from."""

    timesteps: Any
    mu: Any
    percents: list[float]


_known: weakref.WeakKeyDictionary[Any, _Percents] = weakref.WeakKeyDictionary()


def _percents(scheduler: Any, mu: Any) -> list[float]:
    """Returns the percent of each of a scheduler's timesteps."""
    config = scheduler.config
    times = [float(time) for time in _listed(scheduler.timesteps)]
    sigmas = [float(sigma) for sigma in _listed(getattr(scheduler, "sigmas", ()))]
    if len(sigmas) not in (len(times), len(times) + 1):  # the last is where sampling ends
        sigmas = []
    discrete = hasattr(scheduler, "alphas_cumprod")
    counted = discrete and config.get("timestep_type", "discrete") == "discrete"
    lowest, highest = config.get("sigma_min"), config.get("sigma_max")
    if sigmas and (config.get("use_flow_sigmas") or (not discrete and highest is None)):
        alpha = _shift(scheduler, mu)
        sigmas = [1 - s for s in sigmas] if config.get("invert_sigmas") else sigmas
        found = [1 - sigma / (alpha - (alpha - 1) * sigma) for sigma in sigmas]
    elif sigmas and lowest and highest and not counted:
        span = math.log(highest / lowest)
        found = [math.log(highest / max(sigma, lowest)) / span for sigma in sigmas]
    elif counted:
        found = [1 - time / (config["num_train_timesteps"] - 1) for time in times]
    else:
        raise DiffScalerError(
            f"cannot tell where in sampling a {type(scheduler).__name__} is, so no schedule can "
            f"run with it; use a flow-matching, DDIM-, DPM- or EDM-like one, or no schedule"
        )
    return [min(max(percent, 0.0), 1.0) for percent in found[: len(times)]]


def _shift(scheduler: Any, mu: Any) -> float:
    """Returns α, which a flow-matching scheduler shifts its time by."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        if hasattr(type(scheduler), "shift"):  # set since the config was, perhaps
            return float(scheduler.shift)
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    if mu is None:
        raise DiffScalerError(
            f"this {type(scheduler).__name__} shifts its time by the size that is drawn, which "
            f"only a running diffusers pipeline shows: schedules need one, or a scheduler with "
            f"use_dynamic_shifting=False"
        )
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _listed(numbers: Any) -> list[Any]:
    return numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)


def schedules_of(names: Sequence[str], given: Any) -> dict[str, Schedule]:
    """Returns the schedule of each task that a user gave one.

    Args:
        names: The tasks that are chosen.
        given: None; one for all: a Schedule, text, points, or {part: points}; one for each task or
            None, in a list; or {name: schedule}.

    Raises:
        UnknownNameError: A schedule for a task that is not chosen.
        DiffScalerError: Another number of schedules than tasks, or something that is none.
    """
    parts = isinstance(given, Mapping) and set(given) <= set(PARTS) and not set(given) & set(names)
    points = isinstance(given, list | tuple) and _is_points(given)
    found = given_by_name(names, given, "schedules", "none", is_one=parts or points)
    return {name: Schedule.of(own) for name, own in found.items()}


def _is_points(given: Sequence[Any]) -> bool:
    """Says whether these are points rather than schedules."""
    return bool(given) and all(
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and all(isinstance(number, int | float) for number in entry)
        for entry in given
    )
