"""How fast docs/examples/serve_ray.py serves 16 tasks: mixed batches against one task per batch.

    python benchmarks/serving_throughput.py  # 2 CPU cores, under 3 minutes

One Ray, two applications that differ in one flag, one replica of the pocket base each, on one core.
They take turns (a resting one uses nothing), with the same requests at the same times. First a
closed loop, as many clients as keep the queue full; then an open loop, Poisson arrivals at shares
of the most that the mixed server can do. Two sizes, because what a batch saves depends on how well
one row alone fills the processor: at 128 pixels it nearly does, at 64 (a quarter of the tokens) a
call's fixed cost prevails, as with a small batch on a GPU. Prints Markdown; everything measured
goes to --out, from which `capacity.py` predicts larger installations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is Ray's: the load would come before it

import numpy as np
from serving_load import Batch, Block, closed, opened, poisson

from diffscaler_core import load_task, save_task, scale_task

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES, POCKET = ROOT / "docs" / "examples", ROOT / "assets" / "pocket"
TASKS, ROWS, STEPS = 16, 8, 8
SIDES = (64, 128)
STYLES = ("ink", "neon", "fruits", "smileys")
MODES = {"mixed": (), "one task per batch": ("--one-task-per-batch",)}
WORDS = ("cat", "dog", "fox", "bear", "house", "rocket", "car", "fish")


def make_tasks(folder: Path, count: int) -> list[str]:
    """Writes `count` different tasks, each a shipped one at a strength of its own."""
    shipped = [load_task(POCKET / "diffscaler" / f"{name}.safetensors") for name in STYLES]
    names = [f"task{i:02d}" for i in range(count)]
    for i, name in enumerate(names):
        task = scale_task(shipped[i % len(shipped)], 0.5 + i / count)
        save_task(task, folder / f"{name}.safetensors")
    return names


@contextmanager
def running(tasks: Path, port: int) -> Iterator[dict[str, str]]:
    """Starts the servers; gives mode -> address."""
    sys.path.insert(0, str(EXAMPLES))
    import ray
    import serve_ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    there = {"env_vars": {"PYTHONPATH": str(EXAMPLES)}}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=serve_ray.OBJECT_STORE,
        log_to_driver=False,
        logging_level="error",
        runtime_env=there,
    )
    try:
        serve.start(http_options=HTTPOptions(port=port), logging_config={"log_level": "ERROR"})
        addresses = {}
        for mode, flags in MODES.items():
            given = [f"--tasks={tasks}", f"--rows={ROWS}", "--most-waiting=10000", *flags]
            path = f"/{'_'.join(mode.split())}"
            app = serve_ray.application(serve_ray.arguments(given))
            serve.run(app, name=mode, route_prefix=path)
            addresses[mode] = f"http://127.0.0.1:{port}{path}"
        yield addresses
    finally:
        serve.shutdown()
        ray.shutdown()


def loading(folder: Path, names: list[str]) -> tuple[list[float], int]:
    """Returns the seconds to load a task beside 15 others, one long unused making room; its bytes.

    Its file is in memory already.
    """
    sys.path.insert(0, str(EXAMPLES))
    from serving.painter import Painter

    size = max(load_task(folder / f"{name}.safetensors").nbytes for name in names)
    tasks = Painter(POCKET, folder, device_bytes=TASKS * 2 * size).tasks  # loaded in 32 bits
    times = []
    for name in names:
        tasks.prefetch([name])  # as the server does, beside the batch under way
        start = time.perf_counter()
        tasks.hold([name])
        times.append(time.perf_counter() - start)
    return times[TASKS:], tasks.device_bytes // len(tasks.loaded)


def body_of(names: list[str], popularity: np.ndarray, side: int, seed: int = 1) -> Any:
    """Returns what request number i asks for: the same for every server."""
    chosen = np.random.default_rng(seed).choice(len(names), 100_000, p=popularity)

    def body(i: int) -> dict[str, Any]:
        size = {"width": side, "height": side}
        word = WORDS[i % len(WORDS)]
        return {"prompt": word, "task": names[chosen[i]], "seed": i, "steps": STEPS, **size}

    return body


async def measure(addresses: dict[str, str], names: list[str], args: Any) -> list[Block]:
    """Runs all blocks; the servers take turns in random order."""
    popularity = np.arange(1, len(names) + 1) ** -args.zipf
    popularity /= popularity.sum()
    blocks: list[Block] = []

    def turns() -> list[str]:
        return random.sample(list(addresses), len(addresses))

    for side in args.sides:
        body = body_of(names, popularity, side)
        for mode in turns():  # loads the tasks, wakes everything up
            await closed(Block(mode, side, "closed", 16, 3), addresses[mode], 16, body)
        begun = len(blocks)
        for mode in turns() * args.rounds:
            block = Block(mode, side, "closed", args.clients, args.seconds)
            blocks.append(await closed(block, addresses[mode], args.clients, body))
        most = float(np.mean([b.throughput for b in blocks[begun:] if b.mode == "mixed"]))
        for share in args.shares:
            times = poisson(share * most, 2 * args.seconds, seed=int(100 * share))
            sent = len(times) / (2 * args.seconds)
            for mode in turns():
                block = Block(mode, side, "open", sent, 2 * args.seconds)
                blocks.append(await opened(block, addresses[mode], times, body))
    return blocks


def report(blocks: list[Block], loads: list[float]) -> str:
    """Returns the Markdown."""
    lines = [
        "| pixels | load | batches | pictures/s | p50 s | p95 s | rows a batch | tasks a batch |",
        "|---" * 8 + "|",
    ]
    groups: dict[tuple[int, str, float], dict[str, list[Block]]] = {}
    for block in blocks:
        modes = groups.setdefault((block.side, block.kind, block.load), {})
        modes.setdefault(block.mode, []).append(block)
    for (side, kind, load), modes in groups.items():
        what = f"{load:.0f} clients" if kind == "closed" else f"{load:.1f}/s"
        for mode in MODES:
            latencies = np.concatenate([block.latencies for block in modes[mode]])
            batches = [batch for block in modes[mode] for batch in block.batches]
            lines.append(
                f"| {side} | {what} | {mode} | {np.mean([b.throughput for b in modes[mode]]):.2f} "
                f"| {np.percentile(latencies, 50):.2f} | {np.percentile(latencies, 95):.2f} "
                f"| {mean(batches, 'rows'):.1f} | {mean(batches, 'tasks'):.1f} |"
            )
    lines += ["", "| batches with … rows | " + " | ".join(map(str, range(1, ROWS + 1))) + " |"]
    lines += ["|---" * (ROWS + 1) + "|"]
    for mode in MODES:
        sizes = Counter(b.rows for block in blocks if block.mode == mode for b in block.batches)
        lines.append(f"| {mode} | " + " | ".join(str(sizes[n]) for n in range(1, ROWS + 1)) + " |")
    lines += ["", f"Loading a task beside {TASKS - 1} others: {np.median(loads) * 1000:.0f} ms."]
    if errors := sum(block.errors for block in blocks):
        lines.append(f"**{errors} requests got no picture.**")
    return "\n".join(lines)


def mean(batches: list[Batch], what: str) -> float:
    """Returns a mean over batches."""
    return float(np.mean([getattr(batch, what) for batch in batches]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of the pictures")
    parser.add_argument("--seconds", type=float, default=5, help="of a closed block; open: twice")
    parser.add_argument("--rounds", type=int, default=1, help="of closed blocks")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument(
        "--zipf", type=float, default=0.0, help="popularity of task i: i^-s; 0: even"
    )
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "serving_measured.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = make_tasks(folder, TASKS + 8)
        loads, task_bytes = loading(folder, names)
        with running(folder, args.port) as addresses:
            blocks = asyncio.run(measure(addresses, names[:TASKS], args))
    stored = {
        "rows": ROWS,
        "tasks": TASKS,
        "patience": 0.02,
        "task_bytes": task_bytes,
        "loads": [round(seconds, 4) for seconds in loads],
        "blocks": [block.json() for block in blocks],
    }
    args.out.write_text(json.dumps(stored, separators=(",", ":")) + "\n", encoding="utf-8")
    print(report(blocks, loads))


if __name__ == "__main__":
    main()
