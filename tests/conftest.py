"""Fixtures about ComfyUI: in this process, the pack as it loads it, and its server.

Everything here is made once per session and only for tests that ask for it.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _script(name: str) -> ModuleType:
    # By path: a scripts/ folder on sys.path would put its names before everybody else's.
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Gives a module of scripts/ by name; those it imports must have been asked for before."""
    return lambda name: sys.modules.get(name) or _script(name)


comfy_http = _script("comfy_http")
comfy_host = _script("comfy_host")
comfy_launch = _script("comfy_launch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by fixture, so that no test forgets, and runs what needs no ComfyUI first."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "comfy" in fixtures:
            item.add_marker(pytest.mark.comfy)
        if "server" in fixtures:
            item.add_marker(pytest.mark.http)
    items.sort(
        key=lambda item: (
            bool(item.get_closest_marker("comfy")) + 2 * bool(item.get_closest_marker("http"))
        )
    )


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The folder of a real ComfyUI."""
    try:
        return comfy_host.comfyui()
    except comfy_http.HostError as error:
        pytest.skip(f"no ComfyUI: {error}")


@pytest.fixture(scope="session")
def comfy_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base directory of the in-process ComfyUI: models/, input/, output/ and so on."""
    return tmp_path_factory.mktemp("comfy_base")


@pytest.fixture(scope="session")
def comfy(comfyui_path: Path, comfy_base: Path) -> ModuleType:
    """ComfyUI in this process, on the CPU: its `nodes` module; `import comfy...` works."""
    return comfy_launch.boot(comfyui_path, ["--cpu", *comfy_host.base_directory(comfy_base)])


@pytest.fixture(scope="session")
def pack(comfy: ModuleType, comfy_base: Path) -> ModuleType:
    """This repository as ComfyUI's own loader loads it: `pack.nodes`, `pack.diffscaler_core`."""
    return comfy_launch.load_pack(comfy_base / "custom_nodes" / "diffscaler")


@pytest.fixture(scope="session")
def server(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real ComfyUI server with the pack and the pocket base: a `comfy_http.Server`."""
    with comfy_host.running_server(tmp_path_factory.mktemp("server_base")) as running:
        yield running
