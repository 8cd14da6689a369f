"""Every shipped workflow in ComfyUI's real frontend: opened, read back, queued from there."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def opened(make_workflows: ModuleType, server: Any) -> dict[str, Any]:
    """What the frontend made of each workflow, all in one page."""
    jobs = [make_workflows.open_job(name) for name in NAMES]
    return dict(zip(NAMES, make_workflows.in_frontend(server, jobs), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_without_a_missing_node(opened: dict[str, Any], name: str) -> None:
    assert opened[name]["missing"] == []
    assert opened[name]["errors"] == []
    assert any(kind.startswith("DiffScaler") for kind in opened[name]["types"])


@pytest.mark.parametrize("name", NAMES)
def test_canvas_gives_the_api_twin_back(
    opened: dict[str, Any], make_workflows: ModuleType, name: str
) -> None:
    assert make_workflows.problems_of(name, opened[name]) == []


@pytest.mark.parametrize("name", NAMES)
def test_queueing_from_the_canvas_draws_pictures(
    opened: dict[str, Any], server: Any, name: str
) -> None:
    pictures = server.images(server.wait(opened[name]["prompt_id"], timeout=900))
    assert pictures
    assert len(set(pictures)) == len(pictures)  # no two branches draw the same


def test_a_node_nobody_has_is_noticed(make_workflows: ModuleType, server: Any) -> None:
    job = make_workflows.open_job(NAMES[0])
    ours = next(node for node in job["ui"]["nodes"] if node["type"].startswith("DiffScaler"))
    ours["type"] = "DiffScalerNobodyHas"
    (result,) = make_workflows.in_frontend(server, [{**job, "queue": False}])
    assert result["missing"] == ["DiffScalerNobodyHas"]
