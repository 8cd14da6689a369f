"""The page about many tasks: its examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_of_the_page_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "many_tasks.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/many_tasks.md", "exec"), names)
        names["pipe"].set_progress_bar_config(disable=True)
    assert len(blocks) >= 5
    assert len(names["images"]) == 4
    assert len(names["drawn"]) == 3
    assert names["image"].size == (128, 128)
