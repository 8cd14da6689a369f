"""What the load node's browser reads comes from ComfyUI's own routes; this is what it relies on."""

import urllib.parse
from pathlib import Path
from typing import Any

import pytest

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "diffscaler"
FILES = sorted(POCKET.glob("*.safetensors"))


def _metadata(server: Any, name: str) -> Any:
    return server.get("/view_metadata/diffscaler?" + urllib.parse.urlencode({"filename": name}))


def test_node_lists_the_files_to_show(server: Any) -> None:
    spec = server.get("/object_info/DiffScalerLoadTask")["DiffScalerLoadTask"]["input"]
    kind, facts = spec["required"]["task_name"]
    options = kind if isinstance(kind, list) else facts["options"]
    assert {path.name for path in FILES} <= set(options)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_route_gives_a_files_metadata_and_size(server: Any, path: Path) -> None:
    metadata = _metadata(server, path.name)
    assert metadata["diffscaler.format"] == "1"
    assert "family" in metadata["diffscaler.config"]
    (listed,) = [f for f in server.get("/experiment/models/diffscaler") if f["name"] == path.name]
    assert listed["size"] == path.stat().st_size


@pytest.mark.parametrize("name", ["../vae/diffscaler_pocket_vae.safetensors", "/etc/passwd", ""])
def test_route_gives_nothing_outside_the_folder(server: Any, name: str) -> None:
    with pytest.raises(RuntimeError, match="404"):
        _metadata(server, name)
