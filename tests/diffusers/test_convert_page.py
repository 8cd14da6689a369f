"""The page about LoRA files: its examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_of_the_page_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    page = (ROOT / "docs" / "convert.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/convert.md", "exec"), names)
    assert len(blocks) == 2
    assert names["pipe"].get_active_diffscalers() == ["mine"]
    assert names["task"].info["imported"]["naming"] == "ComfyUI"
