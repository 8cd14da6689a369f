"""Writes docs/compatibility.md from what the tests are collected for; nothing is marked by hand.

    .venv/bin/python scripts/make_compatibility.py
    .venv/bin/python scripts/make_compatibility.py --check   says whether the page is up to date

The families are those of `diffscaler_core/families.py` and `nodes/keymap_tables.py`. pytest says
for which of them each test of `compatibility_table.py` exists; that they pass is the suite's part.
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Iterable, Sequence
from typing import Any

from compatibility_table import ALIASES, COMFYUI, DIFFUSERS, KINDS, TITLES, Column, Kind
from tested_pages import ROOT, items_of, main

PAGE = ROOT / "docs" / "compatibility.md"
YES, REFUSED, UNTESTED = "✓", "no", "·"

#: `file::function` -> what its parameters are called, one set per test.
Collected = dict[str, list[set[str]]]

HEAD = f"""<!-- Written by scripts/make_compatibility.py from scripts/compatibility_table.py. -->
# Compatibility

What the tests hold, per architecture. **{YES}**: a test of this very architecture runs in every run
of the suite. **{REFUSED}**: refused with one line that says why, by a test. **{UNTESTED}**: not
tested, so not claimed; it may work.

Models in the tests are the hosts' own classes with random weights: small, or at full size without
weights where a column says so, and on the CPU. Only the pocket base (a trained SD3) draws real
pictures. **No published weights and no GPU take part in any test.**
"""
AFTER_DIFFUSERS = """
HiDream's experts cannot be told apart by row: where rows differ, their layers are left out.
"""
AFTER_COMFYUI = """
Architectures that only diffusers has (DiT, Sana, unconditional U-Nets) are not in this table.
"""


def tests_of_the_table() -> list[str]:
    """Returns every test that the table names, `file::function`."""
    columns = [test for c in (*DIFFUSERS, *COMFYUI) for test in (*c.tests, c.refused) if test]
    return list(dict.fromkeys([*columns, *(t for k in KINDS for t in (*k.diffusers, *k.comfyui))]))


def named(items: Iterable[Any]) -> Collected:
    """Returns what pytest's items are called.

    Raises:
        SystemExit: A test of the table skips some of its families, so its name proves nothing.
    """
    found: Collected = {}
    wanted = set(tests_of_the_table())
    for item in items:
        test = f"{item.path.relative_to(ROOT).as_posix()}::{item.originalname}"
        if test not in wanted:
            continue
        if "pytest.skip(" in inspect.getsource(item.function):
            raise SystemExit(f"make_compatibility: {test} may skip: it cannot stand behind a mark")
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        found.setdefault(test, []).append({p for p in params if isinstance(p, str)})
    return found


def rows() -> dict[str, str]:
    """Returns the table's rows: name -> title, each family of the core, then ComfyUI's own."""
    from diffscaler_core.families import FAMILIES, family_of

    tiny = runpy.run_path(str(ROOT / "tests/diffusers/tiny_models.py"))["TINY"]
    found = {name: TITLES.get(name) or family_of(tiny[name][0].__name__).title for name in tiny}
    covered = {tiny[name][0].__name__ for name in tiny}
    lost = {c for family in FAMILIES.values() for c in family.classes} - covered
    tables = runpy.run_path(str(ROOT / "nodes" / "keymap_tables.py"))["ARCHITECTURES"]
    for architecture in tables:
        if architecture.diffusers not in covered:
            found[architecture.diffusers] = TITLES[architecture.diffusers]
    if lost:
        raise SystemExit(f"make_compatibility: no tiny model of {', '.join(sorted(lost))}")
    return found


def row_names(row: str) -> set[str]:
    """Returns everything that tests call a row."""
    full_size = runpy.run_path(str(ROOT / "tests/comfy/full_size.py"))["FULL_SIZE"]
    tiny = runpy.run_path(str(ROOT / "tests/diffusers/tiny_models.py"))["TINY"]
    kind = tiny[row][0].__name__ if row in tiny else row
    names = {row} | {alias for alias, known in ALIASES.items() if known == row}
    for name, (own, config, _) in full_size.items():
        large = kind == "UNet2DConditionModel" and (row == "sdxl") != (
            "addition_embed_type" in config
        )
        if own == kind and not large:
            names.add(name)
    return names


def mark(column: Column, row: str, names: set[str], found: Collected) -> str:
    """Returns what stands in one cell."""

    def runs(test: str) -> bool:
        return any(names & params for params in found.get(test, ()))

    if column.only:
        return YES if row == column.only and all(t in found for t in column.tests) else UNTESTED
    if any(runs(test) for test in column.tests):
        return YES
    return REFUSED if column.refused and runs(column.refused) else UNTESTED


def table(columns: Sequence[Column], found: Collected, every: dict[str, str]) -> list[str]:
    """Returns one host's table, and the list of what stands behind its columns."""
    lines = [
        "| | " + " | ".join(c.title for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row, title in every.items():
        names = row_names(row)
        cells = [mark(column, row, names, found) for column in columns]
        if set(cells) != {UNTESTED}:
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines.append("")
    for column in columns:
        behind = [f"`{test}`" for test in (*column.tests, column.refused) if test]
        lines.append(f"- **{column.title}**: {column.meaning}. {', '.join(behind)}")
    return lines


def kinds(found: Collected) -> list[str]:
    """Returns the table of kinds of bases."""
    lines = ["| | diffusers | ComfyUI | on |", "|---|---|---|---|"]
    behind = []
    for kind in KINDS:
        cells = [YES if tests else UNTESTED for tests in (kind.diffusers, kind.comfyui)]
        lines.append(f"| {kind.title} | {' | '.join(cells)} | {kind.bases} |")
        if tests := proofs(kind):
            behind.append(f"- **{kind.title}**: {', '.join(f'`{test}`' for test in tests)}")
    return [*lines, "", *behind]


def proofs(kind: Kind) -> tuple[str, ...]:
    """Returns the tests behind one kind of base."""
    return tuple(dict.fromkeys((*kind.diffusers, *kind.comfyui)))


def page(found: Collected) -> str:
    """Returns the page's text.

    Raises:
        SystemExit: A test or an alias of the table does not exist any more.
    """
    if lost := [test for test in tests_of_the_table() if test not in found]:
        raise SystemExit(f"make_compatibility: there is no test {', '.join(lost)}")
    called = {name for params in found.values() for names in params for name in names}
    if stale := ALIASES.keys() - called:
        raise SystemExit(f"make_compatibility: no test calls a family {', '.join(sorted(stale))}")
    every = rows()
    parts = [HEAD, "## In diffusers\n", *table(DIFFUSERS, found, every), AFTER_DIFFUSERS]
    parts += ["## In ComfyUI\n", *table(COMFYUI, found, every), AFTER_COMFYUI]
    parts += ["## Kinds of bases\n", "Each on one tiny base:\n", *kinds(found)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main(PAGE, lambda: page(named(items_of(tests_of_the_table()))), str(__doc__))
