"""The nodes behind a real server: workflows in API format, results read from its output folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Graph = dict[str, Any]


class Desk:
    """A server with a tiny base, and short ways to build and run workflows on it."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.folder: Path = server.log.parent
        self._runs = 0

    def base(self) -> Graph:
        """A model, a latent, and two prompts that task 'a' stores."""
        return {
            "model": _node("UNETLoader", unet_name="tiny_sd3.safetensors", weight_dtype="default"),
            "latent": _node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
            "a": _node("DiffScalerLoadTask", task_name="a.safetensors"),
            "b": _node("DiffScalerLoadTask", task_name="b.safetensors"),
            "positive": _node("DiffScalerTaskConditioning", task=["a", 0], prompt="flower"),
            "negative": _node("DiffScalerTaskConditioning", task=["a", 0], prompt=""),
        }

    def sample(self, graph: Graph, **branches: Sequence[Any]) -> dict[str, Tensor]:
        """Runs the graph anew; returns each branch's latent, by the branch's name."""
        self._runs += 1
        # The latent is zero anyway; another factor keeps ComfyUI from answering out of its cache.
        graph["start"] = _node(
            "LatentMultiply", samples=["latent", 0], multiplier=0.01 * self._runs
        )
        saved = f"latents_{self._runs}"
        for name, model in branches.items():
            graph[f"sample_{name}"] = _node(
                "KSampler",
                model=list(model),
                seed=0,
                steps=2,
                cfg=4.0,
                sampler_name="euler",
                scheduler="normal",
                positive=["positive", 0],
                negative=["negative", 0],
                latent_image=["start", 0],
                denoise=1.0,
            )
            graph[f"save_{name}"] = _node(
                "SaveLatent", samples=[f"sample_{name}", 0], filename_prefix=f"{saved}/{name}"
            )
        self.server.run(graph)
        folder = self.folder / "output" / saved
        return {
            name: load_file(folder / f"{name}_00001_.latent")["latent_tensor"] for name in branches
        }


def _node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def _apply(task: str, model: str = "model", **inputs: Any) -> Graph:
    chosen = {"model": [model, 0], "task": [task, 0], "strength": 1.0, **inputs}
    return _node("DiffScalerApplyTask", **chosen)


def _close(a: Tensor, b: Tensor, by: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= by * b.abs().max())


@pytest.fixture(scope="module")
def desk(server: Any, tiny: Any, tiny_models: Path) -> Desk:
    desk = Desk(server)
    models = desk.folder / "models"
    (models / "diffusion_models").mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny_models / "tiny_sd3.safetensors", models / "diffusion_models")
    sd3, flux = tiny.load("tiny_sd3"), tiny.load("tiny_flux")
    prompts = [tiny.prompt(seed)[0] for seed in (2, 1)]
    stored = {
        "context": torch.cat([context for context, _ in prompts]),
        "pooled": torch.cat([more["pooled_output"] for _, more in prompts]),
    }
    for name, model, seed in (("a", sd3, 1), ("b", sd3, 2), ("flux", flux, 3)):
        task = tiny.task(model, seed, name=name)
        task = task.replace(conditioning=stored).with_info(prompts=["", "flower"])
        tiny.core.save_task(task, models / "diffscaler" / f"{name}.safetensors")
    (models / "diffscaler" / "broken.safetensors").write_bytes(b"nothing")
    return desk


def test_branches_of_one_workflow_do_not_touch_each_other(desk: Desk) -> None:
    graph = desk.base()
    graph["with_a"] = _apply("a")
    graph["with_b"] = _apply("b", strength=0.5)
    graph["with_both"] = _apply("b", "with_a", strength=0.5)
    graph["stack"] = _node(
        "DiffScalerStackTasks",
        model=["model", 0],
        strengths="1.0, 0.5",
        **{"tasks.task0": ["a", 0], "tasks.task1": ["b", 0]},
    )
    graph["mix"] = _node(
        "DiffScalerCombineTasks",
        strengths="1.0, 0.5",
        name="mix",
        **{"tasks.task0": ["a", 0], "tasks.task1": ["b", 0]},
    )
    graph["with_mix"] = _apply("mix")
    names = ("model", "with_a", "with_both", "with_b", "stack", "with_mix")
    together = desk.sample(graph, **{name: [name, 0] for name in names})
    assert torch.equal(together["stack"], together["with_both"])
    assert _close(together["with_mix"], together["with_both"])
    for name in ("with_b", "model"):
        alone = desk.sample({**desk.base(), name: graph[name]}, **{name: [name, 0]})
        assert torch.equal(alone[name], together[name])
    different = [together[name] for name in names[:4]]
    assert not any(_close(x, y, 1e-3) for i, x in enumerate(different) for y in different[:i])


def test_strength_zero_is_the_base(desk: Desk) -> None:
    graph = desk.base()
    graph["zero"] = _apply("a", strength=0.0)
    graph["parts"] = _apply("a", scale=0.0, shift=0.0, subspace=0.0, component="transformer")
    result = desk.sample(graph, model=["model", 0], zero=["zero", 0], parts=["parts", 0])
    assert torch.equal(result["zero"], result["model"])
    assert torch.equal(result["parts"], result["model"])


