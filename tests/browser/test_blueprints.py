"""The subgraph blueprints: listed by the server, added to a graph in the real frontend, run."""

import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[2]
ACT = Path(__file__).parent / "acts" / "blueprint.mjs"
FILES = sorted((ROOT / "subgraphs").glob("*.json"))
APPLY = "Load and Apply DiffScaler Task"
TRAIN = "Train, Save and Apply DiffScaler Task"
CONTROL = "Draw from DiffScaler Control Picture"

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BASE: dict[str, Any] = {
    "1": {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": "diffscaler_pocket.safetensors", "weight_dtype": "default"},
    },
    "2": {"class_type": "VAELoader", "inputs": {"vae_name": "diffscaler_pocket_vae.safetensors"}},
    "3": {
        "class_type": "EmptySD3LatentImage",
        "inputs": {"width": 128, "height": 128, "batch_size": 1},
    },
    "4": {"class_type": "DiffScalerLoadTask", "inputs": {"task_name": "words.safetensors"}},
    "5": {
        "class_type": "DiffScalerTaskConditioning",
        "inputs": {"task": ["4", 0], "prompt": "cat"},
    },
    "6": {"class_type": "DiffScalerTaskConditioning", "inputs": {"task": ["4", 0], "prompt": ""}},
}
SAMPLER = {
    "positive": ["5", 0],
    "negative": ["6", 0],
    "latent_image": ["3", 0],
    "seed": 7,
    "steps": 4,
    "cfg": 3.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
}
DRAWN: dict[str, Any] = {
    **BASE,
    "7": {"class_type": "KSampler", "inputs": SAMPLER},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["2", 0]}},
    "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
}
CONTROLLED: dict[str, Any] = {
    **BASE,
    "7": {"class_type": "LoadImage", "inputs": {"image": "silhouette_sailboat.png"}},
    "8": {"class_type": "PreviewImage", "inputs": {}},
}
ACTS: dict[str, dict[str, Any]] = {
    APPLY: {
        "api": DRAWN,
        "into": {"model": ["1", 0]},
        "from": {"model": ["7", "model"]},
        "values": {"task_name": "neon.safetensors", "strength": 0.75},
    },
    CONTROL: {
        "api": CONTROLLED,
        "into": {
            "model": ["1", 0],
            "positive": ["5", 0],
            "negative": ["6", 0],
            "vae": ["2", 0],
            "image": ["7", 0],
            "latent_image": ["3", 0],
        },
        "from": {"image": ["8", "images"]},
        "values": {"task_name": "silhouette.safetensors", "steps": 4},
    },
    TRAIN: {
        "api": DRAWN,
        "into": {"model": ["1", 0], "vae": ["2", 0], "words": ["4", 0]},
        "from": {"model": ["7", "model"]},
        "values": {"name": "blueprint_test", "steps": 2},
    },
}


@pytest.fixture(scope="module")
def added(make_workflows: ModuleType, server: Any) -> dict[str, Any]:
    """What came of each blueprint in the frontend."""
    jobs = [
        {"kind": "act", "module": str(ACT), "given": {"title": title, **act}}
        for title, act in ACTS.items()
    ]
    return dict(zip(ACTS, make_workflows.in_frontend(server, jobs), strict=True))


def _pictures(server: Any, entry: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in server.images(entry)]


def test_server_lists_and_gives_every_file(server: Any) -> None:
    listed = server.get("/global_subgraphs")
    ours = {
        entry["name"]: key
        for key, entry in listed.items()
        if entry["info"]["node_pack"] == "custom_nodes.diffscaler"
    }
    assert set(ours) == {path.stem for path in FILES} == set(ACTS)
    for path in FILES:
        given = json.loads(server.get(f"/global_subgraphs/{ours[path.stem]}")["data"])
        assert given == json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_blueprint_uses_known_nodes_and_inputs(server: Any, path: Path) -> None:
    known = server.get("/object_info")
    content = json.loads(path.read_text(encoding="utf-8"))
    (outer,) = content["nodes"]
    (inner,) = content["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"]
    assert [slot["name"] for slot in outer["inputs"]] == [slot["name"] for slot in inner["inputs"]]
    assert len({slot["name"] for slot in inner["inputs"]}) == len(inner["inputs"])
    for node in inner["nodes"]:
        groups = known[node["type"]]["input"].values()
        names = {name for group in groups for name in group}
        assert {slot["name"].split(".")[0] for slot in node["inputs"]} <= names


def test_library_shows_them_under_their_own_heading(added: dict[str, Any]) -> None:
    shown = {one["title"]: one for one in added[APPLY]["listed"]}
    for title in ACTS:
        assert shown[title]["category"] == "Subgraph Blueprints/DiffScaler"
        assert "task" in shown[title]["description"]


@pytest.mark.parametrize("title", ACTS)
def test_an_added_blueprint_runs_and_draws(added: dict[str, Any], server: Any, title: str) -> None:
    made = added[title]
    assert made["refused"] is None
    assert made["added"]["title"] == title
    (picture,) = _pictures(server, server.wait(made["prompt_id"], timeout=400))
    assert picture.size == (128, 128)
    assert max(high - low for low, high in picture.getextrema()) > 60  # no plain field


def test_it_draws_what_its_nodes_draw(added: dict[str, Any], server: Any) -> None:
    by_hand = {
        **DRAWN,
        "7": {"class_type": "KSampler", "inputs": {**SAMPLER, "model": ["11", 0]}},
        "10": {"class_type": "DiffScalerLoadTask", "inputs": {"task_name": "neon.safetensors"}},
        "11": {
            "class_type": "DiffScalerApplyTask",
            "inputs": {"model": ["1", 0], "task": ["10", 0], "strength": 0.75},
        },
    }
    plain = {**DRAWN, "7": {"class_type": "KSampler", "inputs": {**SAMPLER, "model": ["1", 0]}}}
    (wanted,) = _pictures(server, server.run(by_hand, timeout=400))
    (base,) = _pictures(server, server.run(plain, timeout=400))
    (got,) = _pictures(server, server.wait(added[APPLY]["prompt_id"], timeout=400))
    assert ImageChops.difference(got, wanted).getbbox() is None
    assert ImageChops.difference(got, base).getbbox() is not None
