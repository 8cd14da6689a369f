"""Dynamic batches: whoever waits when the model becomes free rides in the next batch.

A batch is put together only when it can start. A queue that closes batches by the clock (as Ray
Serve's own `@serve.batch` does since a batch may run beside another) fills its queue with small
batches while a long one runs; a diffusion batch takes seconds, so that almost all would be small.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R")
A = TypeVar("A")


def next_batch(waiting: Sequence[R], key: Callable[[R], Hashable], most: int) -> list[R]:
    """Returns the oldest request and, in order of arrival, those that may share its batch.

    The oldest always goes, so nobody starves, however rare its settings are.

    Args:
        waiting: Requests, the oldest first.
        key: Requests with equal keys may share a batch.
        most: The largest batch.
    """
    own = [request for request in waiting if key(request) == key(waiting[0])]
    return own[:most]


@dataclass(eq=False)
class Waiting(Generic[R, A]):
    """A request in the queue."""

    request: R
    answer: asyncio.Future[tuple[A, float]]
    since: float = field(default_factory=time.perf_counter)


class Batcher(Generic[R, A]):
    """Gathers requests into batches and runs these one after another in one thread of their own.

    Must be made and used inside one event loop.
    """

    def __init__(
        self,
        run: Callable[[list[R]], Sequence[A | Exception]],
        key: Callable[[R], Hashable],
        most: int,
        patience: float,
    ) -> None:
        """Starts waiting for requests.

        Args:
            run: Gives one answer or error per request of a batch.
            key: Requests with equal keys may share a batch.
            most: The largest batch.
            patience: Seconds a free model waits for its batch to fill, from the arrival of the
                oldest request on.
        """
        self._run = run
        self._key = key
        self._most = most
        self._patience = patience
        self._waiting: list[Waiting[R, A]] = []
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def submit(self, request: R) -> tuple[A, float]:
        """Returns the request's answer and how many seconds it waited for its batch to begin.

        Raises:
            Exception: What `run` gave, or raised, for this request.
        """
        waiting: Waiting[R, A] = Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrival.set()
        return await waiting.answer

    async def close(self) -> None:
        """Stops; requests still waiting are cancelled."""
        self._task.cancel()
        for waiting in self._waiting:
            waiting.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            batch = await self._gather()
            began = time.perf_counter()
            requests = [waiting.request for waiting in batch]
            loop = asyncio.get_running_loop()
            try:
                answers = await loop.run_in_executor(self._thread, self._run, requests)
            except Exception as error:
                answers = [error] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():  # the client went away while its picture was made
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result((answer, began - waiting.since))

    async def _gather(self) -> list[Waiting[R, A]]:
        """Waits for a batch that is full, or whose oldest request has waited long enough."""
        while True:
            self._waiting = [waiting for waiting in self._waiting if not waiting.answer.done()]
            left = None
            if self._waiting:
                batch = next_batch(self._waiting, lambda w: self._key(w.request), self._most)
                left = self._waiting[0].since + self._patience - time.perf_counter()
                if left <= 0 or len(batch) == self._most:
                    taken = set(map(id, batch))
                    self._waiting = [w for w in self._waiting if id(w) not in taken]
                    return batch
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except asyncio.TimeoutError:  # in Python 3.10 not the built-in one
                continue
