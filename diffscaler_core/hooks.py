"""Forward hooks on foreign layers: how a call reaches the stacks, and leaves no trace afterwards.

Hooks are small objects, not closures, so that a model that carries them can be copied and pickled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .control import ControlStack
from .stack import AffinerStack


class LayerHook:
    """The one forward hook of a layer, shared by all attachments; can be pickled and copied."""

    def __init__(self) -> None:
        self.stacks: list[AffinerStack] = []

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        """Called by torch after the layer; what it returns takes the layer's output's place."""
        x = args[0] if args else next(iter(kwargs.values()))
        if len(self.stacks) == 1:
            # unless a hook before this one saw y, and may have kept it
            first = next(iter(module._forward_hooks.values()))
            return self.stacks[0](x, y, first is self)  # type: ignore[no-any-return]
        out = y
        for i, stack in enumerate(self.stacks):
            corrected = stack(x, y)  # each sees the frozen output: a parallel sum
            out = corrected if i == 0 else out + (corrected - y)
        return out


class ControlHook:
    """Adds the controls of one attachment to what the patch embedding gives; can be copied."""

    def __init__(self, stack: ControlStack) -> None:
        self.stack = stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """Called by torch after the layer; see `LayerHook`."""
        # `forward`, as the module's own call would run this hook, and other tasks', once more
        return self.stack(module.forward, y)  # type: ignore[no-any-return]


def hang(module: nn.Module, stack: AffinerStack) -> tuple[LayerHook, AffinerStack, Any]:
    """Puts a stack behind a layer; returns its hook, the stack, and the hook's handle."""
    for key, hook in module._forward_hooks.items():
        if isinstance(hook, LayerHook):
            hook.stacks.append(stack)
            return hook, stack, Handle(module, key)
    hook = LayerHook()
    hook.stacks.append(stack)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    return hook, stack, handle


class Handle:
    """Removes a hook that another attachment registered."""

    def __init__(self, module: nn.Module, key: int) -> None:
        self.module, self.key = module, key

    def remove(self) -> None:
        """Takes the hook off the layer."""
        self.module._forward_hooks.pop(self.key, None)
        self.module._forward_hooks_with_kwargs.pop(self.key, None)
