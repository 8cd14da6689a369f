from __future__ import annotations

import shutil

import pytest
import torch
import torch._dynamo
from torch import nn

from diffscaler_core import DiffScalerError, attach, new_task

from .conftest import Denoiser, filled, hooks_of, reference_task

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Counting:
    """A backend that runs graphs eagerly and counts how many it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def two(model):
    return {n: filled(new_task(model, rank=2, name=n), i) for i, n in enumerate("ab")}


def switches():
    """20 different strengths, zero, per-part and negative ones among them."""
    yield from ({"a": 0.1 * i, "b": 1 - 0.1 * i} for i in range(11))
    yield from ({"a": {"scale": 0.1 * i, "shift": -1.0}, "b": 0.0} for i in range(7))
    yield from ({}, {"b": 1.0})


def check_switching(model, x, backend):
    tasks = two(model)
    with attach(model, tasks) as attachment:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert close(compiled(x), reference_task(model, list(tasks.values()), [1, 1])(x))
        torch._dynamo.utils.counters.clear()
        for weights in switches():
            attachment.set_weights(weights)
            assert close(compiled(x), model(x))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert hooks_of(model) == []


@torch.no_grad()
def test_twenty_switches_compile_nothing_anew(model, x):
    backend = Counting()
    tasks = two(model)
    before = model(x)
    attachment = attach(model, tasks)
    compiled = torch.compile(model, backend=backend)
    for weights in switches():
        attachment.set_weights(weights)
        got = compiled(x)
        assert close(got, model(x))  # an eager call between does no harm
        assert backend.graphs == 1
    attachment.remove()
    assert torch.equal(compiled(x), before)


@torch.no_grad()
def test_new_values_of_rows_compile_nothing_anew(model, x):
    backend, before = Counting(), model(x)
    with attach(model, two(model)) as attachment:
        compiled = torch.compile(model, backend=backend)
        attachment.set_rows(["a", None, "b"])
        for i in range(20):
            attachment.set_rows([{"a": 0.1 * i}, None, {"b": -0.2 * i, "a": 1.0}])
            got = compiled(x)
            assert torch.equal(got[1], before[1])
            assert close(got, model(x))
        assert backend.graphs == 1


def test_training_under_compile_sees_each_update(model, x):
    backend = Counting()
    with attach(model, filled(new_task(model, rank=2))) as attachment:
        attachment.requires_grad_()
        compiled = torch.compile(model, backend=backend)
        optimiser = torch.optim.SGD(attachment.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            loss = compiled(x).square().mean()
            assert close(compiled(x), model(x))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert backend.graphs == 1


@pytest.mark.parametrize("how", ["wrapped", "in place", "by regions", "regions wrapped"])
@torch.no_grad()
def test_a_compiled_model_that_would_ignore_a_task_is_refused_or_reset(model, x, how):
    before, task = model(x), filled(new_task(model))
    wanted = reference_task(model, [task], [1.0])(x)
    run = model
    if how == "wrapped":
        run = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "by regions":
        for block in model.transformer_blocks:
            block.compile(backend="eager")
    else:
        blocks = [torch.compile(b, backend="eager") for b in model.transformer_blocks]
        model.transformer_blocks = nn.ModuleList(blocks)
    run(x)
    if how == "regions wrapped":
        with pytest.raises(DiffScalerError, match="is compiled"):
            attach(run, task)
        return  # its layers now have other names; a task is attached before
    with pytest.raises(DiffScalerError, match=r"attach the task before torch\.compile"):
        attach(run, task)
    assert hooks_of(model) == []
    assert torch.equal(run(x), before)
    attachment = attach(run, task, compiled="reset")
    assert close(run(x), wanted)
    attachment.set_weights(0.0)
    assert torch.equal(run(x), before)
    attachment.remove()
    assert torch.equal(run(x), before)
    with pytest.raises(DiffScalerError, match="'raise' or 'reset'"):
        attach(run, task, compiled="ignore")


@torch.no_grad()
def test_a_compiled_function_around_the_model_sees_the_task_come_and_go(model, x):
    compiled = torch.compile(lambda x: model(x) * 2, backend="eager")
    before, task = compiled(x), filled(new_task(model))
    with attach(model, task):
        assert close(compiled(x), 2 * reference_task(model, [task], [1.0])(x))
    assert torch.equal(compiled(x), before)


@torch.no_grad()
def test_convolutions_and_mixed_activations_compile_too(x):
    torch.manual_seed(0)
    model = Denoiser().requires_grad_(False)
    tasks = {
        "a": filled(new_task(model, targets="all", rank=2)),
        "b": filled(new_task(model, "lora", targets="all", rank=2), 1),
    }
    wanted = reference_task(model, list(tasks.values()), [1.0, 1.0])(x)
    with attach(model, tasks):
        assert close(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductor_gives_the_formula_and_compiles_once_for_twenty_switches(model, x):
    check_switching(model, x, "inductor")
