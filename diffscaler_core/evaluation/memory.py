"""How much memory a call takes and keeps: exact, so never timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MEASURED = "measured"


class Bytes(NamedTuple):
    """What torch's allocator gave out during a call.

    Attributes:
        peak: The most above what was held before.
        kept: What is held more after it; negative if it is less.
    """

    peak: int
    kept: int


def allocated(
    call: Callable[[], object], device: str, before: Callable[[], object] = lambda: None
) -> Bytes:
    """Returns the bytes of tensors that a call takes at its peak, and keeps.

    Args:
        call: What is measured.
        device: "cpu" or "cuda".
        before: Called first. On a CPU only what it allocates is seen to be freed by the call.
    """
    if device == "cuda":
        before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - start
        return Bytes(peak, torch.cuda.memory_allocated() - start)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before()
        with record_function(_MEASURED):
            call()
    events: list[Any] = profiler.profiler.kineto_results.events()
    (start,) = [e.start_ns() for e in events if e.name() == _MEASURED]
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in (event for event in memory if event[0] >= start):
        held += size
        peak = max(peak, held)
    return Bytes(peak, held)