def test_a_scaled_task_is_the_task_at_that_strength(desk: Desk) -> None:
    graph = desk.base()
    graph["half"] = _node("DiffScalerScaleTask", task=["a", 0], strength=0.5)
    graph["blocks"] = _node(
        "DiffScalerScaleTask", task=["a", 0], strength=1.0, blocks="0-1: 0.5\n.*: 0.5  # the rest"
    )
    graph["with_half"] = _apply("half")
    graph["with_blocks"] = _apply("blocks")
    graph["at_half"] = _apply("a", strength=0.5)
    names = ("with_half", "with_blocks", "at_half")
    result = desk.sample(graph, **{name: [name, 0] for name in names})
    assert _close(result["with_half"], result["at_half"])
    assert _close(result["with_blocks"], result["at_half"])


def test_save_and_load_give_the_same_picture_and_facts(desk: Desk, pack: ModuleType) -> None:
    graph = desk.base()
    graph["picture"] = _node("EmptyImage", width=300, height=200, batch_size=1, color=0x8080FF)
    graph["saved"] = _node(
        "DiffScalerSaveTask",
        task=["a", 0],
        filename_prefix="diffscaler/copy",
        dtype="keep",
        thumbnail=["picture", 0],
        title="A copy",
        author="somebody",
    )
    desk.server.run(graph)
    file = desk.folder / "output" / "diffscaler" / "copy_00001_.safetensors"
    task = pack.diffscaler_core.load_task(file)
    assert task.modelspec["author"] == "somebody"
    graph = desk.base()
    graph["copy"] = _node("DiffScalerLoadTask", task_name=file.name)
    graph["info"] = _node("DiffScalerTaskInfo", task=["copy", 0])
    graph["show"] = _node("SaveImage", images=["info", 2], filename_prefix="thumbnail")
    graph["with_a"], graph["with_copy"] = _apply("a"), _apply("copy")
    result = desk.sample(graph, a=["with_a", 0], copy=["with_copy", 0])
    assert torch.equal(result["copy"], result["a"])
    entry = desk.server.run({**desk.base(), "copy": graph["copy"], "info": graph["info"]})
    (text,) = entry["outputs"]["info"]["text"]
    assert "A copy" in text
    assert "somebody" in text
    assert f"{task.num_parameters:,}" in text
    assert list((desk.folder / "output").glob("thumbnail_*.png"))


def test_saving_halves_the_size_in_bf16_and_never_overwrites(desk: Desk) -> None:
    folder = desk.folder / "output" / "diffscaler"
    for number in (1, 2):
        graph = desk.base()
        graph["saved"] = _node(
            "DiffScalerSaveTask",
            task=["b", 0],
            filename_prefix="diffscaler/half",
            dtype="bf16",
            title=f"number {number}",
        )
        desk.server.run(graph)
        assert len(list(folder.glob("half_*.safetensors"))) == number
    whole = desk.folder / "models" / "diffscaler" / "b.safetensors"
    assert (folder / "half_00001_.safetensors").stat().st_size < 0.7 * whole.stat().st_size


@pytest.mark.parametrize("prefix", ["../../escape", "/etc/escape", "", ".."])
def test_saving_stays_inside_the_output_folder(desk: Desk, prefix: str) -> None:
    before = {path for path in desk.folder.parent.rglob("*.safetensors")}
    graph = desk.base()
    graph["saved"] = _node("DiffScalerSaveTask", task=["a", 0], filename_prefix=prefix)
    with pytest.raises(Exception, match=r"DiffScalerSaveTask failed.*output folder"):
        desk.server.run(graph)
    assert {path for path in desk.folder.parent.rglob("*.safetensors")} == before


def test_a_wrong_task_is_reported_on_its_node_and_changes_nothing(desk: Desk) -> None:
    before = desk.sample(desk.base(), model=["model", 0])["model"]
    graph = desk.base()
    graph["flux"] = _node("DiffScalerLoadTask", task_name="flux.safetensors")
    graph["wrong"] = _apply("flux")
    with pytest.raises(
        Exception, match=r"DiffScalerApplyTask failed.*'flux'.*does not fit"
    ) as error:
        desk.sample(graph, wrong=["wrong", 0])
    assert "\n" not in str(error.value).strip()
    assert torch.equal(desk.sample(desk.base(), model=["model", 0])["model"], before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.safetensors", "400.*value_not_in_list"),
        ("broken.safetensors", "DiffScalerLoadTask failed.*no safetensors file or is cut short"),
    ],
)
def test_files_that_cannot_be_loaded(desk: Desk, name: str, message: str) -> None:
    graph = desk.base()
    graph["a"]["inputs"]["task_name"] = name
    graph["info"] = _node("DiffScalerTaskInfo", task=["a", 0])
    with pytest.raises(Exception, match=message):
        desk.server.run(graph)


def test_clear_words_for_strengths_that_do_not_fit(desk: Desk) -> None:
    graph = desk.base()
    graph["stack"] = _node(
        "DiffScalerStackTasks",
        model=["model", 0],
        strengths="1, 2, 3",
        **{"tasks.task0": ["a", 0], "tasks.task1": ["b", 0]},
    )
    with pytest.raises(Exception, match="3 strengths for 2 tasks"):
        desk.sample(graph, stack=["stack", 0])


def test_an_overwritten_file_is_loaded_again(desk: Desk) -> None:
    folder = desk.folder / "models" / "diffscaler"
    shutil.copy(folder / "a.safetensors", folder / "changing.safetensors")

    def run() -> dict[str, Tensor]:
        graph = desk.base()
        graph["changing"] = _node("DiffScalerLoadTask", task_name="changing.safetensors")
        graph["with_changing"], graph["with_b"] = _apply("changing"), _apply("b")
        return desk.sample(graph, changing=["with_changing", 0], b=["with_b", 0])

    assert not torch.equal(*run().values())
    shutil.copy(folder / "b.safetensors", folder / "changing.safetensors")
    assert torch.equal(*run().values())
