"""torch.compile ignores hooks that come or go after compiling. Find out, and say so."""

from __future__ import annotations

import sys
from typing import cast

from torch import nn

from .errors import DiffScalerError, UnknownNameError


def check_not_compiled(model: nn.Module, compiled: str = "raise") -> nn.Module:
    """Returns the model below torch.compile's wrapper, made ready for new hooks.

    Args:
        model: A model, possibly compiled, whole or by regions.
        compiled: "raise", or "reset": drop compiled code so that the next call compiles anew.

    Raises:
        DiffScalerError: The model was compiled and `compiled` is "raise".
    """
    if compiled not in ("raise", "reset"):
        raise UnknownNameError(f"compiled must be 'raise' or 'reset', got {compiled!r}")
    inner = cast(nn.Module, getattr(model, "_orig_mod", model))
    is_compiled = inner is not model or any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in inner.modules()
    )
    if is_compiled and compiled == "raise":
        raise DiffScalerError(
            f"this {type(inner).__name__} is compiled, and compiled code ignores later hooks: "
            f"attach the task before torch.compile, or pass compiled='reset' to compile anew"
        )
    forget_compiled_code()  # a compiled function around the model cannot be seen from the model
    return inner


def forget_compiled_code() -> None:
    """Drops torch's compiled code, if any, so that the next call sees the hooks there are."""
    dynamo = sys.modules.get("torch._dynamo")  # absent: nothing was ever compiled here
    if dynamo is not None:
        dynamo.reset()
