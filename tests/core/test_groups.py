from __future__ import annotations

import pytest
import torch
from torch import nn

from diffscaler_core import DiffScalerError, UnknownNameError, attach, new_task
from diffscaler_core.matching import build_stacks
from diffscaler_core.training.denoiser import Trainable

from .conftest import filled


def close(a, b, tolerance=1e-6):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture
def tasks(make):
    """Different parts, ranks and activations; the last lacks most layers."""
    return {
        "a": make(0, targets="all"),
        "b": make(1, targets="all", method="lora", rank=2),
        "c": make(2, targets="all", method="scale_shift"),
        "d": make(3, targets=["to_q"], rank=4),
    }


@pytest.fixture
def batch():
    return torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def run(model, tasks, x, groups, train=True):
    """Outputs, and each task's gradients of a loss that leaves out what is not finite."""
    with attach(model, tasks) as attachment:
        attachment.requires_grad_(train)
        attachment.set_groups(groups)
        out = model(x)
        if not train:
            return out, {}
        out.square().sum((1, 2))[out.isfinite().all(2).all(1)].sum().backward()
        return out.detach(), {
            name: {k: p.grad for k, p in attachment.parameters_of(name).items()} for name in tasks
        }


@pytest.mark.parametrize("train", [True, False])
def test_each_group_runs_and_trains_its_task_alone(model, tasks, batch, train):
    names = ["a", "b", "c", "d"]
    together, gradients = run(model, tasks, batch, names, train)
    for i, name in enumerate(names):
        rows = slice(2 * i, 2 * i + 2)
        alone, own = run(model, {name: tasks[name]}, batch[rows], None, train)
        assert close(together[rows], alone)
        for key, gradient in own.get(name, {}).items():
            assert close(gradients[name][key], gradient, 1e-5), (name, key)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_happens_in_one_group_changes_no_bit_of_another(model, tasks, batch, poison):
    names = ["a", "b", "c", "a"]
    wanted, gradients = run(model, tasks, batch, names)
    ill = batch.clone()
    ill[2:4] = poison
    got, others = run(model, tasks, ill, names)
    healthy = [0, 1, 4, 5, 6, 7]
    assert torch.equal(got[healthy], wanted[healthy])
    assert not got[2:4].isfinite().any()
    for name in "ac":
        for key, gradient in gradients[name].items():
            assert torch.equal(others[name][key], gradient)


def test_two_groups_of_one_task_add_up(model, tasks, batch):
    _, gradients = run(model, tasks, batch, ["a", "c", "a", "c"])
    _, own = run(model, {"a": tasks["a"]}, batch[[0, 1, 4, 5]], None)
    assert all(close(gradients["a"][k], g, 1e-5) for k, g in own["a"].items())
    assert all(g is None for g in gradients["d"].values())


@pytest.mark.parametrize("groups", [["b"], ["b", "b", "b"]])
def test_one_task_for_all_is_the_plain_path(model, tasks, batch, groups):
    got, gradients = run(model, tasks, batch, groups)
    wanted, own = run(model, {"b": tasks["b"]}, batch, None)
    assert torch.equal(got, wanted)
    assert all(torch.equal(gradients["b"][k], g) for k, g in own["b"].items())
    assert all(g is None for g in gradients["a"].values())


def test_the_last_word_counts_and_none_brings_back_what_was(model, tasks, batch):
    with attach(model, tasks, {"a": 0.5, "c": 2.0}) as attachment:
        before = model(batch)
        attachment.set_groups(["a", "b"])
        assert not close(model(batch), before, 1e-3)
        attachment.set_groups(None)
        assert torch.equal(model(batch), before)
        attachment.set_rows([None, "a"] * 4)
        rows = model(batch)
        attachment.set_groups(["a"])
        attachment.set_groups(None)
        assert torch.equal(model(batch), rows)
        attachment.set_groups(["a", "b"])
        attachment.set_weights({"a": 0.5, "c": 2.0})
        assert torch.equal(model(batch), before)


@pytest.mark.parametrize("train", [True, False])
def test_fresh_tasks_in_groups_change_no_bit(model, batch, train):
    before = model(batch)
    tasks = {"a": new_task(model, targets="all"), "b": new_task(model, targets=["to_q"], rank=2)}
    assert torch.equal(run(model, tasks, batch, ["a", "b"], train)[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_run_in_16_bits(model, tasks, batch, dtype):
    exact, _ = run(model, tasks, batch, ["a", "b"], train=False)
    model, batch = model.to(dtype), batch.to(dtype)
    for train in (True, False):
        got, gradients = run(model, tasks, batch, ["a", "b"], train)
        assert got.dtype == dtype
        assert close(got.float(), exact, 0.05)
        assert all(g.dtype == torch.float32 for g in gradients.get("a", {}).values())


def stack_for(layout: str):
    model = nn.ModuleDict({"lin": nn.Linear(4, 6)}).requires_grad_(False)
    tasks = {
        name: filled(new_task(model, targets="all", rank=2 + i, name=name), i)
        for i, name in enumerate("ab")
    }
    layers = {name: task.component_layers("transformer") for name, task in tasks.items()}
    (stack,) = build_stacks(tasks, layers, {"lin": model["lin"]}).values()
    stack.row_layout = layout
    return model["lin"], stack


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("batch", (6, 5, 4)),
        ("batch", (6, 4)),
        ("batch", (6, 2, 3, 4)),
        ("fold", (12, 5, 4)),
        ("fold", (9, 4)),
        ("flat", (1, 6, 4)),
    ],
)
def test_groups_are_told_apart_in_every_layout(layout, shape, train):
    layer, stack = stack_for(layout)
    stack.requires_grad_(train)
    x = torch.randn(shape)
    stack.set_groups([0, 1, 0])
    got = stack(x, layer(x)).reshape(3, -1, 6)
    for i, own in enumerate(x.reshape(3, -1, 4)):
        stack.set_groups([(0, 1, 0)[i]])
        assert close(got[i], stack(own, layer(own)))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("batch", (7, 4)), ("batch", (1, 6, 4)), ("fold", (8, 4)), ("flat", (1, 7, 4))],
)
def test_a_batch_that_does_not_divide_is_refused(layout, shape):
    layer, stack = stack_for(layout)
    stack.set_groups([0, 1, 1])
    x = torch.randn(shape)
    with pytest.raises(DiffScalerError, match=r"3 groups are set, but 'lin' ran on a tensor of"):
        stack(x, layer(x))


def test_impossible_groups_are_refused(model, tasks, batch):
    with attach(model, tasks) as attachment:
        before = model(batch)
        with pytest.raises(UnknownNameError, match="unknown task 'e'"):
            attachment.set_groups(["a", "e"])
        with pytest.raises(DiffScalerError, match="at least one task"):
            attachment.set_groups([])
        with pytest.raises(UnknownNameError):
            attachment.parameters_of("e")
        assert torch.equal(model(batch), before)


def test_an_attachment_is_trainable(model, tasks):
    with attach(model, tasks) as attachment:
        trainable: Trainable = attachment
        for name, task in tasks.items():
            own = trainable.parameters_of(name)
            assert set(own) == {f"{n}.{k}" for n, t in task.layers.items() for k in t}
            assert {id(p) for p in own.values()} <= {id(p) for p in attachment.parameters()}


@torch.no_grad()
def test_groups_can_be_compiled(model, tasks, batch):
    with attach(model, tasks) as attachment:
        attachment.set_groups(["a", "b", "c", "d"])
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert close(compiled(batch), model(batch), 1e-5)
    torch._dynamo.reset()
