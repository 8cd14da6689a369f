"""Soaks a real ComfyUI server in random workflows, and checks every answer.

    soak.py --prompts 2000 --seed 1 --clients 2 --report soak.json

A pool of graphs is drawn from the seed. A server runs each of them once, alone, with nothing loaded
before it: these are the right answers. A second server then gets the same graphs over and over from
several clients at once, who also interrupt, take prompts out of the queue, unload models and drop
their websockets; every answer must be the first server's. The memory of the server's process and
the weights of its bases are looked at meanwhile. The report is written as it goes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from comfy_host import running_server
from soak_client import Answers, Client, difference
from soak_graphs import KINDS, Recipe, draw
from soak_models import write_files

#: The largest difference from the reference, as a share of the largest value.
CLOSE = 1e-5
#: Share of the prompts after which memory is looked at.
WARM = 0.1
#: What a client does for its next prompt, and how often.
MANNERS = {"plain": 76, "interrupt": 10, "delete": 4, "free": 6, "drop": 4}
_EVERY = 50


@dataclass
class Soak:
    """The state of one soak: what is to do, what is right, what was found.

    Attributes:
        pool: The graphs.
        right: Their answers.
        prompts: How many prompts to send.
        seed: Of the graphs and of the clients' manners.
        until: When to stop all the same, in `time.monotonic` seconds.
    """

    pool: list[Recipe]
    right: list[Answers]
    prompts: int
    seed: int
    until: float
    report: Path | None = None
    sent: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    uneven: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    memory: list[tuple[int, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def next(self) -> int:
        """Counts one more prompt; returns its number, which no other has."""
        self.sent += 1
        return self.sent

    @property
    def typical(self) -> float:
        """Seconds from sending a prompt to its end, about, with two clients."""
        return 2 * (time.monotonic() - self.started) / max(1, self.sent)

    @property
    def over(self) -> bool:
        """Whether enough was sent, or the time is up."""
        return self.sent >= self.prompts or time.monotonic() > self.until

    def judge(self, at: int, ended: tuple[str, Answers], after: str) -> None:
        """Compares one prompt's answers with the right ones."""
        how, found = ended
        recipe, right = self.pool[at], self.right[at]
        self.tally[how] += 1
        self.kinds[recipe.kind] += 1
        if how == "interrupted":
            return
        if found.keys() != right.keys():
            self.fault(at, f"{how}: {found.get('error', sorted(found))}", after)
            return
        apart = [difference(found[name], right[name]) for name in right]
        self.worst = max(self.worst, *apart)
        self.tally["answers"] += len(apart)
        self.tally["identical"] += sum(d == 0 for d in apart)
        self.uneven[f"graph {at} ({recipe.kind})"] += any(apart)
        for name, gap in zip(right, apart, strict=True):
            if gap > CLOSE:
                self.fault(
                    at, f"{name} is {gap:.2g} from the reference {_short(found[name])}", after
                )

    def fault(self, at: int, what: str, after: str = "") -> None:
        """Notes that something was wrong."""
        number, kind = self.sent, self.pool[at].kind
        self.faults.append(
            f"prompt {number}, graph {at} ({kind}){after and ' after ' + after}: {what}"
        )
        print("WRONG", self.faults[-1], flush=True)

    def figures(self) -> dict[str, Any]:
        """Returns what goes into the report."""
        return {
            "seed": self.seed,
            "prompts": self.sent,
            "graphs": len(self.pool),
            "seconds": round(time.monotonic() - self.started, 1),
            "endings": dict(self.tally),
            "kinds": dict(self.kinds),
            "not_identical": dict(+self.uneven),
            "worst_difference": self.worst,
            "wrong": len(self.faults),
            "faults": self.faults[:100],
            **self.facts,
            **memory_figures(self.memory, self.prompts),
            "memory_mib": [(n, round(m, 1)) for n, m in self.memory],
        }

    def write(self) -> None:
        """Writes the report, whole or not at all."""
        if self.report is not None:
            scratch = self.report.with_suffix(".part")
            scratch.write_text(json.dumps(self.figures(), indent=1) + "\n")
            os.replace(scratch, self.report)


def _short(answer: Any) -> str:
    return f": {answer[:300]!r}" if isinstance(answer, str) else ""


