"""Adapted copies of one frozen base, ready to be timed beside it.

All copies share the base's own weights, so that none runs on memory of its own, and each keeps what
is attached to it, so that nothing is attached or compiled between two measurements.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffscaler_core import TaskAdapter, new_task

Call = Callable[[], Tensor]


def shared_copy(model: nn.Module) -> Any:
    """Returns a copy of a model that holds the same weights, not copies of them."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def random_task(
    model: nn.Module, method: str = "diffscaler", rank: int = 8, seed: int = 0, **options: Any
) -> TaskAdapter:
    """Returns a task whose parts all do something; options as in `new_task`."""
    task = new_task(model, method, rank, seed=seed, name=f"task{seed}", **options)
    generator = torch.Generator().manual_seed(seed)
    layers = {
        layer: {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in own.items()}
        for layer, own in task.layers.items()
    }
    return task.replace(layers=layers)


def peft_lora(model: nn.Module, layers: Sequence[str], rank: int, count: int = 1) -> Any:
    """Returns a copy that runs PEFT's LoRA, un-merged: a `PeftModel` with random adapters.

    Args:
        model: The base.
        layers: Names of the layers that are adapted.
        rank: Of each adapter, in the base's dtype, as diffusers loads them.
        count: How many adapters: "task0", "task1", …; the first is active.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=list(layers), init_lora_weights=False)
    made = get_peft_model(shared_copy(model), config, "task0", autocast_adapter_dtype=False)
    for i in range(1, count):
        made.add_adapter(f"task{i}", config, autocast_adapter_dtype=False)
    own = (p for name, p in made.named_parameters() if "lora_" in name)
    generator = torch.Generator().manual_seed(0)
    for parameter in own:  # numbers as small as `random_task`'s
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return made.eval().requires_grad_(False)


def compiled(models: Mapping[str, nn.Module], calls: Mapping[str, Call], mode: str) -> None:
    """Compiles every variant's model in place, and checks that its answer stays what it was.

    torch keeps compiled code by the class of a model, and by default does not ask which hooks hang
    on it; here it must, or one variant would run another's code.

    Args:
        models: Variant -> its model.
        calls: Variant -> a call of it.
        mode: torch.compile's: "default", "reduce-overhead" or "max-autotune".

    Raises:
        SystemExit: A compiled variant does not say what it said before.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.config.recompile_limit = 4 * len(models)
    wanted = {name: call().clone() for name, call in calls.items()}
    first = next(iter(wanted.values()))
    effect = max(float((answer - first).abs().max()) for answer in wanted.values())
    for name, model in models.items():
        model.compile(mode=mode)
        error = float((calls[name]() - wanted[name]).abs().max())
        if error > 0.02 * effect:
            raise SystemExit(f"{name}: compiled it differs by {error:.2g}; tasks do {effect:.2g}")


def graphs() -> int:
    """Returns how many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
