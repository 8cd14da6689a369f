from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffscaler_core import (
    Affiner,
    DiffScalerError,
    TaskAdapter,
    UnknownNameError,
    attach,
    new_task,
)
from diffscaler_core.affiner import PARTS, apply_folded, fold

from .conftest import filled, reference_task

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 5, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 8, bias=False), (3, 6)),
    "linear, four dims": (lambda: nn.Linear(6, 8), (2, 2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (3, 6, 9)),
    "conv1d dilated": (lambda: nn.Conv1d(6, 8, 3, dilation=2, bias=False), (3, 6, 9)),
    "conv2d patch": (lambda: nn.Conv2d(4, 8, 2, stride=2), (3, 4, 8, 8)),
    "conv2d stride, padding": (
        lambda: nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2)),
        (2, 4, 7, 8),
    ),
    "conv2d valid": (lambda: nn.Conv2d(4, 8, 3, padding="valid"), (2, 4, 7, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 8, 4, padding="same", dilation=2), (2, 4, 9, 8)),
    "conv2d circular": (
        lambda: nn.Conv2d(4, 8, 3, padding=(1, 2), padding_mode="circular"),
        (2, 4, 7, 8),
    ),
    "conv2d reflect": (lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "conv2d same, replicate": (
        lambda: nn.Conv2d(4, 8, (4, 3), padding="same", padding_mode="replicate"),
        (2, 4, 7, 8),
    ),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 7, 8)),
    "conv2d depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (2, 8, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 8, (1, 2, 2), stride=(1, 2, 2)), (2, 4, 3, 4, 4)),
}
SOME_PARTS = [c for n in (1, 2, 3) for c in itertools.combinations(PARTS, n)]
MISFITS = pytest.mark.filterwarnings("ignore:Using padding='same'")


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def one_layer(kind: str):
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    return OneLayer(build()).requires_grad_(False), torch.randn(shape)


def task_for(model, parts, seed=0, size=0.5, rank=3, **info) -> TaskAdapter:
    task = filled(new_task(model, targets="all", rank=rank, name=f"t{seed}"), seed, size, **info)
    kept = {
        "scale": "scale" in parts,
        "shift": "shift" in parts,
        "down": "subspace" in parts,
        "up": "subspace" in parts,
    }
    layers = {n: {k: t for k, t in own.items() if kept[k]} for n, own in task.layers.items()}
    return task.replace(layers=layers)


def check_against_reference(model, x, tasks, weights, tolerance=1e-6):
    expected = reference_task(model, tasks, weights)(x)
    named = {task.name: task for task in tasks}
    with attach(model, named, dict(zip(named, weights, strict=True))):
        got = model(x)
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@MISFITS
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_a_layer_equals_the_formula_written_with_its_weight(kind, activation):
    model, x = one_layer(kind)
    for parts in SOME_PARTS:
        task = task_for(model, parts, activation=activation, gain=1.7)
        check_against_reference(model, x, [task], [0.6])


@pytest.mark.parametrize("kind", ["linear", "conv2d patch"])
def test_a_scale_may_include_the_frozen_bias(kind):
    model, x = one_layer(kind)
    task = task_for(model, ("scale", "shift"), scale_includes_bias=True)
    check_against_reference(model, x, [task], [0.8])
    other = task_for(model, ("scale",), seed=1)
    check_against_reference(model, x, [task, other], [0.8, -0.3])


@MISFITS
@pytest.mark.parametrize("kind", LAYERS)
def test_relu_and_identity_stack_on_one_layer(kind):
    model, x = one_layer(kind)
    tasks = [
        task_for(model, PARTS, 0, activation="relu", gain=0.5),
        task_for(model, PARTS, 1, activation="identity", gain=2.0, rank=2),
        task_for(model, ("shift",), 2),
    ]
    check_against_reference(model, x, tasks, [0.7, -0.4, 1.5])


@MISFITS
@pytest.mark.parametrize("kind", LAYERS)
def test_in_float64_the_formula_holds_to_float64(kind):
    model, x = one_layer(kind)
    model, x = model.double(), x.double()
    task = task_for(model, PARTS)
    layers = {n: {k: t.double() for k, t in own.items()} for n, own in task.layers.items()}
    check_against_reference(model, x, [task.replace(layers=layers)], [0.5], 1e-14)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(SOME_PARTS), min_size=1, max_size=3),
    st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
    st.lists(st.sampled_from(["relu", "identity"]), min_size=3, max_size=3),
    st.sampled_from(["linear", "conv2d stride, padding", "conv2d grouped"]),
    st.integers(1, 5),
)
def test_any_stack_of_tasks_equals_the_formula(parts, weights, activations, kind, rank):
    model, x = one_layer(kind)
    tasks = [
        task_for(model, own, i, rank=rank, activation=activations[i], gain=1.0 + i)
        for i, own in enumerate(parts)
    ]
    check_against_reference(model, x, tasks, weights[: len(tasks)], 4e-6)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    leaves = [torch.randn(s).double().requires_grad_() for s in ((5,), (5,), (3, 4), (5, 3))]
    x, y, bias = (torch.randn(s).double().requires_grad_() for s in ((2, 4), (2, 5), (5,)))

    def corrected(scale, shift, down, up, x, y):
        affiner = Affiner(scale, shift, down, up, gain=1.5)
        for name, tensor in zip(("scale", "shift", "down", "up"), leaves, strict=True):
            del affiner._parameters[name]  # the leaf itself in the parameter's place
            setattr(affiner, name, tensor)
        weights = torch.tensor([[0.5, -1.0, 2.0]]).double()
        return apply_folded(x, y, fold([affiner], weights, bias.detach()))

    assert torch.autograd.gradcheck(corrected, (*leaves, x, y))


