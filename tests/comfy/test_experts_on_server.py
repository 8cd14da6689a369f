"""Experts and their router behind a real server, on the pocket base."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from .formula import close

ROWS = 6
EXPERTS = ("fruits", "smileys")
Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def sampled(server: Any, models: dict[str, str], **nodes: Graph) -> dict[str, Tensor]:
    """Draws the same latents without a prompt under several models; returns them by name."""
    graph = {
        "model": node(
            "UNETLoader", unet_name="diffscaler_pocket.safetensors", weight_dtype="default"
        ),
        "words": node("DiffScalerLoadTask", task_name="words.safetensors"),
        "empty": node("DiffScalerTaskConditioning", task=["words", 0], prompt=""),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=ROWS),
        **{n: node("DiffScalerLoadTask", task_name=f"{n}.safetensors") for n in EXPERTS},
        **nodes,
    }
    for name, model in models.items():
        graph[f"sample {name}"] = node(
            "KSampler",
            model=[model, 0], positive=["empty", 0], negative=["empty", 0],
            latent_image=["latent", 0], seed=7, steps=4, cfg=2.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        )  # fmt: skip
        graph[f"save {name}"] = node(
            "SaveLatent", samples=[f"sample {name}", 0], filename_prefix=f"experts_{name}"
        )
    server.run(graph)
    folder: Path = server.log.parent / "output"
    return {
        name: load_file(sorted(folder.glob(f"experts_{name}_*.latent"))[-1])["latent_tensor"]
        for name in models
    }


def test_latents_of_one_batch_become_what_their_own_expert_draws(server: Any) -> None:
    routed = node(
        "DiffScalerRouteExperts",
        model=["model", 0], router_name="fruits_smileys.safetensors", mode="top1", strength=1.0,
        **{f"tasks.task{i}": [name, 0] for i, name in enumerate(EXPERTS)},
    )  # fmt: skip
    alone = {
        f"with {name}": node(
            "DiffScalerApplyTask", model=["model", 0], task=[name, 0], strength=1.0
        )
        for name in EXPERTS
    }
    names = {"base": "model", "both": "routed", **{n: f"with {n}" for n in EXPERTS}}
    found = sampled(server, names, routed=routed, **alone)
    runs = {name: 0 for name in EXPERTS}
    for row in range(ROWS):
        assert not close(found["both"][row], found["base"][row], 1e-2)
        for name in EXPERTS:  # a row whose expert changed on the way is neither's
            runs[name] += close(found["both"][row], found[name][row])
    assert min(runs.values()) >= 1, runs
    assert sum(runs.values()) >= ROWS // 2, runs


def test_a_router_that_is_not_there_is_one_line(server: Any) -> None:
    routed = node(
        "DiffScalerRouteExperts",
        model=["model", 0], router_name="none.safetensors", mode="top1", strength=1.0,
        **{"tasks.task0": ["fruits", 0]},
    )  # fmt: skip
    with pytest.raises(Exception, match="router_name"):
        sampled(server, {"both": "routed"}, routed=routed)
