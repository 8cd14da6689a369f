"""The page about methods: its examples run as they stand, and do what they say."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_of_the_page_run_one_after_the_other(capsys: Any):
    page = (ROOT / "docs" / "methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/methods.md", "exec"), names)
    assert len(blocks) == 3
    assert names["task"].classes == {"tulip": 1001, "daisy": 1002}
    assert len(names["images"]) == 3
    side = names["images"][0].size[0]
    assert names["large"].size == (2 * side, 2 * side)
    assert "{'tulip': 1001, 'daisy': 1002}" in capsys.readouterr().out
