"""Where in sampling a noise level lies, on the scale of ComfyUI's `start_percent`."""

from __future__ import annotations

import weakref
from typing import Any

#: Halvings of 0..1; the digits kept are those that a sigma in float32 can tell apart.
_HALVINGS, _DIGITS = 26, 6
#: Noise levels remembered per model sampling.
_KEPT = 4096

_known: weakref.WeakKeyDictionary[Any, dict[float, float]] = weakref.WeakKeyDictionary()


def percent_at(model_sampling: Any, sigma: float) -> float:
    """Returns the percent of sampling time in 0..1 that a noise level is at.

    The inverse of ComfyUI's `percent_to_sigma`, whose sigma never rises with the percent, whatever
    the kind of model (flow with a shift, flux, discrete, v, EDM). The same for every sampler and
    scheduler, however many steps.

    Args:
        model_sampling: A `BaseModel`'s, which has `percent_to_sigma`.
        sigma: The noise level.
    """
    known = _known.setdefault(model_sampling, {})
    if sigma not in known:
        if len(known) >= _KEPT:
            known.clear()
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if float(model_sampling.percent_to_sigma(middle)) > sigma:
                low = middle
            else:
                high = middle
        known[sigma] = round(high, _DIGITS)
    return known[sigma]
