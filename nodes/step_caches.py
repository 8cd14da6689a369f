"""Caches that reuse what an earlier step gave: ComfyUI's EasyCache and LazyCache.

They watch how much the latents change, not which tasks run. So where a task changes from one step
to the next (its strength by a schedule, a range, a conditioning with a range that routes it; its
hidden units by the noise level), the cache is made as empty as at the start of sampling: what it
would add is no longer what the model gives.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

#: Where both nodes keep their cache in `transformer_options`; each sampling has one of its own.
_HOLDER = "easycache"
#: What a cache goes on with when it is emptied: where it is allowed, and what it tells at the end.
_KEPT = (
    *("start_t", "end_t", "total_steps_skipped"),
    *("output_change_rates", "approx_output_change_rates"),
)

#: Cache -> whatever has strengths of its own -> what its strengths were last.
_last: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def follow_rows(options: Mapping[str, Any], weights: Tensor, ranges: Sequence[object] = ()) -> None:
    """Empties the cache, should a conditioning's tasks have changed since its last call.

    Args:
        options: The call's `transformer_options`.
        weights: The strengths in force, (K, 3) for all rows or (B, K, 3), on the CPU.
        ranges: Of noise that tasks are in whose hidden units act by noise level.
    """
    cache, uuids = options.get(_HOLDER), options.get("uuids")
    if cache is None or not uuids:
        return
    rows = len(weights) // len(uuids)
    for i, uuid in enumerate(uuids):
        own = weights if weights.ndim == 2 else weights[i * rows : (i + 1) * rows]
        _follow(cache, uuid, (own.tolist(), list(ranges)))


def follow_step(
    options: Mapping[str, Any], strengths: Callable[[], object], whose: Hashable = None
) -> None:
    """Empties the cache, should the tasks have changed since the last step.

    Args:
        options: The step's `transformer_options`.
        strengths: Gives whatever says which tasks run how strongly; asked if there is a cache.
        whose: Tells several who ask in one step apart.
    """
    cache = options.get(_HOLDER)
    if cache is not None:
        _follow(cache, whose, strengths())


def has_cache(options: Mapping[str, Any]) -> bool:
    """Says whether a cache is there."""
    return _HOLDER in options


def leaves_calls_out(options: Mapping[str, Any]) -> bool:
    """Says whether a cache is there that leaves out calls of the model, not parts of them."""
    return getattr(options.get(_HOLDER), "name", "") == "LazyCache"


def _follow(cache: Any, whose: Hashable, strengths: object) -> None:
    known = _last.setdefault(cache, {})
    if whose in known and known[whose] != strengths:
        _empty(cache)
    known[whose] = strengths


def _empty(cache: Any) -> None:
    # not its own reset(): that leaves a rate of change of 0, after which it skips all other steps
    fresh = vars(cache.clone())
    vars(cache).update({name: value for name, value in fresh.items() if name not in _KEPT})
    logger.debug("%s was emptied, as the strength of a task changed", cache.name)
