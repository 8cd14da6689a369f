"""A model of the serving example at any size: what a batch takes, and a simulation of the queues.

The simulation follows single requests through single events, on a heap. simpy was weighed: well
kept, but its resources know no batch that forms while the server is busy, so that most of this file
would be the same, on generators. Batches are formed by the server's own `next_batch`.
"""

from __future__ import annotations

import heapq
import math
import sys
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from serving_load import Block

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs" / "examples"))
from serving.batching import next_batch


@dataclass(frozen=True)
class Service:
    """Seconds of one batch: fixed + per_row · rows + per_task · tasks + load · misses.

    Attributes:
        fixed: Of a call, whatever its batch.
        per_row: Of each picture.
        per_task: Of each different task in the batch.
        load: Of each task that is not on the replica and must be loaded first.
        overhead: Of a request outside its batch: HTTP, routing, PNG.
        noise: Measured over predicted times, to be drawn from; empty: none.
    """

    fixed: float
    per_row: float
    per_task: float = 0.0
    load: float = 0.0
    overhead: float = 0.0
    noise: tuple[float, ...] = ()

    def seconds(self, rows: int, tasks: int, misses: int = 0) -> float:
        """Returns a batch's time."""
        return self.fixed + self.per_row * rows + self.per_task * tasks + self.load * misses


def fit(blocks: Sequence[Block], load: float) -> tuple[Service, float]:
    """Returns the service time that measured batches follow, and R² of the fit.

    Least squares over the medians of all batches with the same rows and tasks, weighted by their
    number, because a shared machine's slow moments are no property of a batch. A coefficient that
    would be negative is left out.
    """
    cells: dict[tuple[int, int], list[float]] = {}
    for block in blocks:
        for batch in block.batches:
            if not batch.misses:
                cells.setdefault((batch.rows, batch.tasks), []).append(batch.seconds)
    shape = np.array([(1, rows, tasks) for rows, tasks in cells], float)
    seconds = np.array([np.median(times) for times in cells.values()])
    weights = np.sqrt([len(times) for times in cells.values()])
    used = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(
            shape[:, used] * weights[:, None], seconds * weights, rcond=None
        )
        if (found >= 0).all():
            break
        used.remove(used[int(np.argmin(found))])
    terms = np.zeros(3)
    terms[used] = found
    fixed, per_row, per_task = map(float, terms)
    rest = (seconds - shape @ terms) * weights
    total = (seconds - np.average(seconds, weights=weights**2)) * weights
    bare = Service(fixed, per_row, per_task)
    ratios = [t / bare.seconds(*cell) for cell, times in cells.items() for t in times]
    overhead = float(np.median([t for block in blocks for t in block.overheads]))
    service = Service(fixed, per_row, per_task, load, max(overhead, 0.0), tuple(ratios))
    return service, 1 - float(rest @ rest / (total @ total))


