"""The wheel: what is in it, and that it works where nothing else of the project is."""

import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import diffscaler_core

from .conftest import ROOT, run


def test_wheel_ships_the_core_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"diffscaler_core"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "diffscaler_core").rglob("*.py")}
    assert sources <= set(names)
    assert "diffscaler_core/py.typed" in names
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def test_wheel_has_the_version_the_licence_and_only_lower_bounds(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert f"Version: {diffscaler_core.__version__}" in lines
    assert "License-Expression: Apache-2.0" in lines
    required = [line.split(";")[0] for line in lines if line.startswith("Requires-Dist:")]
    assert required
    assert not [line for line in required if any(sign in line for sign in ("==", "<", "~="))]


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel; its libraries are this environment's."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    python = programs / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # The .pth files of a folder that a .pth file names are not read: the editable install is away.
    (Path(place) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


SAVES_AND_LOADS = """
import pathlib, sys, torch, diffscaler_core
from diffscaler_core import attach, load_task, new_task, save_task

assert pathlib.Path(diffscaler_core.__file__).is_relative_to(sys.prefix), diffscaler_core.__file__
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
x = torch.randn(3, 8)
task = new_task(model, method="diffscaler", rank=2, targets="all", name="flowers")
again = load_task(save_task(task, "flowers.safetensors"))
with attach(model, again):
    print(again.name, len(again.layers), torch.equal(model(x), model(x)))
"""


def test_a_fresh_environment_saves_and_loads_a_task(fresh: Path, tmp_path: Path) -> None:
    python = fresh / "python"
    assert run(python, "-c", SAVES_AND_LOADS, cwd=tmp_path).split() == ["flowers", "2", "True"]
    told = run(fresh / "diffscaler", "info", "flowers.safetensors", cwd=tmp_path)
    assert "flowers" in told


def test_a_fresh_environment_has_the_program(fresh: Path, tmp_path: Path) -> None:
    version = run(fresh / "diffscaler", "--version", cwd=tmp_path).strip()
    assert version == diffscaler_core.__version__
    assert "train" in run(fresh / "diffscaler", "--help", cwd=tmp_path)
    assert run(fresh / "python", "-m", "diffscaler_core.cli", "--version", cwd=tmp_path) == (
        f"{version}\n"
    )
