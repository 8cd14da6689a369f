"""The strength curve under the schedule node's text, in the real frontend, both node renderers."""

import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffscaler_core.schedule import INTERPOLATIONS, Schedule

ACT = Path(__file__).parent / "acts" / "schedule_curve.mjs"
RENDERERS = {"canvas": False, "vue": True}
TEXTS = {
    "linear": "0: 0\n0.3: 1\n1: 0.5",
    "step": "0: 0, 0.3: 1, 0.3: 0.25, 1: 0.5",
    "smooth": "0.1: 0\n0.3: 1\n0.8: -0.75",
}
#: Name of the act -> what is given to it.
ACTS = {
    "edits": {},
    "undo": {},
    "bad": {},
    "keyframes": {},
    "reload": {},
    "window": {"points": "", "start": 0.25, "end": 0.75, "fade": 0.125},
    "no window": {"points": "", "start": 0.75, "end": 0.25},
    **{f"shows {name}": {"points": text, "interpolation": name} for name, text in TEXTS.items()},
}

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def said(make_workflows: ModuleType, server: Any) -> dict[tuple[str, str], Any]:
    """What came of every act in either renderer, all in one page."""
    keys = list(itertools.product(RENDERERS, ACTS))
    jobs = []
    for renderer, name in keys:
        act = name if not ACTS[name] else "shows"
        given = {"name": act, "vue": RENDERERS[renderer], "given": ACTS[name]}
        jobs.append({"kind": "act", "module": str(ACT), "given": given})
    return dict(zip(keys, make_workflows.in_frontend(server, jobs), strict=True))


@pytest.fixture(params=RENDERERS)
def of(request: pytest.FixtureRequest, said: dict[tuple[str, str], Any]) -> Any:
    """What came of an act in one renderer."""
    return lambda name: said[request.param, name]


def test_without_text_the_window_is_drawn(of: Any) -> None:
    assert of("edits")["window"]["d"]
    assert of("edits")["window"]["dots"] == []
    assert of("window")["text"] == ""
    assert len(_corners(of("window")["drawn"]["d"])) >= 4
    assert of("no window")["drawn"]["isError"]
    assert "0 <= start < end <= 1" in of("no window")["drawn"]["note"]


def test_pressing_the_curve_writes_it_and_a_new_point(of: Any) -> None:
    assert of("edits")["pressed"] == "0: 1\n0.5: 1"


def test_dragging_a_point_changes_its_text(of: Any) -> None:
    assert of("edits")["dragged"] == "0: 1\n0.3: 0.5"


def test_a_double_click_adds_a_point(of: Any) -> None:
    assert of("edits")["doubled"] == "0: 1\n0.3: 0.5\n0.8: 0.25"


def test_a_point_stops_at_its_neighbour(of: Any) -> None:
    assert of("edits")["stopped"] == "0: 1\n0.3: 0.5\n0.3: 1.25"


def test_a_part_begins_with_the_points_it_had(of: Any) -> None:
    assert of("edits")["inherited"]["dots"] == []
    own = "shift 0: 1\nshift 0.3: 0.5\nshift 0.3: 1.25"
    assert of("edits")["part"] == f"0: 1\n0.3: 0.5\n0.3: 1.25\n{own}\nshift 0.9: 1.25"


def test_a_right_click_and_dragging_off_remove_points(of: Any) -> None:
    shared = "0: 1\n0.3: 0.5\n0.3: 1.25"
    both = "shift 0.3: 0.5\nshift 0.3: 1.25"
    assert of("edits")["rightClicked"] == f"{shared}\nshift 0: 1\n{both}"
    assert of("edits")["draggedOff"] == f"{shared}\n{both}"


def test_the_keyboard_moves_and_removes_points_and_no_node(of: Any) -> None:
    rest = "0.3: 0.5\n0.3: 1.25\nshift 0.3: 0.5\nshift 0.3: 1.25"
    assert of("edits")["arrows"] == f"0.01: 0.89\n{rest}"
    assert of("edits")["deleted"] == rest
    assert of("edits")["nodes"] == 1


def test_undo_takes_a_whole_drag_back(of: Any) -> None:
    assert of("undo")["dragged"] == "0: 0\n0.7: 0.5"
    assert of("undo")["undone"] == "0: 0\n0.5: 1"
    assert len(of("undo")["drawn"]["dots"]) == 2


def test_text_that_cannot_be_read_is_said_and_kept(of: Any) -> None:
    bad = of("bad")
    assert bad["shown"]["isError"]
    assert bad["shown"]["note"].startswith("line 2, '0.3 1':")
    assert bad["shown"]["dots"] == []
    assert bad["text"] == "0: 0\n0.3 1\n"  # also after a double click on the curve
    (node,) = bad["api"].values()
    assert node["inputs"]["points"] == bad["text"]


def test_connected_keyframes_are_said_to_count(of: Any) -> None:
    assert "keyframes" in of("keyframes")["drawn"]["note"]
    assert of("keyframes")["drawn"]["dots"] == []
    assert of("keyframes")["text"] == "0: 0\n0.3: 1"


def test_a_saved_workflow_opens_again_as_it_was(of: Any) -> None:
    first, again = (of("reload")[key] for key in ("first", "again"))
    assert again["api"] == first["api"]
    assert _nodes(again["ui"]) == _nodes(first["ui"])
    (node,) = first["ui"]["nodes"]
    assert node["widgets_values"] == ["0: 0, 0.3: 1 # so\nscale 1: 0.5", "step", 0, 0.75, 0]
    assert "curve" not in json.dumps(first)
    assert of("reload")["seenAgain"] == of("reload")["seen"]
    assert of("reload")["seen"]["others"] == 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_curve_drawn_is_the_schedule_that_runs(of: Any, interpolation: str) -> None:
    drawn = of(f"shows {interpolation}")["drawn"]
    schedule = Schedule.parse(TEXTS[interpolation], interpolation)
    corners = _corners(drawn["d"])
    points = schedule.scale
    (x0, y0), (x1, y1) = drawn["dots"][0], drawn["dots"][1]
    (p0, f0), (p1, f1) = points[0], points[1]
    percents = [p0 + (x - x0) / (x1 - x0) * (p1 - p0) for x, _ in corners]
    factors = [f0 + (y - y0) / (y1 - y0) * (f1 - f0) for _, y in corners]
    assert percents[0] == pytest.approx(0, abs=1e-3)
    assert percents[-1] == pytest.approx(1, abs=1e-3)
    for percent, factor in zip(percents, factors, strict=True):
        sides = [schedule.at(min(max(percent + by, 0), 1))[0] for by in (-2e-3, 0, 2e-3)]
        assert min(sides) - 0.02 <= factor <= max(sides) + 0.02, percent


def _corners(d: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+),([-\d.]+)", d)]


def _nodes(ui: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: node[key] for key in node if key not in ("pos", "size")} for node in ui["nodes"]]
