"""Holding a foreign model still while a task is trained on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import DiffScalerError


@contextlib.contextmanager
def frozen(model: Any, checkpointing: bool = False) -> Iterator[None]:
    """Holds a model still: no gradients, no dropout; afterwards every flag is what it was."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    was_checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    model.requires_grad_(False).eval()
    try:
        if checkpointing and not was_checkpointing:
            if not hasattr(model, "enable_gradient_checkpointing"):
                raise DiffScalerError(f"{type(model).__name__} has no gradient checkpointing")
            try:
                model.enable_gradient_checkpointing()
            except ValueError as error:  # a diffusers model that does not support it
                raise DiffScalerError(
                    f"{type(model).__name__} has no gradient checkpointing; leave it off"
                ) from error
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        if (
            checkpointing
            and not was_checkpointing
            and hasattr(model, "disable_gradient_checkpointing")
        ):
            model.disable_gradient_checkpointing()