@dataclass(frozen=True)
class Installation:
    """A number of replicas and how they are used.

    Attributes:
        service: What a batch takes on one of them.
        replicas: How many.
        mixed: Whether a batch may hold several tasks.
        affinity: True: a task goes to its home on a hash ring, and on to the next ones where that
            is full; False: to the less busy of two at random, Ray Serve's default.
        rows: The largest batch.
        slots: Tasks that a replica keeps loaded.
        patience: Seconds a free replica waits for its batch to fill.
        full: Requests at which a home passes on what comes, in batches.
        fallbacks: How many other replicas may stand in for a home; as many as there are.
    """

    service: Service
    replicas: int
    mixed: bool = True
    affinity: bool = False
    rows: int = 8
    slots: int = 64
    patience: float = 0.02
    full: float = 2.0
    fallbacks: int = 10**9


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation, its warm-up left out.

    Attributes:
        latencies: Seconds of each request, in order of arrival.
        throughput: Pictures per second.
        hits: Share of the tasks asked of the replicas that were loaded.
        rows: Pictures in a batch, on average.
        busy: Share of the replicas' time spent on batches.
    """

    latencies: np.ndarray
    throughput: float
    hits: float
    rows: float
    busy: float

    def percentile(self, q: float) -> float:
        """Returns the q-th percentile of the latencies in seconds."""
        known = len(self.latencies) and np.isfinite(self.latencies).all()
        return float(np.percentile(self.latencies, q)) if known else math.inf


class Request(NamedTuple):
    """One request: its number, when it came to its replica, its task."""

    number: int
    since: float
    task: int


@dataclass
class Replica:
    """One replica: its queue and its bank."""

    waiting: list[Request] = field(default_factory=list)
    bank: OrderedDict[int, None] = field(default_factory=OrderedDict)
    free: bool = True
    ongoing: int = 0

    def use(self, task: int, slots: int) -> int:
        """Touches a task; returns 1 if it had to be loaded."""
        missed = task not in self.bank
        self.bank[task] = None
        self.bank.move_to_end(task)
        if len(self.bank) > slots:
            self.bank.popitem(last=False)
        return int(missed)


def simulate(
    installation: Installation,
    popularity: np.ndarray,
    arrivals: Sequence[float] | None = None,
    *,
    clients: int = 0,
    seconds: float = 60.0,
    warm: float = 0.0,
    patient: float = math.inf,
    seed: int = 0,
) -> Outcome:
    """Runs an installation under load.

    Args:
        installation: What serves.
        popularity: Probability of each task.
        arrivals: Times of the requests (open loop), or
        clients: how many send their next request on the last one's answer (closed loop).
        seconds: When a closed loop ends, and up to when throughput counts.
        warm: Requests before this do not count.
        patient: Batches of unanswered requests per replica at which it is hopeless: latencies are
            then infinite.
        seed: Of tasks, routing and noise.
    """
    return _Simulation(installation, popularity, seed).run(
        arrivals, clients, seconds, warm, patient
    )


class _Simulation:
    def __init__(self, installation: Installation, popularity: np.ndarray, seed: int) -> None:
        self.own = installation
        self.random = np.random.default_rng(seed)
        self.steps = np.cumsum(popularity)
        self.replicas = [Replica() for _ in range(installation.replicas)]
        self.route = self._by_home(len(popularity)) if installation.affinity else self._by_two
        self.events: list[tuple[float, int, Callable[..., None], tuple]] = []  # type: ignore[type-arg]
        self.order = count()
        self.number = count()
        self.sent: list[float] = []
        self.done: dict[int, float] = {}
        self.batches: list[tuple[float, int, int, int, float]] = []  # start, rows, tasks, misses, s
        self.clients_until = 0.0
        self._prefill()

    def run(
        self,
        arrivals: Sequence[float] | None,
        clients: int,
        seconds: float,
        warm: float,
        patient: float,
    ) -> Outcome:
        if arrivals is None:
            self.clients_until = seconds
            arrivals = [0.0] * clients
        for time in arrivals:
            self._at(time, self._arrive)
        most = patient * self.own.rows * self.own.replicas
        while self.events:
            if len(self.sent) - len(self.done) > most:
                return Outcome(np.array([np.inf]), 0.0, 0.0, 0.0, 1.0)
            time, _, act, args = heapq.heappop(self.events)
            act(time, *args)
        counted = [i for i, time in enumerate(self.sent) if time >= warm and i in self.done]
        latencies = np.array([self.done[i] - self.sent[i] for i in counted])
        ends = np.array(list(self.done.values()))
        batches = [b for b in self.batches if warm <= b[0] <= seconds]
        rows, tasks, misses = (sum(batch[i] for batch in batches) for i in range(1, 4))
        busy = sum(
            max(min(start + long, seconds) - max(start, warm), 0.0)
            for start, *_, long in self.batches
        )
        return Outcome(
            latencies,
            float(((ends > warm) & (ends <= seconds)).sum() / (seconds - warm)),
            1 - misses / max(tasks, 1),
            rows / max(len(batches), 1),
            busy / (seconds - warm) / self.own.replicas,
        )

    def _at(self, time: float, act: Callable[..., None], *args: object) -> None:
        heapq.heappush(self.events, (time, next(self.order), act, args))

    def _arrive(self, time: float) -> None:
        self.sent.append(time)
        task = bisect_left(self.steps, self.random.random() * self.steps[-1])
        replica = self.route(task)
        replica.ongoing += 1
        replica.waiting.append(Request(next(self.number), time, task))
        self._start(time, replica)

    def _start(self, time: float, replica: Replica) -> None:
        """Begins a batch if the replica is free, and full or out of patience, as the server."""
        if not replica.free or not replica.waiting:
            return
        own = self.own
        batch = next_batch(replica.waiting, _anything if own.mixed else _same_task, own.rows)
        begins = replica.waiting[0].since + own.patience
        if len(batch) < own.rows and time < begins:
            self._at(begins, self._start, replica)
            return
        taken = {request.number for request in batch}
        replica.waiting = [r for r in replica.waiting if r.number not in taken]
        tasks = {request.task for request in batch}
        misses = sum(replica.use(task, own.slots) for task in tasks)
        seconds = own.service.seconds(len(batch), len(tasks), misses)
        if own.service.noise:
            seconds *= own.service.noise[self.random.integers(len(own.service.noise))]
        replica.free = False
        self.batches.append((time, len(batch), len(tasks), misses, seconds))
        self._at(time + seconds, self._end, replica, batch)

    def _end(self, time: float, replica: Replica, batch: list[Request]) -> None:
        replica.free = True
        replica.ongoing -= len(batch)
        answered = time + self.own.service.overhead
        for request in batch:
            self.done[request.number] = answered
            if answered < self.clients_until:
                self._at(answered, self._arrive)
        self._start(time, replica)

    def _by_two(self, _: int) -> Replica:
        """The less busy of two at random."""
        first, second = (self.replicas[i] for i in self.random.integers(len(self.replicas), size=2))
        return first if first.ongoing <= second.ongoing else second

    def _by_home(self, tasks: int) -> Callable[[int], Replica]:
        """Consistent hashing: 100 places per replica on a ring; the next replicas stand in."""
        own = self.own
        places = self.random.random(100 * own.replicas)
        owners = (np.argsort(places) // 100).tolist()
        starts = np.searchsorted(np.sort(places), self.random.random(tasks)).tolist()
        walks: dict[int, Iterator[int]] = {}
        found: dict[int, list[Replica]] = {}

        def walk(task: int) -> Iterator[int]:
            """Replicas in the order in which the ring names them, each once."""
            seen = set()
            for step in range(len(owners)):
                owner = owners[(starts[task] + step) % len(owners)]
                if owner not in seen:
                    seen.add(owner)
                    yield owner

        def route(task: int) -> Replica:
            homes = found.setdefault(task, [])
            for i in range(min(own.fallbacks + 1, own.replicas)):
                if i == len(homes):
                    walks.setdefault(task, walk(task))
                    homes.append(self.replicas[next(walks[task])])
                if homes[i].ongoing < own.full * own.rows:
                    return homes[i]
            return min(homes, key=lambda replica: replica.ongoing)

        return route

    def _prefill(self) -> None:
        """Fills the banks as long service would have: with the tasks used last.

        Where a task is asked for at rate p, the time since its last use is exponential, mean 1/p.
        """
        popularity = np.diff(self.steps, prepend=0.0)
        ages = self.random.exponential(1 / popularity)
        if self.own.affinity:
            homes: dict[int, list[int]] = {}
            for task in np.argsort(ages).tolist():
                homes.setdefault(id(self.route(task)), []).append(task)
        for replica in self.replicas:
            if self.own.affinity:
                latest = homes.get(id(replica), [])[: self.own.slots]
            else:
                ages = self.random.exponential(1 / popularity)
                latest = np.argsort(ages)[: self.own.slots].tolist()
            replica.bank = OrderedDict.fromkeys(reversed(latest))


def _anything(_: Request) -> int:
    return 0


def _same_task(request: Request) -> int:
    return request.task
