"""How fast a run goes and how much memory it holds."""

from __future__ import annotations

import math
import sys
import time
from collections import deque

import torch


class Pace:
    """Steps per second over the last 50 steps; what is not a step (a validation) does not count.

    Attributes:
        seconds: Time spent on steps, of earlier parts of a resumed run too.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._recent: deque[float] = deque(maxlen=50)
        self._last = time.perf_counter()

    def tick(self) -> None:
        """Ends a step."""
        now = time.perf_counter()
        self._recent.append(now - self._last)
        self.seconds += now - self._last
        self._last = now

    def skip(self) -> None:
        """Leaves out the time since the last tick."""
        self._last = time.perf_counter()

    @property
    def rate(self) -> float:
        """Steps per second."""
        total = sum(self._recent)
        return len(self._recent) / total if total else 0.0

    def left(self, steps: int) -> float:
        """Returns the seconds that many steps will take, NaN if that is not known yet."""
        return steps / self.rate if self.rate else math.nan


def memory_held(device: torch.device) -> int:
    """Returns the peak of bytes held: on the device, or by the process on a CPU (0: not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
