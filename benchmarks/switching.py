"""What a switch costs: of a task's strength, and from one loaded task to another.

    python benchmarks/switching.py [--sizes 0.1 0.7 2.0] [--dtype bfloat16] [--device cuda]
        [--rank 8] [--rounds 5]

SD3's architecture with random weights at three sizes (9, 17 and 24 blocks of as many heads; the
last is SD3-medium's), every Linear of every block adapted. In diffusers ours beside `set_adapters`
of the same model; in ComfyUI ours beside its LoRA loader, each up to where the sampler would call
the model. Work put off until that call counts too: a switch is the time of the change, plus that of
a call of every adapted layer right after it, less that of a usual such call. In these calls a
layer's own product is a ready answer, so that they cost what the adapters cost. Memory is what
torch's allocator gives out, in a switch at its peak and for two adapters read and attached. Ways
take turns in random order; medians count. Prints Markdown tables for RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import torch
from in_comfyui import Host
from memory import allocated, operators
from switching_ways import Way, comfyui_ways, diffusers_ways
from turns import measure, quartiles
from variants import graphs

#: Billions of parameters, roughly -> blocks, which are as many as heads of 64.
BLOCKS = {"0.1": 9, "0.7": 17, "2.0": 24}
#: Seconds that a way's switches of one kind get in a turn.
TURN = 0.3
#: Of a base's weights: what ComfyUI's LoRA loader holds while it patches, with a reserve.
MEMORY = 2.3


def time_switches(ways: Sequence[Way], rounds: int, device: str) -> None:
    """Measures every way's switches; memory and operators once each."""
    for turn in range(rounds + 1):
        for way in random.sample(list(ways), len(ways)):
            way.task(0)  # from another way's model to this one's
            way.layers()
            for kind, switches in way.changes().items():
                if not turn:
                    count(way, kind, switches, device)
                    continue
                left = TURN
                while left > 0:  # once, if it is slow
                    change = measure(next(switches), device)
                    first, again = measure(way.layers, device), measure(way.layers, device)
                    way.seconds.setdefault(kind, []).append(change + first)
                    way.ordinary.append(again)
                    left -= change + first + again


def count(way: Way, kind: str, switches: Iterator[Callable[[], object]], device: str) -> None:
    """Notes what a switch takes besides time."""

    def switch() -> None:
        next(switches)()
        way.layers()

    way.peak[kind] = allocated(switch, device, before=switch).peak
    next(switches)()
    way.more[kind] = operators(way.model) - operators(way.model)


def recompiles(ways: Sequence[Way]) -> dict[str, int]:
    """Returns the graphs that 20 switches make in compiled models, strength and task in turn."""
    made = {}
    for way in ways:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        call = torch.compile(way.model, backend="eager")
        way.task(0)
        call()
        before = graphs()
        changes = way.changes()
        for i in range(20):
            next(changes["task" if i % 2 else "strength"])()
            call()
        made[way.name] = graphs() - before
    torch._dynamo.reset()
    return made


def rows(size: str, ways: Sequence[Way]) -> str:
    """Returns the lines of one size's table."""
    lines = []
    for way in ways:
        cells = []
        for kind in ("strength", "task"):
            usual = statistics.median(way.ordinary)
            low, median, high = quartiles([seconds - usual for seconds in way.seconds[kind]])
            cells.append(f"{1000 * median:.2f} ({1000 * low:.2f}–{1000 * high:.2f})")
        more = max(way.more.values())
        mebibytes = (max(way.peak.values()), way.held, way.adapter)
        sizes = " | ".join(f"{value / 2**20:.1f}" for value in mebibytes)
        lines.append(f"| {size} | {way.name} | {' | '.join(cells)} | {more} | {sizes} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    need = MEMORY * max(float(size) for size in args.sizes) * dtype.itemsize
    if args.device == "cpu" and psutil.virtual_memory().available < need * 1e9:
        raise SystemExit(f"this needs {need:.0f} GB of free memory; smaller: --dtype bfloat16")
    host = Host(Path(tempfile.mkdtemp(prefix="diffscaler-")), args.device)
    compiled: dict[str, int] = {}
    print(
        "\n| parameters | way | strength, ms (quartiles) | task, ms (quartiles) | operators "
        "more in the next call | switch, peak MiB | held by two, MiB | one adapter, MiB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for size in args.sizes:
        ways, given, count = diffusers_ways(BLOCKS[size], args.rank, args.device, dtype)
        time_switches(ways, args.rounds, args.device)
        print(rows(f"{count / 1e9:.2f} B", ways), flush=True)
        compiled = compiled or recompiles(ways)
        ways.clear()
        gc.collect()
        ways = comfyui_ways(host, BLOCKS[size], given, args.device, dtype)
        time_switches(ways, args.rounds, args.device)
        print(rows(f"{count / 1e9:.2f} B", ways), flush=True)
        ways.clear()
        sys.modules["comfy.model_management"].unload_all_models()
        gc.collect()
    for name, made in compiled.items():
        print(f"\n{name}: {made} recompiles over 20 switches", end="")
    print()


if __name__ == "__main__":
    main()