def test_the_affiner_itself_gives_the_formula_with_a_strength():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 5), torch.randn(2, 4)
    a, b, down, up = torch.randn(5), torch.randn(5), torch.randn(3, 4), torch.randn(5, 3)
    affiner = Affiner(a, b, down, up, gain=0.5)
    y = layer(x)
    got = affiner(x, y, bias=layer.bias, strength=0.25)
    delta = a * (x @ layer.weight.T) + b + 0.5 * torch.relu(x @ down.T) @ up.T
    torch.testing.assert_close(got, y + 0.25 * delta)
    assert affiner(x, y, bias=layer.bias, strength=0.0) is y
    assert affiner.rank == 3
    assert Affiner()(x, y) is y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d stride, padding", "conv3d"])
def test_a_new_task_changes_no_bit(kind, dtype):
    model, x = one_layer(kind)
    model, x = model.to(dtype), x.to(dtype)
    before = model(x)
    task = new_task(model, targets="all", rank=3)
    with attach(model, {"a": task, "b": task}):
        assert torch.equal(model(x), before)
    with attach(model, task), attach(model, task):
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [("scale",), PARTS])
def test_in_16_bits_a_small_task_is_rounded_no_worse_than_the_output(dtype, parts):
    torch.manual_seed(0)
    model, x = OneLayer(nn.Linear(64, 64)).requires_grad_(False).to(dtype), torch.randn(256, 64)
    x = x.to(dtype)
    task = task_for(model, parts, size=1.0)
    layers = {n: {k: 0.002 * t.sign() for k, t in o.items()} for n, o in task.layers.items()}
    y = model(x)
    bias = model.layer.bias.double()
    own = layers["transformer.layer"]
    wanted = y.double() + own["scale"] * (y.double() - bias)
    if len(parts) > 1:
        hidden = torch.relu(x.double() @ own["down"].double().T)
        wanted = wanted + own["shift"] + hidden @ own["up"].double().T
    with attach(model, task.replace(layers=layers)):
        got = model(x)
    # one rounding of the output (half an ulp), and a little for the rounding of the small Δ
    ulp = (wanted.abs() * torch.finfo(dtype).eps).clamp(min=1e-4)
    assert ((got.double() - wanted).abs() <= 0.56 * ulp).all()


def test_a_scale_that_vanishes_in_one_plus_a_still_acts_in_bfloat16():
    y = torch.full((1, 8), 1.9).bfloat16()
    a = torch.full((8,), 0.0035)
    assert torch.equal((1 + a).bfloat16(), torch.ones(8).bfloat16())
    assert (Affiner(scale=a)(y, y) > y).all()


def test_strength_zero_is_the_base_even_where_the_subspace_overflows_float16():
    model = OneLayer(nn.Linear(64, 4)).requires_grad_(False).half()
    model.layer.weight.mul_(1e-3)
    x = torch.full((2, 64), 6e4).half()
    task = task_for(model, PARTS)
    own = {**task.layers["transformer.layer"], "down": torch.ones(3, 64)}
    task = task.replace(layers={"transformer.layer": own})
    other = task_for(model, ("shift",), seed=1)
    before = model(x)
    with attach(model, {"huge": task, "other": other}, 0.0) as attachment:
        assert torch.equal(model(x), before)
        attachment.set_weights({"other": 1.0})
        got = model(x)
        attachment.set_rows(["other", None])
        rows = model(x)
    with attach(model, other):
        assert torch.equal(model(x), got)
        assert torch.equal(model(x)[0], rows[0])
    assert torch.equal(rows[1], before[1])


def test_a_new_task_is_the_identity_even_where_its_subspace_overflows_float16():
    model = OneLayer(nn.Linear(64, 4)).requires_grad_(False).half()
    model.layer.weight.mul_(1e-3)
    x = torch.full((2, 64), 6e4).half()
    task = new_task(model, targets="all", rank=4)
    own = {**task.layers["transformer.layer"], "down": torch.ones(4, 64)}
    before = model(x)
    with attach(model, task.replace(layers={"transformer.layer": own})) as attachment:
        assert torch.equal(model(x), before)
        attachment.requires_grad_()
        assert torch.equal(model(x), before)


def test_an_affiner_refuses_half_a_subspace_and_unknown_activations():
    with pytest.raises(DiffScalerError, match="come together"):
        Affiner(down=torch.zeros(2, 3))
    with pytest.raises(UnknownNameError, match=r"'gelu'.*relu, identity"):
        Affiner(activation="gelu")


def test_the_output_is_never_written_in_place():
    torch.manual_seed(0)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    kept = y.clone()
    affiner = Affiner(*(torch.randn(s) for s in ((4,), (4,), (2, 4), (4, 2))))
    affiner(x, y)
    assert torch.equal(y, kept)
