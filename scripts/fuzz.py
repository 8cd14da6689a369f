"""Runs one of the fuzz targets of `tests/fuzz` for long.

    fuzz.py TARGET --cases 100000 --seed 1

Each case is drawn from `seed/number` alone, so that `--case NUMBER` repeats any of them. The cases
run in a process of their own: if that dies, the case it died of is named. With `--engine atheris`
(Linux: pip install atheris) the branches that were taken decide what is tried next.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import multiprocessing
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("task_file", "info", "lora", "router", "config", "texts", "state", "nodes")
#: Kinds of failures that are printed, and how much of each.
_SHOWN, _LETTERS = 20, 400


def package() -> None:
    """Makes `tests/fuzz` importable as `fuzz`, without putting a folder before other people's."""
    place = ROOT / "tests" / "fuzz"
    spec = importlib.util.spec_from_file_location(
        "fuzz", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def target_of(name: str, base: Path) -> Any:
    """Returns a target; the nodes' needs ComfyUI, whose base directory becomes `base`."""
    module = importlib.import_module(f"fuzz.test_{name}")
    logging.disable(logging.WARNING)
    if name != "nodes":
        return module.TARGET
    sys.path.append(str(ROOT / "scripts"))
    import comfy_host
    import comfy_launch

    comfy_launch.boot(comfy_host.comfyui(), ["--cpu", *comfy_host.base_directory(base)])
    pack = comfy_launch.load_pack(base / "custom_nodes" / "diffscaler")
    return module.target(pack, base)


def work(options: argparse.Namespace, at: Any, answer: Any) -> None:
    """Runs the cases; says in `at` which one, and puts the tally into `answer`."""
    package()
    harness = importlib.import_module("fuzz.harness")
    with tempfile.TemporaryDirectory() as folder:
        place, base = Path(folder) / "case", Path(folder) / "base"
        place.mkdir(), base.mkdir()
        target = target_of(options.target, base)
        first = options.first if options.case is None else options.case
        count = options.cases if options.case is None else 1

        def on_case(case: int) -> None:
            at.value = case

        tally = harness.run_cases(
            target, place, range(first, first + count), options.seed, on_case=on_case
        )
    answer.put(vars(tally))


def guided(options: argparse.Namespace) -> None:
    """Runs the cases as atheris chooses them; it prints its own figures and ends the process."""
    import atheris

    package()
    with atheris.instrument_imports(include=["diffscaler_core"], enable_loader_override=False):
        harness = importlib.import_module("fuzz.harness")
        with tempfile.TemporaryDirectory() as base:
            target = target_of(options.target, Path(base))
    place = Path(tempfile.mkdtemp())

    def one(data: bytes) -> None:
        fault, _ = harness.run_one(target, FromBytes(data), place)
        if fault is not None:
            raise AssertionError(fault)

    flags = [f"-runs={options.cases}", f"-seed={options.seed}", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *flags, "-max_len=512", "-timeout=60"], one)
    atheris.Fuzz()


class FromBytes(random.Random):
    """A Random whose choices are somebody's bytes, then zeros."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        """Returns k bits of the bytes."""
        count = (k + 7) // 8
        own = self.data[self.at : self.at + count]
        self.at += count
        return int.from_bytes(own, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Returns a number in 0..1 of the bytes."""
        return self.getrandbits(16) / 2**16


def main() -> int:
    """Runs what the command line says; returns how many cases failed, 100 at most."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.engine == "atheris":
        guided(options)
    context = multiprocessing.get_context("spawn")
    at, answer, start = context.Value("q", -1), context.Queue(), time.time()
    worker = context.Process(target=work, args=(options, at, answer))
    worker.start()
    while worker.is_alive() and answer.empty():
        worker.join(0.2)
    if answer.empty():
        print(f"the process died ({worker.exitcode}) of case {at.value} of seed {options.seed}")
        return 1
    tally = answer.get()
    worker.join()
    figures = {
        "target": options.target,
        "seed": options.seed,
        "cases": tally["cases"],
        "accepted": tally["accepted"],
        "refused": tally["refused"],
        "kinds_of_refusal": len(tally["messages"]),
        "failures": len(tally["failures"]),
        "slowest_seconds": round(tally["slowest"][0], 3),
        "slowest_case": tally["slowest"][1],
        "python_held_mib": round(tally["held"] / 2**20, 1),
        "process_grew_mib": round(tally["grown"] / 2**20, 1),
        "minutes": round((time.time() - start) / 60, 1),
    }
    print(json.dumps(figures, indent=1))
    kinds: dict[str, int] = {}
    for case, why in tally["failures"].items():
        kind = re.sub(r"\d+|'[^']*'", "", why.partition(" on ")[0])[:80]
        kinds[kind] = kinds.get(kind, 0) + 1
        if kinds[kind] == 1 and len(kinds) <= _SHOWN:
            print(f"case {case}: {why[:_LETTERS]}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return min(len(tally["failures"]), 100)


if __name__ == "__main__":
    sys.exit(main())
