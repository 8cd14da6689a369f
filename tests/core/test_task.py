from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from diffscaler_core import (
    METHODS,
    DiffScalerError,
    TaskAdapter,
    UnknownNameError,
    attach,
    load_task,
    new_task,
    save_task,
)
from diffscaler_core.task import fingerprint

from .conftest import Denoiser

LAYERED = [name for name, method in METHODS.items() if method.parts]


@pytest.mark.parametrize("method", LAYERED)
def test_every_method_starts_as_the_identity_and_trains_only_its_own(model, x, method, tmp_path):
    before = model(x)
    frozen = {name: t.clone() for name, t in model.state_dict().items()}
    task = new_task(model, method, rank=3)
    with attach(model, task) as attachment:
        assert torch.equal(model(x), before)
        attachment.requires_grad_()
        optimiser = torch.optim.SGD(attachment.parameters(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
        assert all(p.grad is None for p in model.parameters())
        assert all(p.grad is not None for p in attachment.parameters())
        moved = [p for p in attachment.parameters() if p.grad.any()]
        assert len(moved) == len(list(attachment.parameters()))
        attachment.requires_grad_(False)  # what was folded before the training is out of date
        trained, after = attachment.task(), model(x)
    assert not torch.equal(after, before)
    assert torch.equal(model(x), before)
    assert all(torch.equal(t, frozen[name]) for name, t in model.state_dict().items())
    back = load_task(save_task(trained, tmp_path / "t.safetensors"))
    with attach(model, back):
        assert torch.equal(model(x), after)


def test_parts_lie_where_the_method_says(model):
    layers = {method: new_task(model, method, rank=2).layers for method in LAYERED}
    keys = {method: {frozenset(t) for t in own.values()} for method, own in layers.items()}
    assert keys["diffscaler"] == {frozenset(("scale", "shift", "down", "up"))}
    assert keys["scale_shift"] == {frozenset(("scale", "shift"))}
    assert keys["bitfit"] == {frozenset(("shift",))}
    assert keys["lora"] == {frozenset(("down", "up"))}
    assert keys["difffit"] == {frozenset(("shift",)), frozenset(("scale",))}
    scaled = [n for n, t in layers["difffit"].items() if "scale" in t]
    assert scaled == ["transformer.transformer_blocks.0.attn.to_out.0"]
    biased = {
        f"transformer.{n}" for n, m in model.named_modules() if getattr(m, "bias", None) is not None
    }
    assert set(layers["bitfit"]) == {n for n in biased if "blocks" in n}


def test_a_prompts_task_adapts_no_layer(model, x):
    task = new_task(model, "prompts")
    assert task.layers == {}
    before = model(x)
    with attach(model, task):
        assert torch.equal(model(x), before)


def test_tensors_have_the_documented_shapes_and_are_float32_on_the_cpu():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            task = new_task(Denoiser(), targets="all", rank=3)
    finally:
        torch.set_default_dtype(torch.float32)
    shapes = {k: tuple(t.shape) for k, t in task.layers["transformer.embed"].items()}
    assert shapes == {"scale": (8,), "shift": (8,), "down": (3, 4, 2, 2), "up": (8, 3)}
    assert {(t.dtype, t.device.type) for t in task.tensors} == {(torch.float32, "cpu")}


def test_a_seed_decides_the_random_half(model):
    first, again, other = (new_task(model, seed=s) for s in (0, 0, 1))
    pairs = list(zip(first.tensors, again.tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(map(torch.equal, first.tensors, other.tensors))


def test_counts_are_those_of_the_tensors(model):
    task = new_task(model, rank=2, targets=["to_q"])
    assert task.num_parameters == 2 * (8 + 8 + 2 * 8 + 8 * 2)
    assert task.nbytes == 4 * task.num_parameters
    stored = task.replace(conditioning={"context": torch.zeros(1, 2, 3)})
    assert stored.num_parameters == task.num_parameters
    assert stored.nbytes == task.nbytes + 24


def test_a_task_is_frozen(model):
    task = new_task(model)
    with pytest.raises(TypeError):
        task.layers["transformer.new"] = {}
    with pytest.raises(TypeError):
        task.layers["transformer.transformer_blocks.0.attn.to_q"]["scale"] = torch.zeros(8)
    with pytest.raises(TypeError):
        task.info["name"] = "other"
    with pytest.raises(AttributeError):
        task.layers = {}
    layers = {"transformer.a": {"shift": torch.zeros(2)}}
    own = TaskAdapter(layers)
    layers["transformer.a"]["scale"] = torch.zeros(2)
    assert list(own.layers["transformer.a"]) == ["shift"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_task_can_be_copied_and_pickled(make, copied):
    task = make()
    other = copied(task)
    assert other.info == task.info
    assert other.layers.keys() == task.layers.keys()
    assert all(map(torch.equal, other.tensors, task.tensors))
    assert all(a is not b for a, b in zip(other.tensors, task.tensors, strict=True))
    with pytest.raises(TypeError):
        other.info["name"] = "other"


def test_the_fingerprint_is_stable_and_sees_every_name_and_shape():
    shapes = {"a.b": (2, 3), "c": (4, 5, 1, 1)}
    assert fingerprint(shapes) == "f069614db2af0a2a"
    assert fingerprint(dict(reversed(shapes.items()))) == fingerprint(shapes)
    others = [
        {**shapes, "c": (4, 5, 1, 2)},
        {**shapes, "d": (1, 1)},
        {"a.b": (2, 3)},
        {"a.c": (2, 3), "c": (4, 5, 1, 1)},
    ]
    assert len({fingerprint(s) for s in [shapes, *others]}) == 5


def test_the_fingerprint_does_not_depend_on_values_device_or_lora(model):
    first = new_task(model).info["base"]
    second = new_task(Denoiser().to("meta")).info["base"]
    assert first == second
    assert first["class"] == "Denoiser"
    assert first["family"] == "unknown"
    assert first["targets"] == 8


def test_stored_prompts_are_found_by_name():
    context, pooled = torch.randn(2, 3, 4), torch.randn(2, 5)
    task = TaskAdapter(
        {}, {"name": "t", "prompts": ["cat", "dog"]}, {"context": context, "pooled": pooled}
    )
    got = task.prompt("dog")
    assert torch.equal(got[0], context[1:])
    assert torch.equal(got[1], pooled[1:])
    assert torch.equal(task.prompt()[0], context[:1])
    assert TaskAdapter({}, {"prompts": ["a"]}, {"context": context[:1]}).prompt("a")[1] is None
    with pytest.raises(UnknownNameError, match=r"'cow'.*'cat', 'dog'"):
        task.prompt("cow")
    with pytest.raises(DiffScalerError, match="stores no prompt"):
        TaskAdapter({}).prompt()


def test_components_are_read_off_the_layer_names():
    shift = {"shift": torch.zeros(2)}
    task = TaskAdapter({"transformer.a": shift, "transformer_2.a": shift, "transformer.b": shift})
    assert task.components == ("transformer", "transformer_2")
    assert list(task.component_layers("transformer")) == ["a", "b"]
    assert list(task.component_layers("unet")) == []


def test_a_unet_is_named_by_its_class():
    class MyUNet(nn.ModuleDict):
        pass

    task = new_task(MyUNet({"a": nn.Linear(2, 2)}), targets="all")
    assert list(task.layers) == ["unet.a"]
