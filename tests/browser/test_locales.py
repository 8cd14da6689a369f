"""The pack in ComfyUI's real frontend, in three languages: texts, tooltips, colours of edges."""

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageColor

ACT = Path(__file__).parent / "acts" / "locale.mjs"
LOCALES = Path(__file__).resolve().parents[2] / "locales"
TASK, TRAINING, GUIDANCE = "DIFFSCALER_TASK", "DIFFSCALER_TRAINING", "DIFFSCALER_GUIDANCE"
#: Language -> palette to begin with, the one to change to, whether nodes are HTML.
SCENES = {
    "zh": {"palette": "dark", "other": "light", "vue": False},
    "ja": {"palette": "light", "other": "dark", "vue": True},
    "en": {"palette": "light", "other": "dark", "vue": False},
}
#: What a fresh user has: other tests use the same server.
USUAL = {
    "Comfy.Locale": "en",
    "Comfy.ColorPalette": "dark",
    "Comfy.VueNodes.Enabled": False,
    "LiteGraph.Node.TooltipDelay": 500,
}

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def seen(make_workflows: ModuleType, server: Any) -> Iterator[dict[str, Any]]:
    """What a user of each language sees. DIFFSCALER_SHOTS=folder keeps pictures of it."""
    folder = os.environ.get("DIFFSCALER_SHOTS")
    jobs = []
    for language, scene in SCENES.items():
        shot = str(Path(folder) / f"locale_{language}.png") if folder else None
        given = {**scene, "language": language, "screenshot": shot}
        jobs.append({"kind": "act", "module": str(ACT), "given": given})
    try:
        yield dict(zip(SCENES, make_workflows.in_frontend(server, jobs), strict=True))
    finally:
        server.request("/settings", USUAL)


@pytest.fixture(params=SCENES)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def texts_of(language: str) -> Any:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))


def test_nodes_show_their_translated_titles(seen: dict[str, Any], language: str) -> None:
    texts = texts_of(language)
    for key, node in (("load", "Load"), ("stack", "Stack"), ("train", "Train")):
        name = {"Stack": "DiffScalerStackTasks"}.get(node, f"DiffScaler{node}Task")
        assert seen[language][key]["title"] == texts[name]["display_name"]
    assert seen["zh"]["load"]["title"] == "加载 DiffScaler 任务"
    assert seen["ja"]["load"]["title"] == "DiffScalerタスクを読み込む"


def test_sockets_and_widgets_show_their_translated_names(
    seen: dict[str, Any], language: str
) -> None:
    texts = texts_of(language)["DiffScalerTrainTask"]
    train = seen[language]["train"]
    names = {one["name"] for one in texts["inputs"].values()}
    assert set(train["inputs"]) == names
    # the host adds and translates the one that follows the seed
    assert len(set(train["widgets"]) - names) == 1
    assert train["outputs"] == [one["name"] for one in texts["outputs"].values()]


def test_a_resting_mouse_is_told_in_the_language(seen: dict[str, Any], language: str) -> None:
    texts, tooltips = texts_of(language), seen[language]["tooltips"]
    stack = texts["DiffScalerStackTasks"]
    assert tooltips["title"] == stack["description"]
    assert tooltips["output"] == texts["DiffScalerLoadTask"]["outputs"]["0"]["tooltip"]
    assert tooltips["growing"] == stack["inputs"]["tasks"]["tooltip"]
    if not SCENES[language]["vue"]:
        # HTML nodes look a socket's tooltip up by its translated name, and so never find it
        assert tooltips["model"] == stack["inputs"]["model"]["tooltip"]


def test_the_packs_own_widgets_speak_the_language(seen: dict[str, Any], language: str) -> None:
    texts = json.loads((LOCALES / language / "main.json").read_text("utf-8"))["diffscaler"]
    own = seen[language]["own"]
    assert own["hint"] == texts["editHint"]
    assert own["parts"] == [texts["all"], "scale", "shift", "subspace"]
    assert {f"0 {texts['noise']}", f"{texts['picture']} 1"} <= set(own["ends"])
    assert texts["browse"] in seen[language]["load"]["widgets"]


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_task_edge_has_its_own_colour(
    seen: dict[str, Any], language: str, palette: str
) -> None:
    found = seen[language]["colours"][palette]
    link = found["link"]
    assert link == found["slot"] == found["variable"]
    assert list(found["all"].values()).count(link) == 1
    assert list(found["all"].values()).count(found["all"][TRAINING]) == 1
    assert link != seen[language]["colours"]["light" if palette == "dark" else "dark"]["link"]
    image = Image.open(io.BytesIO(base64.b64decode(found["png"]))).convert("RGB")
    assert any(_near(pixel, link) for _, pixel in image.getcolors(image.width * image.height))
    dots = {tuple(map(int, dot[4:-1].split(","))) for dot in found["dots"] if "a" not in dot}
    assert (ImageColor.getrgb(link) in dots) == SCENES[language]["vue"]


@pytest.mark.parametrize("palette", ["dark", "light"])
@pytest.mark.parametrize("kind", [TASK, TRAINING, GUIDANCE])
def test_the_colours_stand_out(seen: dict[str, Any], palette: str, kind: str) -> None:
    found = seen["en"]["colours"][palette]
    for ground in (found["node"], found["canvas"]):
        assert _contrast(found["all"][kind], ground) >= 3  # WCAG 2.2, 1.4.11


def test_a_palette_that_knows_the_task_is_obeyed(seen: dict[str, Any], language: str) -> None:
    last = SCENES[language]["other"]
    assert seen[language]["overruled"] == ["#123456", seen[language]["colours"][last]["link"]]


def _near(pixel: tuple[int, ...], colour: str) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, ImageColor.getrgb(colour), strict=True)) <= 4


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        shares = [value / 255 for value in ImageColor.getrgb(colour)[:3]]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
