"""Affiners folded into one layer's own weight and bias: what folds, and the sum that does it.

A scale, a shift and an identity subspace fold exactly, in the weight's own dtype:

    W' = (1 + a) ⊙ W + s · U D        b̂' = b̂ + b   (with DiffFit's scale: (1 + a) ⊙ b̂ + b)

Keeping the weights, to put them back, is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .affiner import Affiner, fold

#: Part -> the tensors that belong to it.
TENSORS_OF = {"scale": ("scale",), "shift": ("shift",), "subspace": ("down", "up")}

_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights_of(module: Any) -> tuple[Tensor, Tensor | None]:
    """Returns a layer's weight and bias."""
    return module.weight, module.bias


@torch.no_grad()
def fold_into(module: nn.Module, affiners: Sequence[Affiner], strengths: Tensor) -> None:
    """Changes one layer's weight and bias in place, by a sum done in at least float32.

    Args:
        module: The layer, with plain weights.
        affiners: K affiners of it; they are moved to the CPU.
        strengths: Per task and part, (K, 3), on the CPU.
    """
    weight, bias = weights_of(module)
    exact = torch.promote_types(weight.dtype, torch.float32)
    cpu_bias = None if bias is None else bias.detach().cpu()
    folded = fold([a.cpu() for a in affiners], strengths, cpu_bias).to(weight.device, exact)
    new = weight.to(exact)
    if folded.gain is not None:
        new = new * (1 + folded.gain).view(-1, *(1,) * (weight.ndim - 1))
    if folded.down is not None and folded.up is not None:
        new = new + (folded.up @ folded.down.flatten(1)).view_as(weight)
    weight.copy_(new)
    if bias is None:
        return
    new = bias.to(exact)
    if folded.gain is not None:
        new = new * (1 + folded.gain)
    bias.copy_(new if folded.offset is None else new + folded.offset)


def unfoldable(
    module: Any, tensors: Mapping[str, Tensor], activation: str
) -> Iterator[tuple[str, str]]:
    """Yields (part, why) for each part of a layer that no plain weight can express.

    Args:
        module: The layer.
        tensors: A task's tensors on it.
        activation: Of the task's subspaces.
    """
    if "down" in tensors and activation != "identity":
        yield "subspace", f"its {activation} subspace"
    elif "down" in tensors and getattr(module, "groups", 1) != 1:
        yield "subspace", "a subspace on grouped convolutions"
    if "shift" in tensors and module.bias is None:
        yield "shift", "a shift on layers without bias"


def not_plain(module: nn.Module) -> str | None:
    """Returns why a layer's weight cannot be rewritten, or None."""
    for tensor in weights_of(module):
        if tensor is None:
            continue
        if tensor.is_meta:
            return "offloaded (fuse before enabling offload)"
        if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
            return f"quantised ({type(tensor.data).__name__})"
        if tensor.dtype not in _PLAIN:
            return f"quantised ({str(tensor.dtype).removeprefix('torch.')})"
    return None


def weight_sum(module: nn.Module) -> float:
    """Returns a number by which a changed weight is told from the one that was left behind."""
    return float(weights_of(module)[0].detach().double().abs().sum())


def alike(before: float, module: nn.Module) -> bool:
    """Says whether a weight is as it was; another dtype or device since may round its sum."""
    return abs(weight_sum(module) - before) <= 1e-9 * abs(before)
