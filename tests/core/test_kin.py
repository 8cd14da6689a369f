"""Layers that are given the same tensor: who they are, and that sharing changes only bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffscaler_core import attach, new_task
from diffscaler_core import kin as kin_module
from diffscaler_core.kin import kin_of

from .conftest import filled


class Attention(nn.Module):
    def __init__(self, width: int = 8, cross: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.cross = cross

    def forward(self, x, text):
        other = text if self.cross else x
        q, k, v = self.to_q(x), self.to_k(other), self.to_v(other)
        return x + F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.odd = Attention(), Attention(cross=True), Attention(cross=True)
        self.ff = nn.Module()
        self.ff.gate_proj, self.ff.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
        self.ff.down_proj = nn.Linear(12, 8)

    def forward(self, x, text):
        x = self.odd(self.attn2(self.attn1(x, text), text), text)
        ff = self.ff
        return x + ff.down_proj(F.silu(ff.gate_proj(x)) * ff.up_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, text):
        for block in self.transformer_blocks:
            x = block(x, text)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)


@pytest.fixture
def tasks(model):
    methods = {"a": ("diffscaler", 2), "b": ("diffscaler", 3), "c": ("lora", 2), "d": ("bitfit", 0)}
    return {
        n: filled(new_task(model, method, rank or 1, name=n), i)
        for i, (n, (method, rank)) in enumerate(methods.items())
    }


def test_kin_are_found_by_name():
    names = [f"blocks.0.attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj")]
    names += [f"blocks.0.attn2.{n}" for n in ("to_q", "to_k", "to_v")]
    names += ["blocks.0.attn3.to_q", "blocks.0.ff.w1", "blocks.0.ff.w3", "to_q"]
    found = kin_of(names)
    first = tuple(f"blocks.0.attn1.{n}" for n in ("to_q", "to_k", "to_v"))
    cross = ("blocks.0.attn2.to_k", "blocks.0.attn2.to_v")
    gated = ("blocks.0.ff.w1", "blocks.0.ff.w3")
    assert set(found) == {*first, *cross, *gated}
    assert {found[n] for n in found} == {first, cross, gated}


def without_kin(monkeypatch):
    monkeypatch.setattr(kin_module, "KIN", ())


SETTINGS = [
    {"weights": {"a": 1.0}},
    {"weights": {"a": 0.5, "b": 1.0}},
    {"weights": {"c": 1.0}},
    {"weights": {"a": 1.0, "c": 1.0}},  # two activations: everyone for himself
    {"weights": {"d": 1.0}},
    {"rows": ["a", None, "b"]},
    {"rows": [{"a": 1.0, "b": 0.5}, "b", "d"]},
    {"rows": ["c", "a", None]},
]


def put(a, setting):
    if "rows" in setting:
        a.set_rows(setting["rows"])
    else:
        a.set_weights(setting["weights"])


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_sharing_changes_nothing_but_rounding(model, inputs, tasks, setting, monkeypatch):
    with attach(model, tasks) as a:
        put(a, setting)
        first = model(*inputs)
        assert torch.equal(model(*inputs), first)  # the first call rounds as the second
    without_kin(monkeypatch)
    with attach(model, tasks) as a:
        put(a, setting)
        assert (model(*inputs) - first).abs().max() <= 1e-5 * first.abs().max()


def products(model, inputs, monkeypatch):
    """How many products with a D one call makes, of the layers' own shapes."""
    counted = []
    linear = F.linear

    def counting(x, weight, bias=None):
        counted.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counting)
    model(*inputs)
    monkeypatch.undo()
    return counted


@torch.no_grad()
def test_one_product_serves_q_k_and_v(model, inputs, tasks, monkeypatch):
    with attach(model, {"a": tasks["a"]}):
        model(*inputs)
        counted = products(model, inputs, monkeypatch)
    downs = [shape for shape in counted if shape[0] in (2, 4, 6) and shape[1] in (8, 12)]
    # a block: attn1's three in one; attn2's q alone, k and v in one; of `odd`, a cross-attention by
    # another name, q multiplies for all in vain, then k and v on their own; gate and up; down
    one_block = [(6, 8), (2, 8), (4, 8), (6, 8), (2, 8), (2, 8), (4, 8), (2, 12)]
    assert downs == one_block * 2


@torch.no_grad()
def test_an_input_changed_in_place_between_kin_is_seen(model, inputs, tasks):
    attention = model.transformer_blocks[0].attn1
    with attach(model, {"a": tasks["a"]}):
        x = inputs[0].clone()
        attention.to_q(x)
        x.mul_(2)
        got = attention.to_k(x)
        assert torch.equal(got, attention.to_k(inputs[0] * 2))


def test_kin_under_gradients_of_the_input_keep_to_themselves(model, inputs, tasks):
    with attach(model, {"a": tasks["a"]}):
        x = inputs[0].clone().requires_grad_()
        model(x, inputs[1]).square().sum().backward()
        assert x.grad.isfinite().all()
        with torch.no_grad():
            want = model(*inputs)
        assert (model(x, inputs[1]) - want).abs().max() <= 1e-5 * want.abs().max()
