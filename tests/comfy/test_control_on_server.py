"""The control node behind a real server: the pocket base in a workflow in API format."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

Graph = dict[str, Any]
WORDS = "words.safetensors"

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"


def _node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module")
def base(server: Any, pack: ModuleType, part: Any) -> Graph:
    """Loaders, prompts and a control picture of another size, on the server."""
    folder: Path = server.log.parent
    core = pack.diffscaler_core
    pipe = part("diffscaler_core.pocket").load_pipeline(POCKET)
    task = core.new_task(pipe.transformer, rank=2, control="edges", name="edges")
    generator = torch.Generator().manual_seed(1)

    def noisy(tensors: Any) -> Any:
        return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}

    layers = {name: noisy(own) for name, own in task.layers.items()}
    task = task.replace(layers=layers, extras=noisy(task.extras))
    core.save_task(task, folder / "models" / "diffscaler" / "random_edges.safetensors")
    plain = core.new_task(pipe.transformer, rank=2, name="plain")
    core.save_task(plain, folder / "models" / "diffscaler" / "plain.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((320, 240), Image.Resampling.NEAREST)
    (folder / "input").mkdir(exist_ok=True)
    picture.save(folder / "input" / "control.png")
    return {
        "model": _node(
            "UNETLoader", unet_name="diffscaler_pocket.safetensors", weight_dtype="default"
        ),
        "vae": _node("VAELoader", vae_name="diffscaler_pocket_vae.safetensors"),
        "words": _node("DiffScalerLoadTask", task_name=WORDS),
        "edges": _node("DiffScalerLoadTask", task_name="random_edges.safetensors"),
        "plain": _node("DiffScalerLoadTask", task_name="plain.safetensors"),
        "positive": _node("DiffScalerTaskConditioning", task=["words", 0], prompt="cat"),
        "negative": _node("DiffScalerTaskConditioning", task=["words", 0], prompt=""),
        "latent": _node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "image": _node("LoadImage", image="control.png"),
    }


def _control(
    after: str = "", image: Any = ("image", 0), task: str = "edges", **inputs: Any
) -> Graph:
    """The node, after another of its kind or on the loaders."""
    before = (
        {"model": [after, 0], "positive": [after, 1], "negative": [after, 2]}
        if after
        else {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    )
    more = {"vae": ["vae", 0], "image": list(image), "strength": 1.0, **inputs}
    return _node("DiffScalerControl", **before, task=[task, 0], **more)


def _drawn(server: Any, graph: Graph, *nodes: str) -> dict[str, Tensor]:
    """Draws the base and with each of these control nodes, in one workflow."""
    for name in ("", *nodes):
        source = {
            "model": [name or "model", 0],
            "positive": [name or "positive", 1 if name else 0],
            "negative": [name or "negative", 2 if name else 0],
        }
        graph[f"sample_{name}"] = _node(
            "KSampler",
            seed=3,
            steps=4,
            cfg=3.0,
            sampler_name="euler",
            scheduler="normal",
            latent_image=["latent", 0],
            denoise=1.0,
            **source,
        )
        graph[f"decode_{name}"] = _node("VAEDecode", samples=[f"sample_{name}", 0], vae=["vae", 0])
        graph[f"save_{name}"] = _node(
            "SaveImage", images=[f"decode_{name}", 0], filename_prefix=f"control/{name or 'base'}"
        )
    server.run(graph)
    folder = server.log.parent / "output" / "control"
    found = {}
    for name in ("", *nodes):
        file = sorted(folder.glob(f"{name or 'base'}_0*.png"))[-1]
        found[name] = torch.from_numpy(np.asarray(Image.open(file)).astype(np.float32))
    return found


def test_controls_in_a_workflow(server: Any, base: Graph) -> None:
    graph = dict(base)
    graph["flat"] = _node("EmptyImage", width=64, height=64, batch_size=1, color=0x204080)
    graph["one"] = _control()
    graph["other"] = _control(image=("flat", 0))
    graph["two"] = _control("one", image=("flat", 0), strength=0.5, control_in_uncond=False)
    graph["zero"] = _control(strength=0.0)
    drawn = _drawn(server, graph, "one", "other", "two", "zero")
    assert torch.equal(drawn["zero"], drawn[""])
    pictures = [drawn[name] for name in ("", "one", "other", "two")]
    for i, a in enumerate(pictures):
        assert a.std() > 1
        assert not any((a - b).abs().mean() < 0.5 for b in pictures[:i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "plain"}, "DiffScalerControl failed.*'plain' takes no control picture"),
        ({"image": ("pair", 0)}, "KSampler failed.*2 control images of 'edges' for a latent batch"),
    ],
)
def test_what_does_not_fit_is_said_on_the_node(
    server: Any, base: Graph, change: dict[str, Any], message: str
) -> None:
    graph = dict(base)
    graph["pair"] = _node("EmptyImage", width=64, height=64, batch_size=2, color=0)
    graph["wrong"] = _control(**change)
    with pytest.raises(Exception, match=message) as error:
        _drawn(server, graph, "wrong")
    assert "\n" not in str(error.value).strip()


def test_a_control_task_is_refused_by_the_other_nodes(server: Any, base: Graph) -> None:
    for kind, inputs in (
        ("DiffScalerApplyTask", {"task": ["edges", 0], "strength": 1.0}),
        ("DiffScalerStackTasks", {"tasks.task0": ["edges", 0], "strengths": ""}),
    ):
        graph = dict(base)
        graph["wrong"] = _node(kind, model=["model", 0], **inputs)
        graph["sample"] = _node(
            "KSampler",
            model=["wrong", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=0,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        graph["save"] = _node("SaveLatent", samples=["sample", 0], filename_prefix="refused")
        with pytest.raises(Exception, match=r"takes a control picture.*DiffScaler Control"):
            server.run(graph)
