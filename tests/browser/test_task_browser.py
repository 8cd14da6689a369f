"""The load node's browser of task files, in the real frontend, both node renderers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import zeros

from diffscaler_core import load_task

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "diffscaler"
ACT = Path(__file__).parent / "acts" / "task_browser.mjs"
RENDERERS = {"canvas": False, "vue": True}
FOLDERS = (POCKET, POCKET.parents[1] / "tasks")  # as the test server is told
PATHS = {path.name: path for folder in FOLDERS for path in folder.glob("*.safetensors")}
FILES = sorted(PATHS)
HOSTILE = "hostile.safetensors"
BROKEN = "broken.safetensors"

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(
    script: Callable[[str], ModuleType], comfyui_path: Path, tmp_path_factory: Any
) -> Iterator[Any]:
    """A server that besides the pocket tasks has a file that lies, and one that is none."""
    base = tmp_path_factory.mktemp("browse_base")
    folder = base / "models" / "diffscaler"
    folder.mkdir(parents=True)
    (folder / BROKEN).write_bytes(b"not a file")
    script_tag = "<img src=x onerror='window.hacked = true'>"
    config = {"base": {"family": script_tag}, "prompts": "no list", "control": 3, "trigger": [1]}
    metadata = {
        "diffscaler.format": "1",
        "diffscaler.config": json.dumps(config),
        "modelspec.title": script_tag,
        "modelspec.thumbnail": "https://example.com/pixel.png",
    }
    save_file({"x": zeros(1)}, folder / HOSTILE, metadata)
    with script("comfy_host").running_server(base) as running:
        yield running


@pytest.fixture(scope="module")
def said(make_workflows: ModuleType, server: Any) -> dict[str, Any]:
    """What came of it in either renderer."""
    given = {"search": "pen draw", "family": "sd3", "choose": "ink.safetensors"}
    jobs = [
        {"kind": "act", "module": str(ACT), "given": {**given, "vue": vue}}
        for vue in RENDERERS.values()
    ]
    return dict(zip(RENDERERS, make_workflows.in_frontend(server, jobs), strict=True))


@pytest.fixture(params=RENDERERS)
def found(request: pytest.FixtureRequest, said: dict[str, Any]) -> Any:
    """What came of it in one renderer."""
    return said[request.param]


def _by_file(cards: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {card["file"]: card for card in cards}


def _size(count: int) -> str:
    return f"{count / 1024:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def test_every_task_has_a_card_with_its_facts_and_picture(found: Any) -> None:
    cards = _by_file(found["all"])
    assert sorted(cards) == sorted([*FILES, HOSTILE, BROKEN])
    for name in FILES:
        task, said = load_task(PATHS[name]), cards[name]["said"]
        assert task.modelspec["title"] in said
        assert task.info["base"]["family"] in said
        assert _size(PATHS[name].stat().st_size) in said
        assert (cards[name]["width"] > 0) == ("thumbnail" in task.modelspec)
        assert not cards[name]["problem"]
    assert "control: edges" in cards["edges.safetensors"]["said"]
    assert "prompts: apple, banana" in cards["fruits.safetensors"]["said"]
    assert "and 41 more" in cards["words.safetensors"]["said"]


def test_files_are_shown_as_text_and_pictures_only_from_the_file(found: Any) -> None:
    card = _by_file(found["all"])[HOSTILE]
    assert "onerror" in card["said"]
    assert card["width"] == 0
    assert _by_file(found["all"])[BROKEN]["problem"]
    assert found["hacked"] is None


def test_searching_and_choosing_a_base_leave_what_fits(found: Any) -> None:
    assert [card["file"] for card in found["found"]] == ["ink.safetensors"]
    assert found["count"] == f"1 of {len(FILES) + 2} tasks"
    assert sorted(card["file"] for card in found["ofFamily"]) == FILES
    assert found["families"][0] == "all bases"
    assert "sd3" in found["families"]


def test_choosing_sets_the_input_and_nothing_else(found: Any) -> None:
    before, after = found["before"], found["after"]
    (first,) = (card["file"] for card in found["all"] if card["chosen"])
    assert found["escaped"] == first == before["ui"]["nodes"][0]["widgets_values"][0]
    assert found["chosen"] == "ink.safetensors"
    assert after["ui"]["nodes"][0]["widgets_values"] == ["ink.safetensors"]
    (node,) = after["api"].values()
    assert node["inputs"] == {"task_name": "ink.safetensors"}
    assert [slot["name"] for slot in after["ui"]["nodes"][0]["inputs"]] == ["task_name"]
