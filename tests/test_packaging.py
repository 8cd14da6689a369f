"""The two products of pyproject.toml: the wheel and the Comfy Registry pack."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diffscaler_core

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In a copy: a stale build folder would smuggle deleted files into the wheel.
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("diffscaler_core", "nodes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    arguments = [
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        "--wheel-dir",
        folder,
    ]
    command = [sys.executable, "-m", "pip", "wheel", folder, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


def test_wheel_ships_the_core_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"diffscaler_core"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "diffscaler_core").rglob("*.py")}
    assert sources <= set(names)
    assert "diffscaler_core/py.typed" in names


def test_wheel_has_the_version_and_only_lower_bounds(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert f"Version: {diffscaler_core.__version__}" in lines
    required = [line.split(";")[0] for line in lines if line.startswith("Requires-Dist:")]
    assert required
    assert not [line for line in required if any(sign in line for sign in ("==", "<", "~="))]


@pytest.fixture(scope="module")
def registry_entry(comfy: ModuleType) -> Any:
    from comfy_config import config_parser

    return config_parser.extract_node_configuration(str(ROOT))


def test_registry_fields_are_complete(registry_entry: Any) -> None:
    project, comfy = registry_entry.project, registry_entry.tool_comfy
    assert project.name == "diffscaler"
    assert project.description
    assert project.license.text == "Apache-2.0"
    assert project.urls.repository.startswith("https://")
    assert (comfy.publisher_id, comfy.display_name) == ("diffscaler", "DiffScaler")
    assert comfy.icon.startswith("https://")
    assert project.supported_comfyui_version.startswith(">=")
    assert project.supported_os
    assert project.supported_accelerators
    assert comfy.web is None, (
        "WEB_DIRECTORY already names it: both together load every script twice"
    )


def test_icon_exists_where_its_address_says(registry_entry: Any) -> None:
    _, _, path = registry_entry.tool_comfy.icon.partition("/main/")
    assert (ROOT / path).is_file()
