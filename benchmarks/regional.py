"""Two tasks, each in its half of the picture, beside one task; and ComfyUI's own way to do it.

    python benchmarks/regional.py [--device cuda] [--rounds 7] [--steps 10] [--batch 4]

First diffusers' DiT-S/2 with random weights, batch 8, rank 8 on every Linear of every block: calls
of the model. Before that, one task in both halves must do what it does without masks. Then ComfyUI
on the pocket base: whole samplings with guidance. ComfyUI's way is two LoRA hooks of the same rank
on the same layers, each with its mask on a pair of conditionings; ours is two Apply DiffScaler Task
nodes with regions, or, with a prompt of its own in each half as ComfyUI's way has, two Route
DiffScaler Tasks nodes on masked conditionings. Variants take turns in random order. Prints Markdown
tables for RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dit import base_model, inputs_of
from in_comfyui import Host, lora_file
from torch import Tensor, nn
from turns import Turns, take_turns
from variants import Call, random_task, shared_copy

from diffscaler_core import Attachment, attach
from diffscaler_core.token_layout import layout_of

BASE, ONE, STACKED, REGIONS = "frozen base", "one task", "two tasks", "two tasks, a mask each"
COMFY_ONE, COMFY_TWO = "ComfyUI: one LoRA, loader", "ComfyUI: two LoRA hooks with masks"
ROUTED = "two prompts with a task and a mask each"


def halves(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns masks of the left and of the right half, (1, height, width)."""
    left = torch.zeros(1, height, width)
    left[..., : width // 2] = 1
    return left, 1 - left


def in_diffusers(device: str, rounds: int) -> Turns:
    """Returns the times of calls of DiT-S/2.

    Raises:
        SystemExit: A task in both halves is not the task.
    """
    model, inputs = base_model(device), inputs_of(8, device)
    layout = layout_of(model, inputs["hidden_states"].shape[-2:])
    left, right = (mask.unsqueeze(1) for mask in halves(*inputs["hidden_states"].shape[-2:]))
    first, second = (random_task(model, seed=i) for i in range(2))

    def call(variant: nn.Module) -> Tensor:
        return variant(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    calls: dict[str, Call] = {BASE: partial(call, model)}

    def put(tasks: Any, masked: bool = False) -> tuple[Call, Attachment]:
        copied = shared_copy(model)
        attachment = attach(copied, tasks).to(device)
        if masked:
            attachment.set_regions({"a": left, "b": right}, layout)
        return partial(call, copied), attachment

    same, attachment = put({"a": first, "b": first}, masked=True)
    calls[ONE], _ = put(first)
    error, effect = (float((calls[n]() - same()).abs().max()) for n in (ONE, BASE))
    if error > 0.01 * effect:
        raise SystemExit(f"a task in both halves differs from the task by {error:.2g}")
    attachment.remove()
    calls[STACKED], _ = put({"a": first, "b": second})
    calls[REGIONS], _ = put({"a": first, "b": second}, masked=True)
    return take_turns(calls, device, rounds)


def in_comfyui(device: str, rounds: int, steps: int, batch: int) -> Turns:
    """Returns the times of whole samplings of the pocket base."""
    host = Host(Path(tempfile.mkdtemp(prefix="diffscaler-")), device)
    import comfy.hooks
    from comfy_extras import nodes_hooks

    model = host.base()
    tasks = host.random_tasks(model, 2)
    loras = [lora_file(task) for task in tasks]
    masks = halves(128, 128)
    prompts = host.prompt("cat"), host.prompt("rocket")
    negative = host.prompt("")
    apply = host.node("DiffScalerApplyTask").execute
    route = host.node("DiffScalerRouteTasks").execute

    def sample(made: Callable[[], tuple[Any, Any, Any]]) -> Tensor:
        return host.sample(*made(), batch=batch, steps=steps)

    def regions() -> tuple[Any, Any, Any]:
        patched = model
        for task, mask in zip(tasks, masks, strict=True):
            patched = apply(patched, task, 1.0, region=mask).args[0]
        return patched, prompts[0], negative

    def pair(positive: Any, own_negative: Any, mask: Tensor, hooks: Any = None) -> tuple[Any, Any]:
        node = nodes_hooks.PairConditioningSetProperties()
        return node.set_properties(  # type: ignore[no-any-return]
            positive, own_negative, 1.0, "default", mask=mask, hooks=hooks
        )

    def combined(pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        node = nodes_hooks.PairConditioningCombine()
        return node.combine(*pairs[0], *pairs[1])  # type: ignore[no-any-return]

    def routed() -> tuple[Any, Any, Any]:
        patched, pairs = model, []
        for task, mask, prompt in zip(tasks, masks, prompts, strict=True):
            patched, *conds = route(patched, prompt, {"task0": task}, negative=negative).args
            pairs.append(pair(*conds, mask))
        return patched, *combined(pairs)

    def hooks() -> tuple[Any, Any, Any]:
        pairs = []
        for lora, mask, prompt in zip(loras, masks, prompts, strict=True):
            hook = comfy.hooks.create_hook_lora(lora, strength_model=1.0, strength_clip=0.0)
            pairs.append(pair(prompt, negative, mask, hook))
        return model, *combined(pairs)

    def prompts_alone() -> tuple[Any, Any, Any]:
        made = zip(masks, prompts, strict=True)
        return model, *combined([pair(prompt, negative, mask) for mask, prompt in made])

    made: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
        BASE: lambda: (model, prompts[0], negative),
        ONE: lambda: (apply(model, tasks[0], 1.0).args[0], prompts[0], negative),
        REGIONS: regions,
        COMFY_ONE: lambda: (host.with_lora(model, loras[0], 1.0), prompts[0], negative),
        "frozen base, two masked prompts": prompts_alone,
        ROUTED: routed,
        COMFY_TWO: hooks,
    }
    return take_turns({n: partial(sample, m) for n, m in made.items()}, device, rounds)


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="pictures in ComfyUI's sampling")
    args = parser.parse_args()
    turns = in_diffusers(args.device, args.rounds)
    print(turns.table(BASE, "DiT-S/2, batch 8, a call"), end="\n\n")
    print(turns.goals((REGIONS, ONE, "≤ 1.1"), (REGIONS, STACKED, "")), flush=True)
    turns = in_comfyui(args.device, args.rounds, args.steps, args.batch)
    title = f"ComfyUI, pocket base, batch {args.batch}, a step of {args.steps}"
    print("\n" + turns.table(BASE, title, per=1 / args.steps), end="\n\n")
    print(turns.goals((REGIONS, ONE, "≤ 1.1"), (COMFY_TWO, COMFY_ONE, ""), (COMFY_TWO, ROUTED, "")))


if __name__ == "__main__":
    main()
