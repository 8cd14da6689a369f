"""Models without weights: layer names and shapes as a tree on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .targets import Target

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hollow_model(class_name: str, targets: Iterable[Target]) -> nn.Module:
    """Returns a model of that class name with these layers and nothing else.

    `new_task` and `find_targets` work on it as on the real one.

    Args:
        class_name: The denoiser's class.
        targets: Its adaptable layers.
    """
    root: nn.Module = type(class_name, (nn.Module,), {})()
    for target in targets:
        _plant(root, target.name.split("."), _layer(target))
    return root


def _plant(root: nn.Module, path: Sequence[str], leaf: nn.Module) -> None:
    """Hangs a layer into the tree; a module with numbered children that are no layers is a list."""
    head, *rest = path
    if not rest:
        root.add_module(head, leaf)
        return
    if head not in root._modules:
        blocks = rest[0].isdigit() and len(rest) > 1
        root.add_module(head, nn.ModuleList() if blocks else nn.Module())
    _plant(root._modules[head], rest, leaf)  # type: ignore[arg-type]


def _layer(target: Target) -> nn.Module:
    with torch.device("meta"):
        if not target.kernel:
            return nn.Linear(target.in_features, target.out_features, target.has_bias)
        kind: Any = _CONVOLUTIONS[len(target.kernel) - 1]
        sizes = (target.in_features, target.out_features, target.kernel)
        conv: nn.Module = kind(*sizes, bias=target.has_bias)
    return conv
