"""The picking node behind a real server: a drawing of the pack's own, and two shipped tasks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Graph = dict[str, Any]
INK = Path(__file__).resolve().parents[2] / "assets" / "examples" / "ink"


def _node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def graph(server: Any) -> Graph:
    """Which of neon and ink drew the fox; then a latent by the base, by ink, by what was found."""
    folder: Path = server.log.parent / "input"
    folder.mkdir(exist_ok=True)
    shutil.copy(INK / "fox.png", folder)
    loaded = {n: _node("DiffScalerLoadTask", task_name=f"{n}.safetensors") for n in ("ink", "neon")}
    return {
        **loaded,
        "model": _node(
            "UNETLoader", unet_name="diffscaler_pocket.safetensors", weight_dtype="default"
        ),
        "vae": _node("VAELoader", vae_name="diffscaler_pocket_vae.safetensors"),
        "words": _node("DiffScalerLoadTask", task_name="words.safetensors"),
        "nothing": _node("DiffScalerTaskConditioning", task=["words", 0], prompt=""),
        "image": _node("LoadImage", image="fox.png"),
        "latent": _node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "pick": _node(
            "DiffScalerPickTask",
            model=["model", 0],
            vae=["vae", 0],
            image=["image", 0],
            probes=8,
            threshold=3.0,
            if_none="stop",
            seed=0,
            conditioning=["nothing", 0],
            **{"tasks.task0": ["neon", 0], "tasks.task1": ["ink", 0]},
        ),
        "name": _node("PreviewAny", source=["pick", 1]),
        "report": _node("PreviewAny", source=["pick", 2]),
        "chart": _node("SaveImage", images=["pick", 3], filename_prefix="chart"),
    }


def _drawn(server: Any, graph: Graph, **tasks: str) -> tuple[dict[str, Tensor], Any]:
    for name, task in tasks.items():
        graph[f"with_{name}"] = _node(
            "DiffScalerApplyTask", model=["model", 0], task=[task, 0], strength=1.0
        )
        graph[f"sample_{name}"] = _node(
            "KSampler",
            model=[f"with_{name}", 0],
            positive=["nothing", 0],
            negative=["nothing", 0],
            latent_image=["latent", 0],
            seed=0,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        graph[f"save_{name}"] = _node(
            "SaveLatent", samples=[f"sample_{name}", 0], filename_prefix=f"picked/{name}"
        )
    entry = server.run(graph, timeout=600)
    folder = server.log.parent / "output" / "picked"
    files = {name: sorted(folder.glob(f"{name}_*.latent"))[-1] for name in tasks}
    return {name: load_file(file)["latent_tensor"] for name, file in files.items()}, entry


def test_what_drew_a_picture_draws_the_next(server: Any, graph: Graph) -> None:
    latents, entry = _drawn(server, graph, found="pick", ink="ink", neon="neon")
    assert torch.equal(latents["found"], latents["ink"])
    assert not torch.equal(latents["found"], latents["neon"])
    assert entry["outputs"]["name"]["text"] == ["ink"]
    (report,) = entry["outputs"]["report"]["text"]
    assert report.startswith("ink: beats the base by ")
    assert entry["outputs"]["pick"]["text"] == [report]
    (chart,) = server.images(entry)
    assert chart[:4] == b"\x89PNG"


def test_if_none_fits_the_workflow_stops_and_says_so(server: Any, graph: Graph) -> None:
    graph["pick"]["inputs"]["tasks.task1"] = ["neon", 0]
    with pytest.raises(Exception, match=r"DiffScalerPickTask failed.*none of them: neon"):
        server.run(graph, timeout=600)
