"""The shipped workflows against the nodes of a real server; no browser.

`tests/browser` opens the same files in the real frontend.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "workflows").glob("*.json"))
TWINS = sorted((ROOT / "workflows" / "api").glob("*.json"))
DOCS = ROOT / "web" / "docs"
WITHOUT_SERVER = {"MarkdownNote", "Note"}  # the frontend's own
#: Widgets that the frontend adds to nodes: no input of theirs.
BUTTONS = {"upload"}


def _name(path: Path) -> str:
    return path.stem


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def known(server: Any) -> dict[str, Any]:
    return server.get("/object_info")


def _inputs(known: dict[str, Any], kind: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name -> (type or list of options, facts), of a node; without the hidden ones."""
    groups = [group for key, group in known[kind]["input"].items() if key != "hidden"]
    specs = {name: spec for group in groups for name, spec in group.items()}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}


def _find(inputs: dict[str, tuple[Any, dict[str, Any]]], name: str) -> tuple[Any, dict[str, Any]]:
    """An input's type; `tasks.task0` is the first slot of the growing input `tasks`."""
    if name in inputs:
        return inputs[name]
    grower, _, slot = name.partition(".")
    assert grower in inputs, f"there is no input {name}"
    kind, facts = inputs[grower]
    template = facts["template"]
    assert kind == "COMFY_AUTOGROW_V3"
    assert re.fullmatch(rf"{template['prefix']}\d+", slot)
    ((kind, facts),) = [spec for group in template["input"].values() for spec in group.values()]
    return kind, facts


def _refusal(kind: Any, facts: dict[str, Any], value: Any) -> str | None:
    options = kind if isinstance(kind, list) else facts.get("options")
    if options is not None:
        return None if value in options else f"not one of {options}"
    if kind == "COLOR":
        return None if re.fullmatch("#[0-9a-f]{6}", str(value)) else "no #rrggbb"
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    if kind not in types:
        return f"a {kind} has to be linked"
    if not isinstance(value, types[kind]):
        return f"no {kind}"
    low, high = facts.get("min", value), facts.get("max", value)
    return None if low <= value <= high else f"not within {low} … {high}"


def _links(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


@pytest.mark.parametrize("path", TWINS, ids=_name)
def test_api_workflow_uses_known_nodes_inputs_and_values(path: Path, known: dict) -> None:
    graph = _read(path)
    assert sorted({n["class_type"] for n in graph.values()} - known.keys()) == []
    for key, node in graph.items():
        inputs = _inputs(known, node["class_type"])
        for name, value in node["inputs"].items():
            kind, facts = _find(inputs, name)
            if _links(value):
                source, output = value
                given = known[graph[source]["class_type"]]["output"][output]
                assert kind in (given, "*"), f"{key}.{name}"
            else:
                assert _refusal(kind, facts, value) is None, f"{key}.{name} = {value!r}"
        required = known[node["class_type"]]["input"].get("required", {})
        assert all(any(n.split(".")[0] == r for n in node["inputs"]) for r in required), key


@pytest.mark.parametrize("path", SHIPPED, ids=_name)
def test_ui_workflow_uses_known_nodes_and_inputs(path: Path, known: dict) -> None:
    for node in _read(path)["nodes"]:
        if node["type"] not in WITHOUT_SERVER:
            assert node["type"] in known
            inputs = _inputs(known, node["type"])
            for slot in node["inputs"]:
                if slot["name"] not in BUTTONS:
                    _find(inputs, slot["name"])


@pytest.mark.parametrize("path", SHIPPED, ids=_name)
def test_ui_workflow_and_its_api_twin_are_one_graph(path: Path) -> None:
    flow, twin = _read(path), _read(path.parent / "api" / path.name)
    nodes = {str(n["id"]): n for n in flow["nodes"] if n["type"] not in WITHOUT_SERVER}
    assert {key: n["type"] for key, n in nodes.items()} == {
        key: n["class_type"] for key, n in twin.items()
    }
    links = {link[0]: [str(link[1]), link[2]] for link in flow["links"]}
    for key, node in nodes.items():
        linked = {s["name"]: links[s["link"]] for s in node["inputs"] if s["link"] is not None}
        inputs = twin[key]["inputs"]
        assert linked == {name: value for name, value in inputs.items() if _links(value)}
        values = [value for value in inputs.values() if not _links(value)]
        shown = [v for v in node.get("widgets_values") or [] if v != "fixed"]
        widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        for name in set(widgets) & set(linked):  # a widget that is linked keeps its old value
            shown[widgets.index(name)] = None
        shown = [v for v in shown if v is not None]
        assert shown[: len(values)] == values, key


@pytest.mark.parametrize("path", SHIPPED, ids=_name)
def test_ui_workflow_explains_itself_and_nothing_overlaps(path: Path) -> None:
    nodes = _read(path)["nodes"]
    (note,) = [node for node in nodes if node["type"] in WITHOUT_SERVER]
    (text,) = note["widgets_values"]
    assert len(text.split("\n\n")) == 3
    assert all(word in text for word in ("SD3.5", "Flux", "SDXL"))
    boxes = {f"{n['id']} {n['type']}": (*n["pos"], *n["size"]) for n in nodes}
    for one, other in itertools.combinations(boxes, 2):
        (x, y, w, h), (u, v, p, q) = boxes[one], boxes[other]
        apart = x + w <= u or u + p <= x or y + h <= v - 30 or v + q <= y - 30  # 30: the title
        assert apart, f"{one} lies over {other}"


@pytest.mark.parametrize("sheet", ["contact_sheet", "control_sheet"])
def test_contact_sheets_are_what_their_script_writes(
    sheet: str, script: Callable[[str], ModuleType]
) -> None:
    assert _read(ROOT / "workflows" / "api" / f"{sheet}.json") == (
        script("contact_sheet").workflow(sheet)
    )


def test_every_workflow_has_a_twin_and_the_template_browser_lists_it(server: Any) -> None:
    names = {path.stem for path in SHIPPED}
    assert names
    assert names <= {path.stem for path in TWINS}
    assert set(server.get("/workflow_templates")["diffscaler"]) == names
    for path in SHIPPED:
        served = server.get(f"/api/workflow_templates/diffscaler/{path.name}")
        assert served == _read(path)


def _columns(text: str, heading: str) -> Iterator[str]:
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        yield from re.findall(r"`(\w+)`", row)


def test_every_node_has_help_that_names_its_inputs_and_outputs(server: Any, known: dict) -> None:
    ours = sorted(name for name in known if name.startswith("DiffScaler"))
    assert [path.stem for path in sorted(DOCS.glob("*.md"))] == ours
    for name in ours:
        text = server.request(f"/extensions/diffscaler/docs/{name}.md").decode()
        assert text.startswith(f"# {known[name]['display_name']}\n")
        assert set(_columns(text, "Inputs")) == set(_inputs(known, name))
        assert set(_columns(text, "Outputs")) == set(known[name]["output_name"])
