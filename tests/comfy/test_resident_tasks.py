"""Many tasks resident at once, a random few of them in every batch, run as the server runs them."""

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Graph = dict[str, Any]
TASKS, ROWS, BATCHES = 64, 4, 60


def _node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


class Desk:
    """Runs workflows with ComfyUI's own executor, which keeps what the last workflow named."""

    def __init__(self, tiny: Any, output: Path) -> None:
        import execution

        self.output = output
        quiet = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
        self._executor = execution.PromptExecutor(
            quiet,
            cache_type=execution.CacheType.CLASSIC,
            cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0},
        )
        self._base = {
            "model": _node("UNETLoader", unet_name="tiny_sd3.safetensors", weight_dtype="default"),
            "latent": _node("EmptySD3LatentImage", width=64, height=64, batch_size=ROWS),
            "positive": _node("DiffScalerTaskConditioning", task=["0", 0], prompt="flower"),
            "negative": _node("DiffScalerTaskConditioning", task=["0", 0], prompt=""),
            **{
                str(i): _node("DiffScalerLoadTask", task_name=f"resident_{i}.safetensors")
                for i in range(TASKS)
            },
        }

    def run(self, graph: Graph) -> None:
        """Runs a workflow that ends in the node 'save'."""
        self._executor.execute({**self._base, **graph}, "prompt", {}, ["save"])
        failures = [m for kind, m in self._executor.status_messages if kind == "execution_error"]
        assert not failures, failures[0]["exception_message"]

    def sampled(self, source: Graph, model: Any, conds: Any, seed: int) -> Tensor:
        """Draws ROWS latents; the file they were saved to is gone afterwards."""
        positive, negative = conds
        self.run(
            {
                **source,
                "sample": _node(
                    "KSampler", model=model, positive=positive, negative=negative, seed=seed,
                    latent_image=["latent", 0], steps=2, cfg=4.0, sampler_name="euler",
                    scheduler="normal", denoise=1.0,
                ),
                "save": _node("SaveLatent", samples=["sample", 0], filename_prefix="resident"),
            }
        )  # fmt: skip
        (file,) = self.output.glob("resident_*.latent")
        latents = load_file(file)["latent_tensor"]
        file.unlink()
        return latents

    def mixed(self, chosen: list[int], seed: int) -> Tensor:
        """Draws a batch whose rows run these tasks."""
        route = _node(
            "DiffScalerRouteTasks",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            strengths="",
            mode="one task per latent",
            component="auto",
            **{f"tasks.task{row}": [str(i), 0] for row, i in enumerate(chosen)},
        )
        conds = ["route", 1], ["route", 2]
        return self.sampled({"route": route}, ["route", 0], conds, seed)

    def alone(self, chosen: int, seed: int) -> Tensor:
        """Draws a batch that all runs one task."""
        apply = _node(
            "DiffScalerApplyTask", model=["model", 0], task=[str(chosen), 0], strength=1.0
        )
        conds = ["positive", 0], ["negative", 0]
        return self.sampled({"apply": apply}, ["apply", 0], conds, seed)


@pytest.fixture
def desk(tiny: Any, tiny_models: Path, pack: ModuleType, comfy_base: Path) -> Iterator[Desk]:
    model, draw = tiny.load("tiny_sd3"), random.Random(0)
    folder = comfy_base / "models" / "diffscaler"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [tiny.prompt(seed)[0] for seed in (2, 1)]
    stored = {
        "context": torch.cat([context for context, _ in prompts]),
        "pooled": torch.cat([more["pooled_output"] for _, more in prompts]),
    }
    files = [folder / f"resident_{i}.safetensors" for i in range(TASKS)]
    for i, file in enumerate(files):
        task = tiny.task(model, i, rank=draw.randint(4, 8), name=f"resident {i}")
        if i == 0:
            task = task.replace(conditioning=stored).with_info(prompts=["", "flower"])
        tiny.core.save_task(task, file)
    yield Desk(tiny, comfy_base / "output")
    for file in files:
        file.unlink()


def _tensor_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@pytest.mark.slow
def test_random_mixed_batches_hold_no_more_memory_and_equal_separate_runs(desk: Desk) -> None:
    draw = random.Random(1)
    order = draw.sample(range(TASKS), TASKS)  # every task runs once in the first few batches
    held: list[int] = []
    for batch in range(BATCHES):
        chosen = order[batch * ROWS : (batch + 1) * ROWS] or draw.sample(range(TASKS), ROWS)
        together = desk.mixed(chosen, seed=batch)
        if batch % 15 == 14:
            alone = [desk.alone(task, seed=batch) for task in chosen]
            for row, own in enumerate(alone):
                assert (together[row] - own[row]).abs().max() <= 1e-5 * own.abs().max()
                assert (together[row] - alone[row - 1][row]).abs().max() > 0.1 * own.abs().max()
        if batch % 5 == 4:
            held.append(_tensor_bytes())
    middle = len(held) // 2
    assert max(held[middle:]) <= 1.02 * max(held[:middle])
