"""Routes, comparisons, schedules and regions behind a real server: the pocket base in workflows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from .formula import close

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def slots(*tasks: str) -> Graph:
    return {f"tasks.task{i}": [task, 0] for i, task in enumerate(tasks)}


class Desk:
    """A server, and short ways to run workflows on it."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.folder: Path = server.log.parent
        self._runs = 0

    def base(self) -> Graph:
        tasks = {
            name: node("DiffScalerLoadTask", task_name=f"{name}.safetensors")
            for name in ("words", "ink", "neon")
        }
        return {
            "model": node(
                "UNETLoader", unet_name="diffscaler_pocket.safetensors", weight_dtype="default"
            ),
            "vae": node("VAELoader", vae_name="diffscaler_pocket_vae.safetensors"),
            **tasks,
            "cat": node("DiffScalerTaskConditioning", task=["words", 0], prompt="cat"),
            "house": node("DiffScalerTaskConditioning", task=["words", 0], prompt="house"),
            "empty": node("DiffScalerTaskConditioning", task=["words", 0], prompt=""),
            "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        }

    def sample(self, graph: Graph, **branches: dict[str, Any]) -> dict[str, Tensor]:
        """Runs a sampler for each branch (its inputs); returns the latents by the branch's name."""
        self._runs += 1
        saved = f"rows_{self._runs}"
        for name, inputs in branches.items():
            start = {
                "positive": ["cat", 0],
                "negative": ["empty", 0],
                "latent_image": ["latent", 0],
            }
            graph[f"sample {name}"] = node(
                "KSampler",
                **{"model": ["model", 0], **start, **inputs},
                seed=5,
                steps=3,
                cfg=3.0,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
            )
            graph[f"save {name}"] = node(
                "SaveLatent", samples=[f"sample {name}", 0], filename_prefix=f"{saved}/{name}"
            )
        self.server.run(graph)
        folder = self.folder / "output" / saved
        return {n: load_file(folder / f"{n}_00001_.latent")["latent_tensor"] for n in branches}


@pytest.fixture(scope="module")
def desk(server: Any) -> Desk:
    return Desk(server)


def apply(task: str, model: str = "model", **inputs: Any) -> Graph:
    chosen = {"model": [model, 0], "task": [task, 0], "strength": 1.0, **inputs}
    return node("DiffScalerApplyTask", **chosen)


def test_a_comparison_is_the_separate_runs_and_a_labelled_grid(desk: Desk) -> None:
    graph = desk.base()
    graph["compare"] = node(
        "DiffScalerCompareTasks",
        model=["model", 0],
        positive=["cat", 0],
        negative=["empty", 0],
        latent=["latent", 0],
        strengths="1, 0.5",
        include_base=True,
        **slots("ink", "neon"),
    )
    graph["with ink"], graph["with neon"] = apply("ink"), apply("neon", strength=0.5)
    names = ("model", "positive", "negative", "latent_image")
    compared = {name: ["compare", i] for i, name in enumerate(names)}
    result = desk.sample(
        graph,
        compared=compared,
        base={},
        ink={"model": ["with ink", 0]},
        neon={"model": ["with neon", 0]},
    )
    assert len(result["compared"]) == 3
    for row, name in enumerate(("base", "ink", "neon")):
        assert close(result["compared"][row], result[name][0], 2e-5)
    assert not close(result["ink"], result["base"], 1e-2)

    graph["decode"] = node("VAEDecode", samples=["sample compared", 0], vae=["vae", 0])
    graph["grid"] = node(
        "DiffScalerTaskGrid", images=["decode", 0], names=["compare", 4], columns=3
    )
    graph["show"] = node("SaveImage", images=["grid", 0], filename_prefix="task_grid")
    graph["text"] = node("PreviewAny", source=["compare", 4])
    entry = desk.server.run(graph)
    assert entry["outputs"]["text"]["text"] == ["base\nink\nneon 0.5"]
    (file,) = (desk.folder / "output").glob("task_grid_*.png")
    page = np.asarray(Image.open(file).convert("L"))
    assert page.shape[1] > 3 * 128 > page.shape[0] > 128 + 13


def test_two_prompts_with_tasks_of_their_own_are_combined(desk: Desk) -> None:
    """Each alone is what its task makes of it; a negative that is not routed runs the base."""
    graph = desk.base()
    graph["first"] = node(
        "DiffScalerRouteTasks",
        model=["model", 0],
        positive=["cat", 0],
        strengths="",
        mode="all tasks together",
        negative=["empty", 0],
        **slots("ink"),
    )
    graph["second"] = node(
        "DiffScalerRouteTasks",
        model=["first", 0],
        positive=["house", 0],
        strengths="0.5",
        mode="all tasks together",
        **slots("neon"),
    )
    graph["both"] = node(
        "ConditioningCombine", conditioning_1=["first", 1], conditioning_2=["second", 1]
    )
    graph["with ink"] = apply("ink")
    last = {"model": ["second", 0]}
    result = desk.sample(
        graph,
        first={**last, "positive": ["first", 1], "negative": ["first", 2]},
        ink={"model": ["with ink", 0]},
        both={**last, "positive": ["both", 0]},
        plain={},
        base={**last},
    )
    assert close(result["first"], result["ink"], 2e-5)
    assert close(result["base"], result["plain"], 2e-5)  # nothing is routed there
    assert not close(result["both"], result["first"], 1e-2)


def test_a_sampler_behind_an_unconnected_negative_does_not_run(desk: Desk) -> None:
    """ComfyUI tells the page the reason that the output carries, and goes on with the rest."""
    graph = desk.base()
    graph["route"] = node(
        "DiffScalerRouteTasks",
        model=["model", 0],
        positive=["cat", 0],
        strengths="",
        mode="all tasks together",
        **slots("ink"),
    )
    used = {"model": ["route", 0], "positive": ["route", 1], "negative": ["route", 2]}
    with pytest.raises(FileNotFoundError, match="wrong_00001_"):
        desk.sample(graph, wrong=used)


def test_another_number_of_latents_is_told_on_the_sampler(desk: Desk) -> None:
    graph = desk.base()
    graph["route"] = node(
        "DiffScalerRouteTasks",
        model=["model", 0],
        positive=["cat", 0],
        strengths="",
        mode="one task per latent",
        **slots("ink", "neon"),
    )
    graph["three"] = node("RepeatLatentBatch", samples=["latent", 0], amount=3)
    used = {"model": ["route", 0], "positive": ["route", 1], "latent_image": ["three", 0]}
    with pytest.raises(Exception, match=r"for 2 latents, but the latent batch has 3") as error:
        desk.sample(graph, wrong=used)
    assert "KSampler" in str(error.value)


def test_schedules_and_regions_in_one_workflow(desk: Desk) -> None:
    graph = desk.base()
    graph["late"] = node(
        "DiffScalerScheduleTask",
        task=["ink", 0],
        points="",
        interpolation="linear",
        start=0.4,
    )
    graph["scheduled"] = apply("late")
    graph["ranged"] = apply("ink", start_percent=0.4)
    graph["whole"] = node("SolidMask", value=1.0, width=64, height=64)
    graph["nowhere"] = node("SolidMask", value=0.0, width=64, height=64)
    graph["half"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["left"] = node(
        "MaskComposite",
        destination=["nowhere", 0],
        source=["half", 0],
        x=0,
        y=0,
        operation="add",
    )
    graph["everywhere"] = apply("neon", region=["whole", 0])
    graph["nothing"] = apply("neon", region=["nowhere", 0])
    graph["part"] = apply("neon", region=["left", 0])
    graph["neon alone"] = apply("neon")
    names = {"scheduled", "ranged", "everywhere", "nothing", "part", "neon alone", "model"}
    result = desk.sample(graph, **{name: {"model": [name, 0]} for name in names})
    assert torch.equal(result["scheduled"], result["ranged"])
    assert close(result["everywhere"], result["neon alone"], 2e-5)
    assert torch.equal(result["nothing"], result["model"])
    near = [(result["part"] - result[n]).abs() for n in ("neon alone", "model")]
    assert near[0][..., :6].mean() < near[1][..., :6].mean()
    assert near[1][..., 10:].mean() < near[0][..., 10:].mean()


def test_wrong_points_are_told_with_their_line(desk: Desk) -> None:
    graph = desk.base()
    graph["wrong"] = node(
        "DiffScalerScheduleTask", task=["ink", 0], points="0: 1\n2: 0", interpolation="linear"
    )
    graph["applied"] = apply("wrong")
    with pytest.raises(Exception, match=r"DiffScalerScheduleTask failed.*line 2"):
        desk.sample(graph, wrong={"model": ["applied", 0]})
