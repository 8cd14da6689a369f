"""Where in sampling a call of diffusers' denoiser is, and at which noise level: by its scheduler.

No callback and no hook on the scheduler: what it holds when the denoiser is called says enough.
Percents are those of ComfyUI, so a schedule means the same in both hosts:

- flow matching: 1 − t, t the time before it was shifted, σ = α t / (1 + (α − 1) t), where α is the
  scheduler's `shift`, or e^μ of a shift that depends on the size that is drawn;
- noise or v prediction on discrete times 0 … N − 1: 1 − timestep / (N − 1);
- continuous noise levels (EDM): linear in log σ, from the highest to the lowest.

Noise levels are log-SNRs λ = 2 ln(α/σ), which tasks with windows go by (`windows.py`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..affiner import PARTS
from ..errors import DiffScalerError
from ..schedule import Schedule
from .call import Call, given_by_name


def percent_of(call: Call, pipe: Any) -> float:
    """Returns the percent of sampling time, 0..1, at which a call of the denoiser is made.

    Args:
        call: The call.
        pipe: The pipeline whose scheduler counts the steps, or None.

    Raises:
        DiffScalerError: No scheduler, or one whose time nobody knows.
    """
    scheduler = _scheduler(call, pipe, "has a schedule", "set no schedule")
    mu = call.running.get("mu") if scheduler.config.get("use_dynamic_shifting") else None
    return _now(_known, call, scheduler, mu, lambda: _percents(scheduler, mu))


def log_snr_of(call: Call, pipe: Any) -> float:
    """Returns the noise level, as log-SNR, at which a call of the denoiser is made.

    Args:
        call: The call.
        pipe: The pipeline whose scheduler counts the steps, or None.

    Raises:
        DiffScalerError: No scheduler, or one whose noise nobody knows.
    """
    scheduler = _scheduler(call, pipe, "acts by noise level", "attach it and say set_time(log_snr)")
    return _now(_levels, call, scheduler, None, lambda: _log_snrs(scheduler))


def _scheduler(call: Call, pipe: Any, what: str, instead: str) -> Any:
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise DiffScalerError(
            f"a task {what}, but no pipeline with a scheduler shows where in sampling this "
            f"call of {type(call.model).__name__} is: call it in one, or {instead}"
        )
    return scheduler


class _OfSteps(NamedTuple):
    """A number for each step of one sampling, and what these were computed from."""

    timesteps: Any
    mu: Any
    numbers: list[float]


_Remembered = weakref.WeakKeyDictionary[Any, _OfSteps]
_known: _Remembered = weakref.WeakKeyDictionary()
_levels: _Remembered = weakref.WeakKeyDictionary()


def _now(
    remembered: _Remembered,
    call: Call,
    scheduler: Any,
    mu: Any,
    make: Callable[[], list[float]],
) -> float:
    """Returns the number of the step that a call is for."""
    known = remembered.get(scheduler)
    if known is None or known.timesteps is not scheduler.timesteps or known.mu != mu:
        # once per sampling, as the numbers may lie on a GPU
        remembered[scheduler] = known = _OfSteps(scheduler.timesteps, mu, make())
    return known.numbers[min(call.index(scheduler), len(known.numbers) - 1)]


def _percents(scheduler: Any, mu: Any) -> list[float]:
    """Returns the percent of each of a scheduler's timesteps."""
    config = scheduler.config
    times, sigmas = _times(scheduler)
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


def _log_snrs(scheduler: Any) -> list[float]:
    """Returns λ at each of a scheduler's timesteps."""
    config = scheduler.config
    times, sigmas = _times(scheduler)
    table = getattr(scheduler, "alphas_cumprod", None)
    is_flow = config.get("use_flow_sigmas") or (table is None and config.get("sigma_max") is None)
    if sigmas and is_flow:  # x_t = (1 − σ) x0 + σ ε
        sigmas = [1 - sigma for sigma in sigmas] if config.get("invert_sigmas") else sigmas
        return [2 * (_log(1 - sigma) - _log(sigma)) for sigma in sigmas[: len(times)]]
    if sigmas:  # x = x0 + σ ε, on whatever scale
        data = config.get("sigma_data") or 1.0
        return [2 * _log(data / sigma) if sigma else math.inf for sigma in sigmas[: len(times)]]
    if table is None:
        raise DiffScalerError(
            f"cannot tell the noise level of a {type(scheduler).__name__}, so no task that acts by "
            f"noise level can run with it; use a flow-matching, DDIM-, DPM- or EDM-like one"
        )
    kept = [float(value) for value in _listed(table)]
    found = [kept[min(max(round(time), 0), len(kept) - 1)] for time in times]
    return [_log(value) - _log(1 - value) for value in found]


def _times(scheduler: Any) -> tuple[list[float], list[float]]:
    """Returns a scheduler's timesteps, and its sigmas if it has one for each."""
    times = [float(time) for time in _listed(scheduler.timesteps)]
    sigmas = [float(sigma) for sigma in _listed(getattr(scheduler, "sigmas", ()))]
    if len(sigmas) not in (len(times), len(times) + 1):  # the last is where sampling ends
        sigmas = []
    return times, sigmas


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


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
