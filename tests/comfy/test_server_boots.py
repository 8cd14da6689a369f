"""The pack in a real ComfyUI: loaded by its loader, and behind its server."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def test_pack_loads_under_its_path_and_leaves_comfyui_its_nodes(
    comfy: ModuleType, pack: ModuleType
) -> None:
    import nodes

    assert nodes is comfy
    assert Path(inspect.getfile(pack)).resolve() == ROOT / "__init__.py"
    assert pack.nodes.__name__ == f"{pack.__name__}.nodes"


def test_every_listed_node_is_known_to_comfyui(comfy: ModuleType, pack: ModuleType) -> None:
    for node in pack.nodes.NODES:
        assert comfy.NODE_CLASS_MAPPINGS[node.GET_SCHEMA().node_id] is node


def test_model_folder_lists_safetensors_only(pack: ModuleType, comfy_base: Path) -> None:
    import folder_paths

    folder = comfy_base / "models" / "diffscaler"
    for name in ("task.safetensors", "task.ckpt", "notes.txt"):
        (folder / name).write_bytes(b"")
    listed = folder_paths.get_filename_list("diffscaler")
    assert "task.safetensors" in listed
    assert all(name.endswith(".safetensors") for name in listed)


def test_model_folder_keeps_the_users_extra_paths(pack: ModuleType, comfy_base: Path) -> None:
    import folder_paths

    paths = [Path(path) for path in folder_paths.get_folder_paths("diffscaler")]
    assert paths == [
        ROOT / "assets" / "pocket" / "diffscaler",  # from extra_model_paths.yaml
        ROOT / "assets" / "tasks",
        comfy_base / "models" / "diffscaler",
        comfy_base / "output" / "diffscaler",
    ]


def test_server_loads_the_pack(server: Any, pack: ModuleType) -> None:
    assert "IMPORT FAILED" not in server.log.read_text()
    known = server.get("/object_info")
    assert "KSampler" in known
    ids = [node.GET_SCHEMA().node_id for node in pack.nodes.NODES]
    assert [name for name in ids if name not in known] == []
    assert all(known[name]["category"].split("/")[0] == "DiffScaler" for name in ids)


def test_server_knows_the_model_folder(server: Any) -> None:
    assert "diffscaler" in server.get("/models")
    assert isinstance(server.get("/models/diffscaler"), list)


def test_server_offers_the_pocket_base(server: Any) -> None:
    assert server.get("/models/diffusion_models")
    assert server.get("/models/vae")
