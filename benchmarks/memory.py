"""How much memory a call takes and keeps, and how many operators it runs: exact, so never timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class Bytes(NamedTuple):
    """What torch's allocator gave out during a call.

    Attributes:
        peak: The most above what was held before.
        kept: What is held more after it; negative if it is less.
    """

    peak: int
    kept: int


def allocated(call: Callable[[], object], device: str) -> Bytes:
    """Returns the bytes of tensors that a call takes at its peak, and keeps."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Bytes(peak, torch.cuda.memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: list[Any] = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in memory:
        held += size
        peak = max(peak, held)
    return Bytes(peak, held)


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> int:
    """Returns how many of torch's operators a call runs."""
    with _Counter() as counter:
        call()
    return counter.count
