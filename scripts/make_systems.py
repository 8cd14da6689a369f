"""Writes docs/systems.md: related systems, and the state of each here.

    .venv/bin/python scripts/make_systems.py
    .venv/bin/python scripts/make_systems.py --check   says whether the page is up to date

The rows are those of `systems_table.py`. Every test that is named must exist; that it passes is the
suite's part, so a system whose test is gone cannot stay in the table as one that works.
"""

from __future__ import annotations

from collections.abc import Iterable

from systems_table import SYSTEMS, System
from tested_pages import ROOT, items_of, main

PAGE = ROOT / "docs" / "systems.md"

HEAD = """<!-- Written by scripts/make_systems.py from systems_table.py. -->
# Related systems

What others have built on or beside diffusion models, where its home is a bank of tasks on one
frozen base. **works**: it is here, and the tests named below hold it. **composes with**: the system
is a library or a part of the host, and tasks are tested beside it. **in part**: it runs, and
misses what is named. **not yet**: nothing here is
tested, so nothing is claimed; what stands there is what it would be.

The papers' own figures are theirs: none is claimed here. What was measured here stands on each
page, with the command that measured it.
"""


def check(rows: Iterable[System], names: set[str]) -> None:
    """Says whether every test exists.

    Raises:
        SystemExit: One does not.
    """
    known = names | {name.partition("[")[0] for name in names}
    if lost := [test for row in rows for test in row.tests if test not in known]:
        raise SystemExit(f"make_systems: there is no test {', '.join(lost)}")


def page(names: set[str] | None = None) -> str:
    """Returns the page.

    Args:
        names: All tests there are; None: asked of pytest.

    Raises:
        SystemExit: A test or a page that is named does not exist.
    """
    if names is None:
        names = {item.nodeid for item in items_of(t for row in SYSTEMS for t in row.tests)}
    check(SYSTEMS, names)
    if lost := [row.page for row in SYSTEMS if row.page and not (PAGE.parent / row.page).is_file()]:
        raise SystemExit(f"make_systems: there is no docs/{', '.join(lost)}")
    lines = [HEAD, "| system | here | state |", "|---|---|---|"]
    for row in SYSTEMS:
        paper = f"[{row.title}](https://arxiv.org/abs/{row.paper})"
        what = f"{row.what}: [{_title(row.page)}]({row.page})" if row.page else row.what
        lines.append(f"| {paper} | {what} | {row.state} |")
    lines += ["", "## The tests", ""]
    for row in SYSTEMS:
        if row.tests:
            told = ", ".join(f"`{test.partition('::')[2]}`" for test in row.tests)
            files = ", ".join(
                f"`{file}`" for file in dict.fromkeys(t.split("::")[0] for t in row.tests)
            )
            lines.append(f"- {row.title}: {told} in {files}")
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    """Returns a page's own title."""
    text = (PAGE.parent / name).read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith("# "))[2:]


if __name__ == "__main__":
    main(PAGE, page, __doc__)
