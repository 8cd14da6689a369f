"""The page about PEFT: its examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", minversion="0.18")

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_of_the_page_run_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/peft.md", "exec"), names)
    assert len(blocks) >= 5
    files = {
        name: names["load_task"](tmp_path / "out" / name)
        for name in ("mine.safetensors", "mine_too.safetensors")
    }
    one, two = (dict(task.layers) for task in files.values())
    assert all(torch.equal(t, two[layer][n]) for layer, own in one.items() for n, t in own.items())
    assert any(bool(own["up"].any()) for own in one.values())
    assert names["pipe"].get_active_diffscalers() == ["mine"]
