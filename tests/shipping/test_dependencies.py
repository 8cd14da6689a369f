"""Every third-party import is declared: in pyproject.toml, or by ComfyUI for the node pack."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT

CORE, NODES = ROOT / "diffscaler_core", ROOT / "nodes"
#: ComfyUI's own top-level modules.
HOST = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"),
    *("node_helpers", "latent_preview"),
}
#: Imported only where it is there anyway, and the place says so when it is not.
#: huggingface_hub, packaging: of diffusers. bitsandbytes: of optimizer adamw8bit. torch_fidelity:
#: of the "inception" features. triton: of torch on CUDA.
UNDECLARED = {"huggingface_hub", "packaging", "bitsandbytes", "torch_fidelity", "triton"}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()  # type: ignore[index]


def _declared() -> tuple[set[str], set[str]]:
    """Returns what [project] needs, and that with all extras."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib

    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {_plain(one) for one in project["dependencies"]}
    extras = {_plain(x) for listed in project["optional-dependencies"].values() for x in listed}
    return needed, needed | extras


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def _packages(names: set[str]) -> set[str]:
    """Returns the packages that third-party modules come from."""
    known = packages_distributions()
    strangers = names - set(sys.stdlib_module_names) - HOST - {"__future__"}
    return {_plain(known.get(name, [name])[0]) for name in strangers}


@pytest.mark.parametrize("folder", [CORE, NODES], ids=lambda folder: folder.name)
def test_every_import_is_declared(folder: Path, comfyui_path: Path) -> None:
    names = {name for path in folder.rglob("*.py") for name in _imports(path)}
    packages = _packages(names)
    assert "torch" in packages
    _, declared = _declared()
    hosts = _listed_by(comfyui_path) if folder is NODES else set()
    assert packages - declared - hosts <= {_plain(name) for name in UNDECLARED}


# Runs in a process of its own: records who imports what while ComfyUI loads the pack.
WATCH = """
import builtins, json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import comfy_host, comfy_launch

base, root = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[1]).parent
flags = comfy_host.base_directory(base)
comfy_launch.boot(comfy_host.comfyui(), ["--cpu", *flags])
plain, seen = builtins.__import__, set()

def watching(name, globals=None, locals=None, fromlist=(), level=0):
    place = (globals or {}).get("__file__") or ""
    folders = [str(parent) for parent in pathlib.Path(place).parents]
    module = plain(name, globals, locals, fromlist, level)  # raises where it is not installed
    if level == 0 and any(folder.endswith("custom_nodes/diffscaler") for folder in folders):
        seen.add(name.split(".")[0])
    return module

builtins.__import__ = watching
pack = comfy_launch.load_pack(base / "custom_nodes" / "diffscaler")
builtins.__import__ = plain
sys.stdout.write("IMPORTED " + json.dumps([sorted(seen), len(pack.nodes.NODES)]) + "\\n")
"""


@pytest.mark.slow
def test_the_pack_loads_on_what_comfyui_has(comfyui_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WATCH, str(ROOT / "scripts"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("IMPORTED ")]
    assert lines, result.stderr
    names, nodes = json.loads(lines[0].removeprefix("IMPORTED "))
    packages = _packages(set(names)) - {"triton"}  # torch's own, on CUDA
    assert nodes
    assert {"torch", "safetensors"} <= packages  # something was recorded at all
    needed, _ = _declared()
    assert packages <= needed | _listed_by(comfyui_path)
    assert needed <= _listed_by(comfyui_path)


def _listed_by(comfyui: Path) -> set[str]:
    lines = (comfyui / "requirements.txt").read_text().splitlines()
    return {_plain(line) for line in lines if line.strip() and not line.startswith("#")}
