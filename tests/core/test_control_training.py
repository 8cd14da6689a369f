"""Control tasks in training and under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffscaler_core import (
    attach,
    load_task,
    save_task,
)
from diffscaler_core.control import Control

from .control_models import (
    MODELS,
    SD3Transformer2DModel,
    UNet2DModel,
    X,
    Z,
    built,
    close,
    edges,
    plain,
    rand,
    reference,
)


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def model(request) -> nn.Module:
    return built(request.param)


@pytest.fixture
def sd3() -> nn.Module:
    return built(SD3Transformer2DModel)


def test_gradients_go_to_the_tasks_parameters_alone_and_are_the_formulas(model):
    task, prefix = edges(model), "unet" if isinstance(model, UNet2DModel) else "transformer"
    with attach(model, task) as a:
        a.requires_grad_()
        a.set_control(Z)
        model(X).square().mean().backward()
        parameters = a.parameters_of("edges")
        got = {n: p.grad for n, p in parameters.items()}
    assert all(parameter.grad is None for parameter in model.parameters())
    live = {n: t.clone().requires_grad_() for n, t in task.extras.items()}
    twin = reference(model, [(task.replace(extras=live), Z, 1.0)])
    twin(X).square().mean().backward()
    assert set(live) == {n for n in got if n.startswith(f"control.{prefix}.")}
    for name, tensor in live.items():
        close(got[name], tensor.grad, 1e-4)
    assert set(got) > set(live)
    assert all(bool(g.any()) for g in got.values())


def test_a_row_that_is_left_out_in_training_still_trains_the_blocks(sd3):
    task = edges(sd3)
    with attach(sd3, task) as a:
        a.requires_grad_()
        a.set_control(Z, torch.tensor([0.0, 0.0, 0.0]))
        wanted = reference(sd3, [], [(task, 1.0)])(X)
        close(sd3(X), wanted)
        sd3(X).square().mean().backward()
        for name, parameter in a.parameters_of("edges").items():
            dead = name.startswith("control.")
            assert bool(parameter.grad.any()) != dead, name
        a.set_control(Z, torch.tensor([1.0, 0.0, 1.0]))
        with torch.no_grad():
            got = sd3(X)
        close(got[1], wanted[1])
        close(got[0], reference(sd3, [(task, Z, 1.0)])(X)[0])
        a.set_control(None)
        with torch.no_grad():
            close(sd3(X), wanted)
        a.set_controls(None)  # inference again: without a control the base
        with torch.no_grad():
            untouched = sd3(X)
    assert torch.equal(untouched, sd3(X))


def test_an_optimisers_step_is_seen_by_the_next_call(sd3):
    with attach(sd3, edges(sd3)) as a:
        a.set_controls({"edges": Control(Z)})
        with torch.no_grad():
            before = sd3(X)
            next(iter(p for n, p in a.parameters_of("edges").items() if "scale" in n and
                      n.startswith("control."))).add_(1.0)  # fmt: skip
            after = sd3(X)
            assert not torch.equal(before, after)
            close(after, reference(sd3, [(a.task(), Z, 1.0)])(X))


def test_groups_train_one_control_task_each(sd3):
    tasks = {"a": edges(sd3), "b": edges(sd3, 1), "c": plain(sd3)}
    x, z = X[:1].repeat(3, 1, 1, 1), Z[:1].repeat(3, 1, 1, 1)
    with attach(sd3, tasks) as a:
        a.requires_grad_()
        a.set_control(z, torch.ones(3))
        a.set_groups(["b", "c", "a"])
        got = sd3(x)
        close(got[0], reference(sd3, [(tasks["b"], z, 1.0)])(x)[0])
        close(got[1], reference(sd3, [], [(tasks["c"], 1.0)])(x)[1])
        close(got[2], reference(sd3, [(tasks["a"], z, 1.0)])(x)[2])
        got[0].square().sum().backward()
        touched = {
            n for n in tasks for p in a.parameters_of(n).values()
            if p.grad is not None and p.grad.any()
        }  # fmt: skip
        assert touched == {"b"}
        a.set_control(z, torch.zeros(3))  # the next batch, in the same groups
        with torch.no_grad():
            close(sd3(x)[2], reference(sd3, [], [(tasks["a"], 1.0)])(x)[2])


def test_what_was_trained_is_what_is_saved(sd3, tmp_path):
    with attach(sd3, edges(sd3)) as a:
        a.requires_grad_()
        a.set_control(Z)
        sd3(X).square().mean().backward()
        torch.optim.SGD(a.parameters(), lr=0.1).step()
        with torch.no_grad():
            wanted = sd3(X)
        task = a.task()
    assert task.is_control
    assert list(task.extras) == list(edges(sd3).extras)
    loaded = load_task(save_task(task, tmp_path / "edges.safetensors"))
    with attach(sd3, loaded) as a, torch.no_grad():
        a.set_controls({"edges": Control(Z)})
        close(sd3(X), wanted)


# Compiled


class Counting:
    """A backend that runs graphs eagerly and counts how many it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fullgraph", [False, True])
@torch.no_grad()
def test_twenty_controls_and_strengths_compile_nothing_anew(model, fullgraph):
    torch._dynamo.reset()
    backend, task = Counting(), edges(model)
    before = model(X)
    with attach(model, {"edges": task, "style": plain(model)}) as a:
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        close(compiled(X), model(X))
        a.set_controls({"edges": Control(Z)})
        close(compiled(X), model(X))
        settled = backend.graphs
        assert settled <= 2 or not fullgraph
        for i in range(20):
            a.set_controls({"edges": Control(rand(3, 4, 8, 8, seed=i))})
            a.set_weights({"edges": 0.1 * i, "style": 1 - 0.1 * i})
            got = compiled(X)
            close(got, compiled(X))
            assert backend.graphs == settled
            z = rand(3, 4, 8, 8, seed=i)
            close(got, reference(model, [(task, z, 0.1 * i)], [(plain(model), 1 - 0.1 * i)])(X))
        a.set_weights(0.0)
        assert torch.equal(compiled(X), before)
    torch._dynamo.reset()
