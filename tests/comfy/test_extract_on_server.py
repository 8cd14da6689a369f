"""The extraction node behind a real server: a LoRA by the stock loader, and the task made of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .test_nodes_on_server import Desk, _apply, _close, _node


@pytest.fixture(scope="module")
def desk(server: Any, tiny: Any, tiny_models: Path) -> Desk:
    desk = Desk(server)
    models = desk.folder / "models"
    for folder in ("diffusion_models", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny_models / "tiny_sd3.safetensors", models / "diffusion_models")
    generator = torch.Generator().manual_seed(0)
    file = {}
    for layer, size in (("attn.qkv", (384, 128)), ("mlp.fc1", (512, 128))):
        name = f"diffusion_model.joint_blocks.0.x_block.{layer}"
        for leaf, shape in (("up", (size[0], 2)), ("down", (2, size[1]))):
            file[f"{name}.lora_{leaf}.weight"] = 0.3 * torch.randn(*shape, generator=generator)
    save_file(file, models / "loras" / "tiny.safetensors")
    prompts = [tiny.prompt(seed)[0] for seed in (2, 1)]
    stored = {
        "context": torch.cat([context for context, _ in prompts]),
        "pooled": torch.cat([more["pooled_output"] for _, more in prompts]),
    }
    for seed, name in ((1, "a"), (2, "b")):
        task = tiny.task(tiny.load("tiny_sd3"), seed, name=name)
        task = task.replace(conditioning=stored).with_info(prompts=["", "flower"])
        tiny.core.save_task(task, models / "diffscaler" / f"{name}.safetensors")
    return desk


def test_a_lora_and_the_task_extracted_from_it_draw_the_same(desk: Desk) -> None:
    graph = desk.base()
    graph["lora"] = _node(
        "LoraLoaderModelOnly",
        model=["model", 0],
        lora_name="tiny.safetensors",
        strength_model=0.8,
    )
    graph["task"] = _node(
        "DiffScalerExtractTask", tuned=["lora", 0], base=["model", 0], name="from lora", rank=8
    )
    graph["report"] = _node("PreviewAny", source=["task", 1])
    graph["with_task"] = _apply("task")
    found = desk.sample(graph, lora=["lora", 0], task=["with_task", 0], base=["model", 0])
    assert _close(found["task"], found["lora"], 1e-4)
    assert not _close(found["base"], found["lora"], 1e-3)
