"""Writes docs/compatibility_nodes.md: tasks beside other nodes, adapters and caches.

    .venv/bin/python scripts/make_beside.py
    .venv/bin/python scripts/make_beside.py --check   says whether the page is up to date

The nodes are those of `tests/comfy/beside.py`, which are tested one by one; the rest is
`beside_table.py`. Every test that is named must exist; that it passes is the suite's part.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence

from beside_table import COMFYUI, DIFFUSERS, RIGHT, Row
from tested_pages import ROOT, items_of, main

PAGE = ROOT / "docs" / "compatibility_nodes.md"
_TEST = "tests/comfy/test_beside_other_nodes.py::"

HEAD = """<!-- Written by scripts/make_beside.py from tests/comfy/beside.py and beside_table.py. -->
# Beside other nodes and caches

What the tests hold of tasks in one chain with other things that change a model. **right**: the
picture is the formula's, written out over the model's own weights, or that of the same chain made
by hand. **refused**: one error says why, before a wrong picture is drawn. What is not in these
tables is not tested, so not claimed; it may work. The models are small, with random weights, on the
CPU.

## A rule for caches

EasyCache, FirstBlockCache, DeepCache and the like leave steps out and reuse what an
earlier one gave. They watch the latents, not the tasks. So whenever a task, its strength, its
schedule, its rows or its control changes between two steps, what the caches below have kept is
forgotten and the step is computed in full. A strength that changes at every step (a linear
schedule) leaves nothing to reuse: the picture is right, but a cache saves no time; a schedule with
`step` saves it between the changes. Caches of other packs (TeaCache, WaveSpeed) are not told:
beside those, keep strengths constant while sampling.

The same holds in Python for `attach` without a pipeline: after a change in the middle of sampling,
call `forget_steps(model)` of `diffscaler_core.plugin.caches`.
"""


def nodes() -> list[Row]:
    """Returns a row for each node of the tests' own table."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    rows = []
    for case in importlib.import_module("tests.comfy.beside").NODES:
        tests = [f"{_TEST}test_both_orders_are_the_formula[{case.name}]"]
        ours = "two tasks, before and after"
        if case.by_row:
            tests.append(f"{_TEST}test_one_task_per_latent[{case.name}]")
            ours += "; one task per latent"
        rows.append(
            Row(case.title, ours, f"{RIGHT}; {case.note}" if case.note else RIGHT, tuple(tests))
        )
    return rows


def check(rows: Iterable[Row], names: set[str]) -> None:
    """Says whether every test exists.

    Raises:
        SystemExit: One does not.
    """
    known = names | {name.partition("[")[0] for name in names}
    if lost := [test for row in rows for test in row.tests if test not in known]:
        raise SystemExit(f"make_beside: there is no test {', '.join(lost)}")


def table(rows: Sequence[Row], first: str) -> list[str]:
    """Returns a table, and what stands behind its rows."""
    lines = [f"| {first} | tested with | result |", "|---|---|---|"]
    lines += [f"| {row.title} | {row.ours} | {row.result} |" for row in rows]
    files: dict[str, dict[str, None]] = {}
    for test in (test for row in rows for test in row.tests):
        file, _, name = test.partition("::")
        files.setdefault(file, {})[name.partition("[")[0]] = None
    lines += ["", "The tests:", ""]
    return lines + [
        f"- `{file}`: {', '.join(f'`{n}`' for n in own)}" for file, own in files.items()
    ]


def page(names: set[str] | None = None) -> str:
    """Returns the page's text.

    Args:
        names: Of all tests there are; None: pytest is asked.

    Raises:
        SystemExit: A test of a row does not exist.
    """
    own = nodes()
    everything = [*own, *COMFYUI, *DIFFUSERS]
    if names is None:
        names = {item.nodeid for item in items_of(t for row in everything for t in row.tests)}
    check(everything, names)
    parts = [HEAD, "## In ComfyUI\n", *table([*own, *COMFYUI], "beside")]
    parts += ["", "## In diffusers\n", *table(DIFFUSERS, "beside")]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main(PAGE, page, str(__doc__))
