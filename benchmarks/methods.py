"""Every method on every set: the small-scale twin of the papers' tables.

    python benchmarks/method_bases.py dit            # the two bases first, half an hour each
    python benchmarks/method_bases.py unet
    python benchmarks/methods.py tune                # learning rates, for every row alike
    python benchmarks/methods.py run                 # methods × sets × seeds
    python benchmarks/methods.py ablate              # parts × rank × activation × base size
    python benchmarks/methods.py incremental         # tasks one after another: what is forgotten
    python benchmarks/methods.py report              # tables and pictures, from what is there

Each cell is kept in .cache/methods as soon as it is done, so a run can be stopped, continued, and
split: `--part 0/2` and `--part 1/2` share the work between two processes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from method_incremental import incremental
from method_report import report
from method_runs import cell
from method_sets import SETS
from method_table import ABLATION, ABLATION_SETS, METHODS, RATES, ROWS, TUNED_ON

SEEDS = (0, 1, 2)
BASES = ("dit", "unet")


def rate_of(base: str, key: str) -> float:
    """Returns the rate of RATES with the best mean validation loss over TUNED_ON.

    The row's own are tried first, then neighbours of the best, until both sides of it are worse.
    """
    row = ROWS[key]

    def loss(rate: float) -> float:
        # relative to the base's own, or the harder set would decide alone
        return fmean(
            cell(base, key, name, rate, 0, scored=False)["validation"]
            / cell(base, "base", name, 0, 0, scored=False)["validation"]
            for name in TUNED_ON
        )

    tried = {rate: loss(rate) for rate in row.rates}
    while True:
        best = min(tried, key=tried.__getitem__)
        at = RATES.index(best)
        further = [rate for rate in RATES[max(0, at - 1) : at + 2] if rate not in tried]
        if not further:
            return best
        tried |= {rate: loss(rate) for rate in further}


def tuned(bases: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yields (base, method) of every row."""
    for base, key in itertools.product(bases, METHODS):
        if base in METHODS[key].bases:
            yield base, key


def cells(bases: tuple[str, ...]) -> Iterator[tuple[str, str, str, int]]:
    """Yields (base, method, set, seed), what matters most first."""
    for base, seed in itertools.product(bases, SEEDS):
        for key, name in itertools.product(["base", *METHODS], SETS):
            row = METHODS.get(key)
            if row is None or (base in row.bases and seed < row.seeds_on(base)):
                yield base, key, name, seed


def ablation() -> Iterator[tuple[str, str, str, float]]:
    """Yields (base, row, set, rate) of the ablation; the table takes the better of a row's rates.

    Long runs keep the rate that their row was tuned to.
    """
    for base, key, name in itertools.product(
        ("dit", "dit_small"), ["base", *ABLATION], ABLATION_SETS
    ):
        if key == "base":
            yield base, key, name, 0.0
        elif key.startswith("long_"):
            if (base, name) == ("dit", ABLATION_SETS[0]):
                yield base, key, name, rate_of(base, key.removeprefix("long_"))
        elif base in ABLATION[key].bases:
            yield from ((base, key, name, rate) for rate in ABLATION[key].rates)


def said(done: dict[str, Any], began: float) -> None:
    """Prints a line about a cell."""
    shown = {k: f"{v:.4g}" for k, v in done.items() if isinstance(v, float)}
    print(done["base"], done["method"], done["set"], done["seed"], shown, end=" ")
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("tune", "run", "ablate", "incremental", "report"))
    parser.add_argument("--bases", nargs="+", default=BASES)
    parser.add_argument("--part", default="0/1", help="which part of the work, as in 0/2")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    index, count = map(int, args.part.split("/"))
    bases = tuple(args.bases)
    if args.what == "report":
        report()
    elif args.what == "tune":
        for base, key in itertools.islice(tuned(bases), index, None, count):
            print(base, key, rate_of(base, key), flush=True)
    elif args.what == "run":
        for base, key, name, seed in itertools.islice(cells(bases), index, None, count):
            began = time.perf_counter()
            rate = 0.0 if key == "base" else rate_of(base, key)
            said(cell(base, key, name, rate, seed), began)
    elif args.what == "ablate":
        for base, key, name, rate in itertools.islice(ablation(), index, None, count):
            began = time.perf_counter()
            said(cell(base, key, name, rate, seed=0), began)
    else:
        for base in bases:
            incremental(base, rate_of(base, "ours_wide"), rate_of(base, "full"))


if __name__ == "__main__":
    main()
