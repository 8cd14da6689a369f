"""Ctrl-C and SIGTERM between two steps, never within one: half an optimiser step is no state."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopRequest:
    """Whether the run was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True once a signal came."""
        return self.signal is not None

    def pass_on(self) -> None:
        """Ends the process as the signal asked, now that the state is saved.

        Raises:
            SystemExit: After SIGTERM, with the exit status a shell gives for it.
        """
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # asked twice: now
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def stop_requests(enabled: bool = True) -> Iterator[StopRequest]:
    """Collects signals while the context lasts; a second one interrupts at once.

    Only where nobody else handles them: signals with a handler of their own stay with it, and
    outside the main thread (as in ComfyUI) nothing is touched.
    """
    request = StopRequest()
    usual: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    ours = [number for number, handler in usual.items() if signal.getsignal(number) == handler]
    if not enabled or threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, request._note)
    try:
        yield request
    finally:
        for number in ours:
            signal.signal(number, usual[number])
