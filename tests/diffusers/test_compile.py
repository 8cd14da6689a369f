"""torch.compile: what is attached before it acts, and follows every change without a recompile."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    TaskAdapter,
    combine_tasks,
    load_task,
    new_task,
)

INPUTS = {
    "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    "encoder_hidden_states": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)),
    "pooled_projections": torch.randn(2, 12, generator=torch.Generator().manual_seed(3)),
    "timestep": torch.ones(2) * 500,
}


def outputs(model: Any, inputs: Any = INPUTS) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


@pytest.fixture
def case(sd3_case: Any) -> Any:
    """A few layers of one block are enough, and compile in seconds."""

    def shallow() -> Any:
        pipe = sd3_case.build()
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]
        return pipe

    return replace(sd3_case, build=shallow, targets=["attn.to_q", "ff.net.2"])


@pytest.fixture
def pipe(case: Any) -> Any:
    pipe = case.pipe()
    pipe.load_diffscaler(case.task(pipe, "a", 1))
    pipe.load_diffscaler(case.task(pipe, "b", 2))
    return pipe


def graphs() -> int:
    return dynamo.utils.counters["stats"]["unique_graphs"]


def changes(pipe: Any, count: int = 20) -> Iterator[None]:
    for i in range(count):
        if i == 7:
            pipe.disable_diffscaler()
        elif i == 8:
            pipe.enable_diffscaler()
        else:
            pipe.set_diffscaler(["a", "b"], [i / 10, {"scale": 1 - i / 5, "subspace": 0.3}])
        yield


def check_twenty_changes(pipe: Any, compiled: Callable[..., Any], inputs: Any) -> None:
    model = pipe.transformer
    eager, seen = [outputs(model, inputs)], [outputs(compiled, inputs)]
    first = graphs()
    assert first > 0
    for _ in changes(pipe):
        seen.append(outputs(compiled, inputs))
        eager.append(outputs(model, inputs))
    assert graphs() == first
    assert not dynamo.utils.counters["graph_break"]
    for one, other in zip(seen, eager, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert len({float(t.sum()) for t in eager}) >= 20


def test_twenty_changes_need_no_recompile(pipe: Any) -> None:
    compiled = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    check_twenty_changes(pipe, compiled, INPUTS)


class TinyModel(ModelMixin, ConfigMixin):
    """A whole transformer would keep inductor busy for a minute."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

    def forward(self, hidden_states: torch.Tensor, return_dict: bool = True) -> Any:
        return (self.blocks[1](self.blocks[0](hidden_states).relu()),)


class TinyPipeline(DiffusionPipeline):
    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def test_twenty_changes_need_no_recompile_by_inductor(make_noisy: Any) -> None:
    pipe = TinyPipeline(TinyModel())
    for seed, name in enumerate("ab"):
        pipe.load_diffscaler(make_noisy(new_task(pipe.transformer, rank=2, name=name), seed, 0.5))
    compiled = torch.compile(pipe.transformer, fullgraph=True)
    check_twenty_changes(pipe, compiled, {"hidden_states": torch.randn(3, 8)})


def test_rows_cost_one_recompile_and_then_none(pipe: Any) -> None:
    model = pipe.transformer
    compiled = torch.compile(model, backend="eager")
    outputs(compiled)
    with pipe.diffscaler_rows(["a", None]):
        torch.testing.assert_close(outputs(compiled), outputs(model))
    first = graphs()
    for i in range(5):
        with pipe.diffscaler_rows([{"a": i / 5}, {"b": 0.5, "a": 0.1 * i}]):
            torch.testing.assert_close(outputs(compiled), outputs(model))
        pipe.set_diffscaler("a", i / 5)
        torch.testing.assert_close(outputs(compiled), outputs(model))
    assert graphs() == first


def test_the_compiled_model_in_the_pipeline_is_used_and_guarded(pipe: Any, case: Any) -> None:
    expected = case.run(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(case.run(pipe), expected)
    assert pipe.get_list_diffscalers() == {"transformer": ["a", "b"]}
    with pytest.raises(DiffScalerError, match="compiled"):
        pipe.load_diffscaler(case.task(case.pipe(), "c", 3))
    pipe.set_diffscaler("a")
    eager = case.pipe()
    eager.load_diffscaler(case.task(eager, "a", 1))
    torch.testing.assert_close(case.run(pipe), case.run(eager), atol=1e-5, rtol=0)
    pipe.delete_diffscaler("b")
    torch.testing.assert_close(case.run(pipe), case.run(eager), atol=1e-5, rtol=0)
    pipe.unload_diffscaler()
    eager.unload_diffscaler()
    torch.testing.assert_close(case.run(pipe), case.run(eager), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["wrapper", "in_place", "regions"])
def test_a_model_compiled_before_would_ignore_a_task_and_raises(case: Any, how: str) -> None:
    pipe = case.pipe()
    task = case.task(pipe, "a", 1)
    if how == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif how == "in_place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(DiffScalerError, match=r"attach the task before torch\.compile"):
        pipe.load_diffscaler(task)
    assert pipe.get_list_diffscalers() == {}


def swaps(case: Any) -> list[TaskAdapter]:
    """Tasks of the attached shapes, and smaller ones with a gain of their own."""
    tasks = [case.task(case.pipe(), f"new {seed}", seed) for seed in range(3, 7)]
    for i in (1, 3):
        name, tensors = next(iter(tasks[i].layers.items()))  # the other layers: nothing
        narrow = {**tensors, "down": tensors["down"][:3], "up": tensors["up"][:, :3]}
        tasks[i] = tasks[i].replace(layers={name: narrow}).with_info(gain=0.5)
    return tasks


def test_hotswap_after_compiling_needs_no_recompile(pipe: Any, case: Any, tmp_path: Path) -> None:
    tasks, expected = swaps(case), []
    for task in tasks:  # first, as loading into another pipeline drops compiled code
        fresh = case.pipe()
        fresh.load_diffscaler(task)
        fresh.set_diffscaler(task.name, 0.8)
        expected.append(outputs(fresh.transformer))
    pipe.set_diffscaler("a", 0.8)
    compiled = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    outputs(compiled)
    first = graphs()
    for task, picture in zip(tasks, expected, strict=True):
        pipe.load_diffscaler(task, "a", hotswap=True)
        torch.testing.assert_close(outputs(compiled), picture)
    assert graphs() == first
    path = pipe.save_diffscaler(tmp_path, "a")
    assert load_task(path).name == "new 6"
    fresh.unload_diffscaler()
    fresh.load_diffscaler(path)
    fresh.set_diffscaler("new 6", 0.8)
    torch.testing.assert_close(outputs(fresh.transformer), expected[-1])


def test_a_hotswap_that_does_not_fit_changes_nothing(pipe: Any, case: Any) -> None:
    kept = outputs(pipe.transformer)
    task = case.task(case.pipe(), "new", 3)
    wide = combine_tasks([task, task])  # rank 8 into rank 4
    with pytest.raises(MismatchError, match="too small"):
        pipe.load_diffscaler(wide, "b", hotswap=True)
    with pytest.raises(MismatchError, match="activation is 'identity'"):
        pipe.load_diffscaler(task.with_info(activation="identity"), "b", hotswap=True)
    everything = new_task(pipe.transformer, targets="all", rank=2, name="all")
    with pytest.raises(MismatchError, match="not there"):
        pipe.load_diffscaler(everything, "b", hotswap=True)
    with pytest.raises(DiffScalerError, match="none is called 'c'"):
        pipe.load_diffscaler(task, "c", hotswap=True)
    assert torch.equal(outputs(pipe.transformer), kept)
