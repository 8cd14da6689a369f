"""Predicts what 10,000 tasks and 1,000 requests a second need, from one replica's measurements.

    python benchmarks/capacity.py    # reads benchmarks/serving_measured.json; 2 cores, some minutes

Fits the time of a batch to the measured batches, checks the simulation of `capacity_model.py`
against every measured block, then asks it how many replicas keep the promised p95. Prints the
tables of docs/scale.md and draws docs/images/scale.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from capacity_model import Installation, Outcome, Service, fit, simulate
from serving_load import Block, poisson

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
TASKS, RATE = 10_000, 1_000.0
SKEWS = (0.9, 1.1)
#: The promise: 95 % of the pictures within this many times a full mixed batch.
PROMISE = 3.0
#: The promise must hold under this much of the load, so that a busy minute does not break it.
HEADROOM = 1.1
#: Not measured: one data-centre GPU, a model of 0.7 B parameters, 20 steps. Put your own here.
ASSUMED = Service(fixed=0.8, per_row=0.1, per_task=0.002, load=0.02, overhead=0.02)
ASSUMED_BYTES = 14_000_000
POLICIES = {
    "mixed, spread": (True, False),
    "mixed, affinity": (True, True),
    "one task, spread": (False, False),
    "one task, affinity": (False, True),
}


class Need(NamedTuple):
    """The smallest number of replicas that keep the promise, and how they fare at RATE."""

    replicas: int
    outcome: Outcome


def zipf(skew: float, tasks: int = TASKS) -> np.ndarray:
    """Returns the probability of each task, proportional to its place to the power of -skew."""
    weights = np.arange(1, tasks + 1, dtype=float) ** -skew
    return weights / weights.sum()


def run(installation: Installation, skew: float, rate: float = RATE) -> Outcome:
    """Simulates 6 full batches of warm-up and 18 that count."""
    full = installation.service.seconds(8, 8)
    times = poisson(rate, 24 * full, seed=1)
    end = {"seconds": 24 * full, "warm": 6 * full, "patient": 2 * PROMISE}
    return simulate(installation, zipf(skew), times, **end, seed=2)


def need(installation: Installation, skew: float) -> Need | None:
    """Searches the number of replicas, to 3 %; the given one does not matter. None: none found."""
    service = installation.service
    promise = PROMISE * service.seconds(8, 8)

    def enough(replicas: int) -> bool:
        busier = run(replace(installation, replicas=replicas), skew, HEADROOM * RATE)
        return busier.percentile(95) <= promise

    low = int(RATE * service.seconds(installation.rows, 1) / installation.rows * 0.9)
    most = int(3 * RATE * service.seconds(1, 1, 1))
    high = max(low, 1)
    while not enough(high):
        if high >= most:
            return None
        low, high = high, min(int(high * 1.4) + 1, most)
    while high - low > max(1, 0.03 * high):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return Need(high, run(replace(installation, replicas=high), skew))


def check(blocks: Sequence[Block], services: dict[int, Service], stored: dict[str, Any]) -> str:
    """Returns the table of measured blocks beside the simulated ones."""
    lines = [
        "| pixels | load | batches | pictures/s: measured, simulated | p50 s | p95 s | rows |",
        "|---" * 7 + "|",
    ]
    even = np.full(stored["tasks"], 1 / stored["tasks"])
    for block in sorted(blocks, key=lambda b: (b.side, b.kind, b.load, b.mode)):
        own = Installation(
            services[block.side],
            1,
            block.mode == "mixed",
            rows=stored["rows"],
            slots=stored["tasks"],
            patience=stored["patience"],
        )
        times = sorted(block.arrivals) if block.kind == "open" else None
        runs = [
            simulate(
                own,
                even,
                times,
                clients=int(block.load),
                seconds=block.seconds,
                warm=1.0,
                seed=seed,
            )
            for seed in range(20)
        ]
        real = (block.throughput, block.percentile(50), block.percentile(95))
        told = ([r.throughput for r in runs], *([r.percentile(q) for r in runs] for q in (50, 95)))
        pairs = [f"{a:.2f}, {np.mean(b):.2f}" for a, b in zip(real, told, strict=True)]
        sizes = np.mean([batch.rows for batch in block.batches]), np.mean([r.rows for r in runs])
        load = f"{block.load:.0f} clients" if block.kind == "closed" else f"{block.load:.1f}/s"
        cells = [str(block.side), load, block.mode, *pairs, f"{sizes[0]:.1f}, {sizes[1]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plan(pool: ProcessPoolExecutor, cases: dict[str, tuple[Service, int]], slots: int) -> str:
    """Returns the table of replicas needed."""
    jobs = {}
    for case, (service, _) in cases.items():
        for skew in SKEWS:
            for policy, (mixed, affinity) in POLICIES.items():
                own = Installation(service, 1, mixed, affinity, slots=slots)
                jobs[case, skew, policy] = pool.submit(need, own, skew)
    lines = [
        "| service | Zipf | batches, routing | replicas | p95 s | bank hits | rows | busy | GB |",
        "|---" * 9 + "|",
    ]
    for (case, skew, policy), job in jobs.items():
        found = job.result()
        if found is None:
            lines.append(f"| {case} | {skew} | {policy} | none is enough | | | | | |")
            continue
        replicas, outcome = found
        memory = replicas * slots * cases[case][1] / 1e9
        lines.append(
            f"| {case} | {skew} | {policy} | **{replicas}** | {outcome.percentile(95):.2f} "
            f"| {outcome.hits:.2f} | {outcome.rows:.1f} | {outcome.busy:.2f} | {memory:.1f} |"
        )
    return "\n".join(lines)


def sensitivity(pool: ProcessPoolExecutor, base: Installation) -> str:
    """Returns the table of what changes the number of replicas, one thing at a time."""
    service = base.service
    changes: dict[str, dict[str, Any]] = {
        "as above": {},
        "bank of 16 tasks": {"slots": 16},
        "bank of 1,024 tasks": {"slots": 1024},
        "loading a task takes 10 times as long": {
            "service": replace(service, load=10 * service.load)
        },
        "each task in a batch costs 5 % of a row more": {
            "service": replace(service, per_task=service.per_task + 0.05 * service.per_row)
        },
        "batches of at most 4": {"rows": 4},
        "batches of at most 16": {"rows": 16},
        "a home is full at 1 batch": {"full": 1.0},
        "a home is full at 4 batches": {"full": 4.0},
        "only 3 others stand in for a home": {"fallbacks": 3},
    }
    jobs = {
        (what, policy): pool.submit(
            need, replace(base, mixed=mixed, affinity=affinity, **change), SKEWS[1]
        )
        for what, change in changes.items()
        for policy, (mixed, affinity) in POLICIES.items()
    }
    lines = ["| change | " + " | ".join(POLICIES) + " |", "|---" * (len(POLICIES) + 1) + "|"]
    for what in changes:
        found = [jobs[what, policy].result() for policy in POLICIES]
        counts = [str(own.replicas) if own else "none is enough" for own in found]
        lines.append(f"| {what} | " + " | ".join(counts) + " |")
    return "\n".join(lines)


def draw(pool: ProcessPoolExecutor, base: Installation, path: Path) -> None:
    """Draws p95 over replicas, hits over the bank's size, and what mixing saves."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.3))
    colours = dict(zip(POLICIES, ("#1f77b4", "#17408b", "#ff7f0e", "#b34700"), strict=True))
    service = base.service
    least = RATE * service.seconds(8, 6) / 8
    counts = [int(least * x) for x in np.geomspace(0.9, 6, 10)]
    for policy, (mixed, affinity) in POLICIES.items():
        own = [replace(base, replicas=n, mixed=mixed, affinity=affinity) for n in counts]
        tails = [o.percentile(95) for o in pool.map(run, own, [SKEWS[1]] * len(own))]
        left.plot(counts, tails, "o-", label=policy, color=colours[policy], markersize=3)
    left.axhline(PROMISE * service.seconds(8, 8), color="grey", linestyle=":", label="promised")
    left.set(xlabel="replicas", ylabel="p95, seconds", yscale="log", ylim=(1, 40))
    left.set_yticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
    left.set_title(f"1,000 requests/s, 10,000 tasks, Zipf {SKEWS[1]}, GPU assumed")
    sizes = [16, 32, 64, 128, 256, 512, 1024]
    for skew, style in zip(SKEWS, ("--", "-"), strict=True):
        for policy in ("mixed, spread", "mixed, affinity"):
            enough = int(1.5 * least)
            own = [
                replace(base, replicas=enough, affinity=POLICIES[policy][1], slots=n) for n in sizes
            ]
            hits = [o.hits for o in pool.map(run, own, [skew] * len(own))]
            label = f"{policy.split(', ')[1]}, Zipf {skew}"
            middle.plot(sizes, hits, f"o{style}", label=label, color=colours[policy], markersize=3)
    middle.set(xlabel="tasks a replica keeps loaded", ylabel="bank hits", xscale="log", ylim=(0, 1))
    middle.set_xticks(sizes, list(map(str, sizes)))
    middle.set_title(f"{enough} replicas")
    shares = [0.1, 0.5, 2, 10]
    for routing, affinity in (("spread", False), ("affinity", True)):
        saved = []
        for share in shares:
            whole = service.seconds(8, 8)
            row = whole / (8 + share)
            own = replace(
                base, service=Service(share * row, row, load=0.02 * row), affinity=affinity
            )
            pair = pool.map(need, [replace(own, mixed=m) for m in (False, True)], [SKEWS[1]] * 2)
            one, mixed = (found.replicas if found else np.nan for found in pair)
            saved.append(one / mixed)
        right.plot(shares, saved, "o-", label=routing, color=colours[f"mixed, {routing}"])
    right.set(xlabel="a call's fixed time / a row's time", xscale="log", ylim=(0, None))
    right.set_xticks(shares, list(map(str, shares)))
    right.set_ylabel("replicas, one task per batch / mixed")
    right.set_title("what mixing saves")
    for axes in (left, middle, right):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fits, checks, predicts, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = ROOT / "benchmarks" / "serving_measured.json"
    parser.add_argument("--measured", type=Path, default=here)
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "scale.png")
    parser.add_argument("--slots", type=int, default=64, help="tasks that a replica keeps loaded")
    args = parser.parse_args()
    stored = json.loads(args.measured.read_text(encoding="utf-8"))
    blocks = [Block.of(block) for block in stored["blocks"]]
    load = float(np.median(stored["loads"]))
    services: dict[int, Service] = {}
    print("| pixels | fixed ms | per row ms | per task ms | load ms | other ms | R² | batches |")
    print("|---" * 8 + "|")
    for side in sorted({block.side for block in blocks}):
        own = [block for block in blocks if block.side == side]
        services[side], quality = fit(own, load)
        s, batches = services[side], sum(len(block.batches) for block in own)
        terms = (s.fixed, s.per_row, s.per_task, s.load, s.overhead)
        numbers = " | ".join(f"{1000 * t:.1f}" for t in terms)
        print(f"| {side} | {numbers} | {quality:.3f} | {batches} |")
    print(f"\n{check(blocks, services, stored)}\n", flush=True)
    # The noise of this shared machine stays out of the predictions.
    cases = {
        f"pocket, {side} px, measured": (replace(service, noise=()), stored["task_bytes"])
        for side, service in services.items()
    } | {"GPU, assumed": (ASSUMED, ASSUMED_BYTES)}
    base = Installation(ASSUMED, 1, slots=args.slots)
    with ProcessPoolExecutor() as pool:
        print(plan(pool, cases, args.slots), flush=True)
        print(f"\n{sensitivity(pool, base)}", flush=True)
        draw(pool, base, args.image)


if __name__ == "__main__":
    main()
