"""Caches of an earlier step: diffusers' FirstBlockCache, FasterCache, TaylorSeer…, and DeepCache.

They keep what a model's blocks gave. What was kept under other tasks, strengths or rows is no
longer what the model gives, so it is forgotten as soon as those change. Nothing of diffusers is
imported: its hooks are known by what they have.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

#: Where diffusers keeps a module's hooks.
_REGISTRY = "_diffusers_hook"
#: What a state per context goes on with: MagCache's table of ratios is by step.
_KEPT = ("step_index",)


def forget_steps(model: nn.Module) -> None:
    """Makes every cache on a model compute its next step in full.

    diffusers' own reset is for the end of a sampling: within one it would lose the call's context
    (whether it is the conditional one) and which step it is.

    Args:
        model: The model, below torch.compile's wrapper.
    """
    for module in model.modules():
        registry = module.__dict__.get(_REGISTRY)
        for hook in () if registry is None else registry.hooks.values():
            if getattr(hook, "_is_stateful", False):
                _forget(hook, module)
    forward = model.__dict__.get("forward")
    names = inspect.getclosurevars(forward).nonlocals if inspect.isfunction(forward) else {}
    helper: Any = names.get("self")
    if hasattr(helper, "start_timestep") and hasattr(helper, "cached_output"):  # DeepCache's
        helper.start_timestep = None  # it counts its intervals from the next step


def leaves_rows_out(model: nn.Module) -> bool:
    """Says whether a cache leaves the unconditional half of a batch out, below the model's call."""
    hooks = getattr(model.__dict__.get(_REGISTRY), "hooks", {}).values()
    return any(
        hasattr(hook, "unconditional_batch_skip_range") and not hook.is_guidance_distilled
        for hook in hooks
    )


def _forget(hook: Any, module: nn.Module) -> None:
    managers = [own for own in vars(hook).values() if hasattr(own, "_state_cache")]
    for manager in managers:
        for name, state in list(manager._state_cache.items()):
            kept = {key: getattr(state, key) for key in _KEPT if hasattr(state, key)}
            fresh = manager._state_cls(*manager._init_args, **manager._init_kwargs)
            vars(fresh).update(kept)
            manager._state_cache[name] = fresh
    if managers:
        return
    hook.reset_state(module)
    held: Any = getattr(hook, "state", None)
    every = getattr(hook, "block_skip_range", None)
    # FasterCache's blocks take their first call in its range for one they have something kept for
    if every is not None and hasattr(held, "batch_size"):
        held.iteration = every
