"""Tiny frozen models, tasks with random values, and a reference that replaces modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffscaler_core import TaskAdapter, new_task


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.to_q = nn.Linear(width, width)
        self.attn.to_out = nn.ModuleList([nn.Linear(width, width, bias=False), nn.Identity()])
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn.to_out[0](self.attn.to_q(x).tanh())
        return x + self.ff(x)


class Denoiser(nn.Module):
    """A transformer in miniature: (B, 4, 8, 8) latents, stride-2 patches, two blocks."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, width, 2, stride=2)
        self.transformer_blocks = nn.ModuleList([Block(width), Block(width)])
        self.proj_out = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x)


def filled(task: TaskAdapter, seed: int = 0, size: float = 0.3, **info) -> TaskAdapter:
    """The task with every tensor random, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: {k: size * torch.randn(t.shape, generator=generator) for k, t in own.items()}
        for name, own in task.layers.items()
    }
    return task.replace(layers=layers, info={**task.info, **info})


def reference_task(model: nn.Module, tasks, weights) -> nn.Module:
    """A copy of the model with layers that know their W; one sum over all tasks."""
    copied = copy.deepcopy(model)
    names = {n for task in tasks for n in task.component_layers("transformer")}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = copied.get_submodule(parent) if parent else copied
        setattr(owner, leaf, Replaced(getattr(owner, leaf), name, tasks, weights))
    return copied


class Replaced(nn.Module):
    """(1 + Σ w a) ⊙ (W x) + b̂ + Σ w b + Σ w s U act(D x), written out with the layer's own W."""

    def __init__(self, layer, name, tasks, weights) -> None:
        super().__init__()
        self.layer, self.parts = layer, []
        for task, weight in zip(tasks, weights, strict=True):
            tensors = task.component_layers("transformer").get(name)
            if tensors is not None:
                self.parts.append((tensors, dict(task.info), weight))

    def without_bias(self, x, weight, kernel_bias=None):
        twin = copy.copy(self.layer)
        twin._parameters = {"weight": weight, "bias": kernel_bias}
        return twin.forward(x)

    def per_channel(self, v):
        return v.reshape(-1, *(1,) * (self.layer.weight.ndim - 2))

    def forward(self, x):
        wx = self.without_bias(x, self.layer.weight)
        bias = self.layer.bias
        out = wx if bias is None else wx + self.per_channel(bias)
        for tensors, info, weight in self.parts:
            if "scale" in tensors:
                base = wx
                if info.get("scale_includes_bias") and bias is not None:
                    base = wx + self.per_channel(bias)
                out = out + weight * self.per_channel(tensors["scale"]) * base
            if "shift" in tensors:
                out = out + weight * self.per_channel(tensors["shift"])
            if "down" in tensors:
                out = out + weight * float(info.get("gain", 1.0)) * self.subspace(x, tensors, info)
        return out

    def subspace(self, x, tensors, info):
        down, up = tensors["down"], tensors["up"]
        act = torch.relu if info.get("activation", "relu") == "relu" else torch.nn.Identity()
        if isinstance(self.layer, nn.Linear):
            return act(x @ down.T) @ up.T
        # a real convolution module of the same geometry, all groups together
        kind = type(self.layer)
        conv = kind(
            self.layer.in_channels,
            len(down),
            self.layer.kernel_size,
            stride=self.layer.stride,
            padding=self.layer.padding,
            dilation=self.layer.dilation,
            padding_mode=self.layer.padding_mode,
            bias=False,
            dtype=down.dtype,
        )
        conv._parameters["weight"] = down
        return torch.einsum("or,br...->bo...", up, act(conv(x)))


def hooks_of(model: nn.Module) -> list[str]:
    """Names of modules that carry a hook or a forward of their own."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(model):
    """make(seed, method=…): a task for the tiny model that does something."""

    def build(seed: int = 0, **options) -> TaskAdapter:
        info = options.pop("info", {})
        options.setdefault("rank", 3)
        options.setdefault("name", f"task{seed}")
        return filled(new_task(model, **options), seed, **info)

    return build
