"""Denoisers in miniature under families' names, control tasks for them, and a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from diffscaler_core import TaskAdapter, new_task

from .conftest import Block, reference_task


class SD3Transformer2DModel(nn.Module):
    """A denoiser in miniature, under a family's name: a convolution embeds (B, 4, 8, 8)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(4, width, 2, stride=2)
        self.transformer_blocks = nn.ModuleList([Block(width), Block(width)])
        self.proj_out = nn.Linear(width, 4)

    def embed(self, x):
        return self.pos_embed.proj(x).flatten(2).transpose(1, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x)


class FluxTransformer2DModel(SD3Transformer2DModel):
    """The same with a Linear that sees patches packed by hand."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.pos_embed
        self.x_embedder = nn.Linear(16, width)

    def embed(self, x):
        return self.x_embedder(F.unfold(x, 2, stride=2).transpose(1, 2))


class UNet2DModel(SD3Transformer2DModel):
    """The same with a 3×3 convolution, as a U-Net begins; its embedding has no bias."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.pos_embed
        self.conv_in = nn.Conv2d(4, width, 3, padding=1, bias=False)

    def embed(self, x):
        return self.conv_in(x).flatten(2).transpose(1, 2)


#: Class -> name of the embedding, and (kernel, stride, padding) of the windows that it sees.
MODELS = {
    SD3Transformer2DModel: ("pos_embed.proj", (2, 2, 0)),
    FluxTransformer2DModel: ("x_embedder", (2, 2, 0)),
    UNet2DModel: ("conv_in", (3, 1, 1)),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Z = rand(3, 4, 8, 8, seed=1), rand(3, 4, 8, 8, seed=2)


def built(kind) -> nn.Module:
    torch.manual_seed(0)
    return kind().requires_grad_(False).eval()


def trained(task: TaskAdapter, seed: int = 0, size: float = 0.3) -> TaskAdapter:
    generator = torch.Generator().manual_seed(seed)

    def noise(t):
        return t + size * torch.randn(t.shape, generator=generator)

    layers = {n: {k: noise(t) for k, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers, extras={k: noise(t) for k, t in task.extras.items()})


def edges(model, seed: int = 0, name: str = "edges", **options) -> TaskAdapter:
    component = "unet" if isinstance(model, UNet2DModel) else None
    facts = {"rank": 3, "component": component, "control": "edges", **options}
    return trained(new_task(model, name=name, **facts), seed)


def plain(model, seed: int = 5, name: str = "style") -> TaskAdapter:
    component = "unet" if isinstance(model, UNet2DModel) else None
    return trained(new_task(model, rank=3, name=name, component=component), seed)


class Controlled(nn.Module):
    """W over windows of x and of each z, all in one place: no hook, no affiner of ours."""

    def __init__(self, layer, windows, controls) -> None:
        super().__init__()
        self.layer, self.windows, self.controls = layer, windows, controls

    def through(self, x, matrix):
        kernel, stride, padding = self.windows
        return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2) @ matrix.T

    def tokens(self, x):
        layer, w = self.layer, self.layer.weight.flatten(1)
        out = self.through(x, w) + (0 if layer.bias is None else layer.bias)
        for task, z, w_scale, w_shift, w_subspace in self.controls:
            own = {n.rpartition(".")[2]: t for n, t in task.extras.items()}
            facts = task.info["control"]
            if "scale" in own:
                out = out + w_scale * own["scale"] * self.through(z, w)
                out = out + w_shift * own["shift"]
            hidden = self.through(z, own["down"].flatten(1))
            hidden = hidden.clamp(min=0) if facts["activation"] == "relu" else hidden
            out = out + w_subspace * facts["gain"] * (hidden @ own["up"].T)
        return out


def reference(model, controls, others=()):
    """What the model must say: controls [(task, z, strength)], others [(task, strength)]."""
    name, windows = MODELS[type(model)]
    tasks = [task for task, *_ in controls] + [task for task, _ in others]
    weights = [w for _, _, w in controls] + [w for _, w in others]
    moved = [
        t.replace(layers={n.replace("unet.", "transformer."): own for n, own in t.layers.items()})
        for t in tasks
    ]
    twin = reference_task(model, moved, weights)
    parts = [(task, z, *(w if isinstance(w, tuple) else (w, w, w))) for task, z, w in controls]
    embedding = Controlled(model.get_submodule(name), windows, parts)
    twin.embed = embedding.tokens
    return twin


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()
    return True
