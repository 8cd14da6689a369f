"""Inputs that need not be kept, because the graph can make them again in one cheap step.

A feed-forward's second layer reads GELU(h), or u · v of a gated one. Autograd keeps h (or u and v)
for the activation's own gradient, so a copy of the result would be kept for our D alone: a third
of a block's activations. We keep the graph's node instead, and do its step again in the backward:
same operation, same operands, same bits. Our choice, not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Recipe = Callable[[], Tensor]


def recipe_of(x: Tensor) -> Recipe | None:
    """Returns how to make x again in the backward, or None if that is not free.

    The recipe holds x's node in the graph, not x. It reads what the node has saved, which
    checkpointing allows once only; there nothing is kept anyway, so there is no recipe.
    """
    node: Any = x.grad_fn
    kind = None if node is None else node.name()
    if kind not in _STEPS or _is_checkpointed():
        return None
    step, operands = _STEPS[kind]
    if kind == "MulBackward0" and any(getattr(node, name) is None for name in operands):
        return None  # only one factor needs a gradient, so the other is not kept
    return _Again(node, step, operands)


class _Again:
    def __init__(self, node: Any, step: Callable[..., Tensor], operands: tuple[str, ...]) -> None:
        self._node, self._step, self._operands = node, step, operands

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self._step(*(getattr(self._node, name) for name in self._operands))


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


#: Node of the graph -> what it did, and what it keeps for its own gradient.
_STEPS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "GeluBackward0": (_gelu, ("_saved_self", "_saved_approximate")),
    "SiluBackward0": (F.silu, ("_saved_self",)),
    "MulBackward0": (torch.mul, ("_saved_self", "_saved_other")),
}


def _is_checkpointed() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return True  # a torch that cannot say
    hooks = top(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
