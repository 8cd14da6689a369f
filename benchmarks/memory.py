"""How much memory a call takes and keeps, and how many operators it runs: exact, so never timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from diffscaler_core.evaluation.memory import Bytes, allocated

__all__ = ["Bytes", "allocated", "operators"]


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
