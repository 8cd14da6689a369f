"""Pages of docs/ that say what the tests hold: asking pytest, and writing or checking a page."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


class _Collector:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def pytest_collection_finish(self, session: Any) -> None:
        """Called by pytest when all tests are known."""
        self.items = list(session.items)


def items_of(tests: Iterable[str]) -> list[Any]:
    """Returns pytest's items of all files that some tests, `file::name`, stand in.

    Raises:
        SystemExit: pytest could not collect them.
    """
    plugin, said = _Collector(), io.StringIO()
    files = sorted({str(ROOT / test.partition("::")[0]) for test in tests})
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], [plugin])
    if code:
        raise SystemExit(f"pytest could not collect:\n{said.getvalue()[-2000:]}")
    return plugin.items


def main(page: Path, text: Callable[[], str], about: str) -> None:
    """Writes a page, or with --check compares it: the command line of its script.

    Args:
        page: The file.
        text: Gives what it should hold.
        about: The script's docstring.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if stale")
    check = parser.parse_args().check
    os.chdir(ROOT)
    wanted = text()
    if not check:
        page.write_text(wanted, encoding="utf-8")
    elif not page.is_file() or page.read_text(encoding="utf-8") != wanted:
        script = Path(sys.argv[0]).name
        sys.exit(f"docs/{page.name} is stale; run scripts/{script}")
