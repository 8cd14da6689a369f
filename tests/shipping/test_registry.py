"""What the Comfy Registry is told: [tool.comfy] in pyproject.toml, as ComfyUI itself reads it."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import diffscaler_core

from .conftest import ROOT

HOME = "https://github.com/diffscaler/diffscaler"


@pytest.fixture(scope="module")
def entry(comfy: ModuleType) -> Any:
    from comfy_config import config_parser

    return config_parser.extract_node_configuration(str(ROOT))


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib

    told: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return told


def test_registry_fields_are_complete(entry: Any) -> None:
    project, comfy = entry.project, entry.tool_comfy
    assert project.name == "diffscaler"
    assert project.description
    assert project.license.text == "Apache-2.0"
    assert project.urls.repository == HOME
    assert project.urls.issues == f"{HOME}/issues"
    assert project.urls.documentation.startswith("https://")
    assert (comfy.publisher_id, comfy.display_name) == ("diffscaler", "DiffScaler")
    assert project.supported_comfyui_version.startswith(">=")
    assert project.supported_os
    assert project.supported_accelerators
    assert comfy.web is None, (
        "WEB_DIRECTORY already names it: both together load every script twice"
    )


def test_addresses_agree(table: dict[str, Any]) -> None:
    urls = table["project"]["urls"]
    assert urls["Bug Tracker"] == urls["Issues"]
    assert all(address.startswith("https://") for address in urls.values())


def test_version_comes_from_one_place(table: dict[str, Any], script: Any) -> None:
    project, comfy = table["project"], table["tool"]["comfy"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    place = table["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    module, _, name = place.rpartition(".")
    assert Path(comfy["version"]["path"]) == Path(*module.split(".")).with_suffix(".py")
    assert name == "__version__"
    assert script("make_archive").version_of(ROOT) == diffscaler_core.__version__


@pytest.mark.parametrize("kind", ["Icon", "Banner"])
def test_pictures_are_where_their_addresses_say(table: dict[str, Any], kind: str) -> None:
    before, _, path = table["tool"]["comfy"][kind].partition("/main/")
    assert before == HOME.replace("github.com", "raw.githubusercontent.com")
    with Image.open(ROOT / path) as picture:
        width, height = picture.size
    if kind == "Icon":
        assert width == height
        assert width <= 400
    else:
        assert width * 9 == height * 21
    assert (ROOT / path).stat().st_size < 500_000


def test_icon_is_what_the_script_draws(
    script: Any,
) -> None:
    script("contact_sheet")
    drawn = script("make_banner").icon()
    with Image.open(ROOT / "assets" / "icon.png") as kept:
        assert kept.convert("RGBA").tobytes() == drawn.tobytes()
