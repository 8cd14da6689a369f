"""A load generator for the serving example: closed loop for the most it can do, open for waiting.

An open loop sends at times drawn beforehand, whatever the server does, and counts a request's time
from when it was due, so that a slow server cannot hide behind a slow client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Batch:
    """One batch as the server tells it: pictures, different tasks, tasks loaded for it, seconds."""

    rows: int
    tasks: int
    misses: int
    seconds: float


@dataclass
class Block:
    """One stretch of load on one server.

    Attributes:
        mode: Which server.
        side: Pixels of the pictures' sides.
        kind: "closed" or "open".
        load: Clients (closed) or requests per second (open).
        seconds: How long requests were sent.
        arrivals: When each answered request was due, from the start.
        latencies: Seconds until each had its picture; same order.
        batches: Those that were drawn.
        overheads: Seconds of each request that were neither waiting nor drawing; same order.
        errors: Requests that got no picture.
    """

    mode: str
    side: int
    kind: str
    load: float
    seconds: float
    arrivals: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    errors: int = 0

    @property
    def throughput(self) -> float:
        """Pictures per second: what ended while requests were sent, the first second left out."""
        ends = np.array(self.arrivals) + np.array(self.latencies)
        return float(((ends > 1) & (ends <= self.seconds)).sum() / (self.seconds - 1))

    def percentile(self, q: float) -> float:
        """Returns the q-th percentile of the latencies in seconds."""
        return float(np.percentile(self.latencies, q)) if self.latencies else float("nan")

    def json(self) -> dict[str, Any]:
        """Returns the block for a file: times in whole milliseconds."""
        times = ("arrivals", "latencies", "overheads")
        whole = {name: [round(t, 3) for t in getattr(self, name)] for name in times}
        batches = [[b.rows, b.tasks, b.misses, round(b.seconds, 4)] for b in self.batches]
        return {**asdict(self), **whole, "batches": batches}

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Block:
        """Returns the block that `json` stored."""
        return cls(**{**stored, "batches": [Batch(*batch) for batch in stored["batches"]]})


async def closed(
    block: Block, url: str, clients: int, body: Callable[[int], dict[str, Any]]
) -> Block:
    """Fills a block: each client sends its next request when it has its picture."""
    start = time.perf_counter()
    numbers = iter(range(10**9))

    async def client(session: aiohttp.ClientSession) -> None:
        while (due := time.perf_counter() - start) < block.seconds:
            await _draw(session, url, body(next(numbers)), block, start, due)

    async with _session() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return _whole(block)


async def opened(
    block: Block, url: str, times: Sequence[float], body: Callable[[int], dict[str, Any]]
) -> Block:
    """Fills a block: request number i is sent at `times[i]`, whatever became of the others."""
    start = time.perf_counter()

    async def one(session: aiohttp.ClientSession, number: int, due: float) -> None:
        await asyncio.sleep(due - (time.perf_counter() - start))
        await _draw(session, url, body(number), block, start, due)

    async with _session() as session:
        await asyncio.gather(*(one(session, i, due) for i, due in enumerate(times)))
    return _whole(block)


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Returns the times of a Poisson process."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 50)
    times = np.cumsum(gaps)
    return times[times < seconds].tolist()


def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120))


async def _draw(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    block: Block,
    start: float,
    due: float,
) -> None:
    async with session.post(f"{url}/v1/pictures", json=body) as answer:
        await answer.read()
        if answer.status != 200:
            block.errors += 1
            return
        rows, tasks, misses = (int(told(answer, name)) for name in ("Rows", "Tasks", "Misses"))
        seconds, waited = float(told(answer, "Seconds")), float(told(answer, "Waited"))
        latency = time.perf_counter() - start - due
        block.arrivals.append(due)
        block.latencies.append(latency)
        block.overheads.append(latency - waited - seconds)
        block.batches.append(Batch(rows, tasks, misses, seconds))


def told(answer: aiohttp.ClientResponse, name: str) -> str:
    """Returns what the server says about a picture's batch."""
    return answer.headers[f"X-Batch-{name}"]


def _whole(block: Block) -> Block:
    """Every picture named its batch: keeps each batch once. Times are told to a microsecond."""
    block.batches = list(dict.fromkeys(block.batches))
    return block
