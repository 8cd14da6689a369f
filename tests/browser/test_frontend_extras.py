"""Help pages with their pictures, and a frontend in which the pack's extensions are disabled."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "web" / "docs"
ACTS = Path(__file__).parent / "acts"
HELP = sorted(path.stem for path in DOCS.glob("*.md"))
OPENED = ("DiffScalerLoadTask", "DiffScalerScheduleTask")
MOST_BYTES = 1_500_000

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def _act(name: str, **given: Any) -> dict[str, Any]:
    return {"kind": "act", "module": str(ACTS / f"{name}.mjs"), "given": given}


def test_every_help_page_has_a_picture_of_its_own() -> None:
    for name in HELP:
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        ((alt, source),) = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
        assert source == f"images/{name}.jpg"
        assert alt
        with Image.open(DOCS / source) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) > 100
    pictures = sorted((DOCS / "images").iterdir())
    assert [path.stem for path in pictures] == HELP
    assert sum(path.stat().st_size for path in pictures) < MOST_BYTES


@pytest.fixture(scope="module")
def schedule() -> dict[str, Any]:
    """A shipped workflow with nodes that the pack's scripts add to."""
    return json.loads((ROOT / "workflows" / "schedule.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages(make_workflows: ModuleType, server: Any, schedule: dict[str, Any]) -> dict[str, Any]:
    """The help pages, and the workflow with the extensions and without."""
    opened = {"ui": schedule, "type": "DiffScalerScheduleTask"}
    jobs = [*(_act("help", type=name) for name in OPENED), _act("plain", **opened)]
    *helped, with_them = make_workflows.in_frontend(server, jobs)
    scripts = "".join(path.read_text() for path in (ROOT / "web").glob("*.js"))
    names = re.findall(r'name: "(DiffScaler\.\w+)"', scripts)
    server.request("/settings", {"Comfy.Extension.Disabled": names})
    try:
        (without,) = make_workflows.in_frontend(server, [_act("plain", **opened)])
    finally:
        server.request("/settings", {"Comfy.Extension.Disabled": []})
    helps = dict(zip(OPENED, helped, strict=True))
    return {"names": names, "help": helps, "with": with_them, "without": without}


@pytest.mark.parametrize("name", OPENED)
def test_help_page_opens_with_its_picture(pages: dict[str, Any], name: str) -> None:
    shown = pages["help"][name]
    assert shown["source"] == f"/extensions/diffscaler/docs/images/{name}.jpg"
    with Image.open(DOCS / "images" / f"{name}.jpg") as picture:
        assert shown["size"] == list(picture.size)


def test_without_the_extensions_a_workflow_is_the_same(pages: dict[str, Any]) -> None:
    first, second = pages["with"], pages["without"]
    assert len(pages["names"]) >= 2
    assert "curve" in first["widgets"]["DiffScalerScheduleTask"]
    assert "browse" in first["widgets"]["DiffScalerLoadTask"]
    assert "curve" not in second["widgets"]["DiffScalerScheduleTask"]
    assert "browse" not in second["widgets"]["DiffScalerLoadTask"]
    assert first["api"] == second["api"]
    keys = ("id", "type", "inputs", "outputs", "properties", "widgets_values", "title")
    assert [[node.get(key) for key in keys] for node in first["ui"]["nodes"]] == [
        [node.get(key) for key in keys] for node in second["ui"]["nodes"]
    ]
    assert first["ui"]["links"] == second["ui"]["links"]