def memory_figures(memory: list[tuple[int, float]], prompts: int) -> dict[str, float]:
    """Returns memory after warm-up and at the end, and the slope of a line through it.

    Args:
        memory: Prompts sent and MiB held, as they went.
        prompts: How many there were to be; a tenth is warm-up.
    """
    last = memory[-1][0] if memory else 0
    warm = [(n, mib) for n, mib in memory if n >= WARM * min(prompts, last)]
    if len(warm) < 4:
        return {}
    at, held = np.array(warm).T
    fifth = max(1, len(held) // 5)
    return {
        "warm_mib": round(float(np.median(held[:fifth])), 1),
        "end_mib": round(float(np.median(held[-fifth:])), 1),
        "most_mib": round(float(held.max()), 1),
        "slope_mib_per_1000": round(float(np.polyfit(at, held, 1)[0]) * 1000, 2),
    }


async def reference(
    url: str, output: Path, pool: list[Recipe], name: str
) -> tuple[list[Answers], list[str]]:
    """Runs every graph once, alone, on a server that holds nothing.

    Returns:
        The answers, and what is wrong with them by the graphs' own account.
    """
    right, faults = [], []
    async with Client(url, output, name) as client:
        for number, recipe in enumerate(pool):
            await client.post("/free", {"unload_models": True, "free_memory": True})
            how, found = await client.finish(await client.send(recipe, 10**7 + number))
            wrong = own_faults(recipe, how, found)
            if wrong:
                faults.append(f"graph {number} ({recipe.kind}) by itself: {wrong}")
                print("WRONG", faults[-1], flush=True)
            right.append(found)
            if number % 25 == 24:
                print(f"reference: {number + 1} of {len(pool)}", flush=True)
    return right, faults


def own_faults(recipe: Recipe, how: str, found: Answers) -> str:
    """Returns what is wrong with a graph's answers by its own account; empty: nothing."""
    if recipe.error:
        text = str(found.get("error", how))
        return (
            "" if re.search(recipe.error, text, re.DOTALL) else f"not refused as it should: {text}"
        )
    if how != "success":
        return str(found.get("error", how))
    gaps = [(a, b, difference(found[a], found[b]), most) for a, b, most in recipe.same]
    return "; ".join(f"{a} is {gap:.2g} from {b}" for a, b, gap, most in gaps if gap > most)


async def use(client: Client, soak: Soak, rng: random.Random) -> None:
    """One client's share of the soak."""
    bases = [i for i, recipe in enumerate(soak.pool) if recipe.kind == "base"]
    while not soak.over:
        at = rng.randrange(len(soak.pool))
        manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        soak.tally[f"manner {manner}"] += 1
        if manner == "interrupt":
            await interrupt(client, soak, rng, at, rng.choice(bases))
            continue
        if manner == "delete":
            await delete(client, soak, rng, at)
            continue
        fresh = soak.next()
        same = 10**6 + at if rng.random() < 0.1 else fresh  # ComfyUI may answer out of its cache
        sent = await client.send(soak.pool[at], same)
        if manner == "free":
            flags = rng.choice(({"unload_models": True}, {"free_memory": True}))
            await client.post("/free", flags)
        if manner == "drop":
            await asyncio.sleep(rng.uniform(0, 0.5))
            await client.disconnect()
            await asyncio.sleep(rng.uniform(0, 0.5))
            client.connect()
        soak.judge(at, await client.finish(sent), manner)


async def interrupt(client: Client, soak: Soak, rng: random.Random, at: int, base: int) -> None:
    """Interrupts a prompt at a random moment; the base right after it must be the base."""
    sent = await client.send(soak.pool[at], soak.next())
    await asyncio.sleep(rng.uniform(0, soak.typical))
    whom = {"prompt_id": sent.prompt} if sent.prompt and rng.random() < 0.7 else {}
    await client.post("/interrupt", whom)
    probe = await client.send(soak.pool[base], soak.next(), front=True)
    soak.judge(at, await client.finish(sent), "interrupt")
    soak.judge(base, await client.finish(probe), "an interrupt")


async def delete(client: Client, soak: Soak, rng: random.Random, at: int) -> None:
    """Queues two prompts and takes the second back; if it was still waiting, it never runs."""
    other = rng.randrange(len(soak.pool))
    first = await client.send(soak.pool[at], soak.next())
    second = await client.send(soak.pool[other], soak.next())
    if second.prompt:
        await client.post("/queue", {"delete": [second.prompt]})
    soak.judge(at, await client.finish(first), "delete")
    if not second.prompt or not await client.is_gone(second):
        soak.judge(other, await client.finish(second), "delete")
        return
    soak.tally["deleted"] += 1
    if (client.output / second.folder).exists():
        soak.fault(other, "it ran although it was taken out of the queue")


async def watch(process: psutil.Process, soak: Soak) -> None:
    """Notes the memory of the server's process as prompts go by, and writes the report."""
    noted = -10
    while True:
        if soak.sent - noted >= 5:
            noted = soak.sent
            soak.memory.append((noted, process.memory_info().rss / 2**20))
            if noted // _EVERY != (soak.memory[-2][0] if len(soak.memory) > 1 else -1) // _EVERY:
                soak.write()
                rate = noted / (time.monotonic() - soak.started)
                held, wrong = soak.memory[-1][1], len(soak.faults)
                print(f"{noted} prompts, {rate:.2f}/s, {held:.0f} MiB, {wrong} wrong", flush=True)
        await asyncio.sleep(0.2)


async def soaked(url: str, output: Path, soak: Soak, clients: int) -> None:
    """Runs all clients until they are done, then looks at the bases once more."""
    soak.started = time.monotonic()
    watching = asyncio.create_task(watch(server_process(url), soak))
    crowd = [Client(url, output, f"client{i}") for i in range(clients)]
    for client in crowd:
        await client.__aenter__()
    try:
        await asyncio.gather(
            *(
                use(client, soak, random.Random(f"{soak.seed}/client{i}"))
                for i, client in enumerate(crowd)
            )
        )
        soak.facts["last"] = await last_looks(crowd[0], soak)
    finally:
        watching.cancel()
        for client in crowd:
            await client.__aexit__()


async def last_looks(client: Client, soak: Soak) -> dict[str, Any]:
    """Runs every base graph and every hash of the weights once more; returns what came of it."""
    before = len(soak.faults)
    looked = [i for i, recipe in enumerate(soak.pool) if recipe.kind in ("base", "weights")]
    for at in looked:
        sent = await client.send(soak.pool[at], soak.next())
        soak.judge(at, await client.finish(sent), "all")
    hashes = sorted(
        {str(v)[:16] for i in looked for v in soak.right[i].values() if isinstance(v, str)}
    )
    return {"looked": len(looked), "wrong": len(soak.faults) - before, "weights": hashes}


@contextlib.contextmanager
def server(base: Path, models: Path) -> Iterator[tuple[str, Path]]:
    """Runs a server with files of `write_files`; gives its address and its output folder."""
    shutil.copytree(models, base / "models")
    with running_server(base) as running:
        yield running.url, base / "output"


def server_process(url: str) -> psutil.Process:
    """Returns the process of the server, a child of this one."""
    port = url.rpartition(":")[2]
    for process in psutil.Process().children(recursive=True):
        if port in process.cmdline():
            return process
    raise SystemExit(f"no server of ours listens on {port}")


def main() -> int:
    """Runs what the command line says; returns 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--graphs", type=int, help="different graphs; default: a 20th of prompts")
    parser.add_argument(
        "--fresh", type=int, default=0, help="graphs also run on servers of their own"
    )
    parser.add_argument("--minutes", type=float, default=600, help="stop sending after as many")
    parser.add_argument("--report", type=Path, help="a JSON file, written as it goes")
    options = parser.parse_args()
    graphs = options.graphs or max(len(KINDS), options.prompts // 20)
    pool = [draw(options.seed, number) for number in range(graphs)]
    with tempfile.TemporaryDirectory(prefix="soak") as scratch:
        soak = run(Path(scratch), pool, options)
    figures = soak.figures()
    print(json.dumps({k: v for k, v in figures.items() if k != "memory_mib"}, indent=1))
    return int(bool(soak.faults))


def run(scratch: Path, pool: list[Recipe], options: argparse.Namespace) -> Soak:
    """Makes the right answers, then soaks a server; returns what was found."""
    begun = time.monotonic()
    models = write_files(scratch / "models")
    with server(scratch / "alone", models) as (url, output):
        right, faults = asyncio.run(reference(url, output, pool, "alone"))
    fresh = 0
    for at in random.Random(options.seed).sample(range(len(pool)), options.fresh):
        with server(scratch / f"fresh{at}", models) as (url, output):
            (found,), _ = asyncio.run(reference(url, output, [pool[at]], "fresh"))
        fresh += all(difference(found[name], right[at][name]) == 0 for name in right[at])
    until = begun + 60 * options.minutes
    soak = Soak(pool, right, options.prompts, options.seed, until, options.report)
    soak.faults += faults
    soak.facts = {"clients": options.clients, "fresh": options.fresh, "fresh_identical": fresh}
    with server(scratch / "soaked", models) as (url, output):
        try:
            asyncio.run(soaked(url, output, soak, options.clients))
        finally:
            soak.write()
    return soak


if __name__ == "__main__":
    raise SystemExit(main())
