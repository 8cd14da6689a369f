"""The formula written out over a model's own weights, to compare the pack's results with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Reference(nn.Module):
    """A layer written out after the paper, in place of the host's own: needs W, knows no host."""

    def __init__(self, layer: Any, tasks: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
        super().__init__()
        self.layer, self.tasks = layer, tasks

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        size = (1,) * (layer.weight.ndim - 2)

        def through(weight: Tensor) -> Tensor:
            if not size:
                return F.linear(x, weight)
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)

        def channels(values: Tensor) -> Tensor:
            return values.view(-1, *size)

        gain = 1 + sum(w * t["scale"] for t, w in self.tasks)
        y = channels(gain) * through(layer.weight)
        if layer.bias is not None:
            y = y + channels(layer.bias)
        for t, w in self.tasks:
            hidden = torch.relu(through(t["down"]))
            up = torch.einsum("or,br...->bo..." if size else "or,...r->...o", t["up"], hidden)
            y = y + w * (channels(t["shift"]) + up)
        return y


def replaced(model: Any, *tasks: tuple[Any, float]) -> Any:
    """Puts references into a model of its own."""
    for name in {n for task, _ in tasks for n in task.component_layers("transformer")}:
        parent, _, leaf = name.rpartition(".")
        owner = model.model.diffusion_model.get_submodule(parent)
        own = [(task.layers[f"transformer.{name}"], w) for task, w in tasks]
        setattr(owner, leaf, Reference(getattr(owner, leaf), own))
    return model


def close(a: Tensor, b: Tensor, by: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= by * b.abs().max())


def lora_for(tiny: Any, model: Any) -> dict[str, Tensor]:
    """A LoRA file on every Linear, with changes of the biases too."""
    generator = torch.Generator().manual_seed(7)
    file = {}
    for name in tiny.layers(model):
        module = model.model.diffusion_model.get_submodule(name)
        if module.weight.ndim == 2:
            key = f"diffusion_model.{name}"
            out, width = module.weight.shape
            file[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.05
            file[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator) * 0.05
            if module.bias is not None:
                file[f"{key}.diff_b"] = torch.randn(out, generator=generator) * 0.05
    return file


def merged(model: Any, lora: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """The LoRA added to a model's weights by hand."""
    for name, module in model.model.diffusion_model.named_modules():
        key = f"diffusion_model.{name}"
        if f"{key}.lora_up.weight" in lora:
            product = lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
            module.weight.data = module.weight + strength * product
        if f"{key}.diff_b" in lora:
            module.bias.data = module.bias + strength * lora[f"{key}.diff_b"]
    return model


def reference_over(tiny: Any, lora: Mapping[str, Tensor], task: Any) -> Any:
    return replaced(merged(tiny.load("tiny_sd3"), lora), (task, 1.0))
