"""Folding tasks into a model's own weights and back: faster calls, for a fixed choice of tasks.

A scale, a shift and an identity subspace fold exactly (see `folding.py`). A relu subspace does not
fold, nor a shift on a layer without bias (a new bias would change the state_dict), nor an identity
subspace on a grouped convolution. What does not fold can go on running behind the fused weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..affiner import PARTS, affiner_from
from ..attach import Weight
from ..errors import DiffScalerError, first_names
from ..folding import TENSORS_OF, alike, fold_into, not_plain, unfoldable, weight_sum, weights_of
from ..targets import resolve
from ..task import TaskAdapter
from .models import check_names, check_unfused, states_of
from .state import ModelState


def fuse_diffscaler(
    pipe: Any, names: str | Sequence[str] | None = None, partial: bool = False
) -> None:
    """Folds tasks into the models' weights at their strengths: no cost per call, no switching.

    The model's own weights are kept on the CPU, to be put back. The sum is rounded to the weights'
    dtype: in bfloat16 a weak task loses precision. Other tasks then act on the fused model.

    Args:
        pipe: The pipeline.
        names: Which tasks; None: the active ones.
        partial: True: what cannot fold (relu subspaces, shifts on layers without bias) goes on
            running unfused; False: that is an error.

    Raises:
        DiffScalerError: Something cannot fold; every model is then as it was.
    """
    active = list(dict.fromkeys(name for s in states_of(pipe) for name in s.weights))
    names = [names] if isinstance(names, str) else active if names is None else list(names)
    check_names(pipe, names)
    if not names:
        raise DiffScalerError("no task is active, so there is nothing to fuse; load or set one")
    check_unfused(pipe, "fuse more than")
    controls = {n for s in states_of(pipe) for n in names if n in s.tasks and s.tasks[n].is_control}
    if controls:
        raise DiffScalerError(
            f"cannot fuse the control task {', '.join(sorted(controls))}: it acts only where there "
            f"is a control picture, and weights act everywhere"
        )
    bound = {n for s in states_of(pipe) for n in names if n in s.tasks and s.is_bound(n)}
    if bound:
        raise DiffScalerError(
            f"cannot fuse {', '.join(sorted(bound))}: weights act in every step and everywhere, a "
            f"schedule, a mask or hidden units of some noise levels do not; set_diffscaler without "
            f"them, if there is a schedule or mask"
        )
    if not all(state.enabled for state in states_of(pipe)):
        raise DiffScalerError("tasks are disabled; call enable_diffscaler() before fusing")
    chosen = [(state, [n for n in names if n in state.tasks]) for state in states_of(pipe)]
    plans = [plan_fuse(state, own) for state, own in chosen if own]
    stays = dict.fromkeys(task for plan in plans for task in plan.stays)
    if stays and not partial:
        raise DiffScalerError(
            f"cannot fold into the weights: {', '.join(stays)}; pass partial=True to fuse the rest "
            f"and let these run"
        )
    for plan in plans:
        fuse(plan)


def unfuse_diffscaler(pipe: Any) -> None:
    """Puts the models' own weights back, bit for bit; the fused tasks run by hooks again."""
    for state in states_of(pipe):
        if state.fused is not None:
            unfuse(state)


@dataclass
class Fused:
    """What was folded into a model's weights.

    Attributes:
        weights: name -> strength at which each task was folded.
        originals: layer -> its weight and bias as they were, on the CPU.
        sums: layer -> fingerprint of its weight after folding.
    """

    weights: dict[str, Weight]
    originals: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Plan:
    """What fusing some tasks of one model will do.

    Attributes:
        state: The model's state.
        weights: name -> strength.
        folds: layer -> [(name, task, the tensors that fold)].
        rest: name -> the task with only what does not fold.
        stays: "task (why)" of all that does not fold.
    """

    state: ModelState
    weights: dict[str, Weight]
    folds: dict[str, list[tuple[str, TaskAdapter, dict[str, Tensor]]]] = field(default_factory=dict)
    rest: dict[str, TaskAdapter] = field(default_factory=dict)
    stays: list[str] = field(default_factory=list)


def plan_fuse(state: ModelState, names: Sequence[str]) -> Plan:
    """Returns what folding these tasks into the model will do; changes nothing.

    Raises:
        DiffScalerError: A layer's weight is quantised, offloaded or otherwise no plain tensor.
    """
    plan = Plan(state, {name: state.weights.get(name, 1.0) for name in names})
    refused: dict[str, str] = {}
    moved = _group_offloaded(state.model)
    for name in names:
        task = state.current(name)
        activation = str(task.info.get("activation", "relu"))
        rest: dict[str, dict[str, Tensor]] = {}
        reasons: dict[str, None] = {}
        for layer, tensors in task.component_layers(state.component).items():
            module = _module(state.model, layer)
            if reason := moved or not_plain(module):
                refused[layer] = reason
            folds = dict(tensors)
            for part, why in unfoldable(module, tensors, activation):
                kept = {n: folds.pop(n) for n in TENSORS_OF[part]}
                rest.setdefault(f"{state.component}.{layer}", {}).update(kept)
                reasons[why] = None
            if folds:
                plan.folds.setdefault(layer, []).append((name, task, folds))
        if task.class_rows(state.component):
            reasons["its new classes"] = None
        plan.rest[name] = task.replace(layers=rest)
        plan.stays += [f"{name!r} ({why})" for why in reasons]
    if refused:
        layer, reason = next(iter(refused.items()))
        raise DiffScalerError(
            f"cannot fuse into {len(refused)} layers of {type(state.model).__name__}: the weight "
            f"of {layer!r} is {reason}; the tasks work as they are, unfused"
        )
    return plan


@torch.no_grad()
def fuse(plan: Plan) -> None:
    """Folds what the plan says into the model's weights; the rest goes on running."""
    state = plan.state
    state.tasks = {name: state.current(name) for name in state.tasks}
    rest = {n: plan.rest.get(n, task) for n, task in state.tasks.items()}
    fused = Fused(plan.weights)
    for layer, jobs in plan.folds.items():
        module = _module(state.model, layer)
        saved = [None if t is None else t.detach().to("cpu", copy=True) for t in weights_of(module)]
        fused.originals[layer] = saved[0], saved[1]  # type: ignore[assignment]
        affiners = [affiner_from(tensors, task.info) for _, task, tensors in jobs]
        strengths = torch.tensor([_per_part(plan.weights[name]) for name, _, _ in jobs])
        fold_into(module, affiners, strengths)
        fused.sums[layer] = weight_sum(module)
    state.fused = fused
    running = {n: t for n, t in rest.items() if n not in plan.weights or t.layers or t.extras}
    state.adopt(state.build(running, compiled="reset"))


@torch.no_grad()
def unfuse(state: ModelState) -> None:
    """Puts a model's own weights back, bit for bit, and lets its tasks run by hooks again.

    Raises:
        DiffScalerError: Something else changed the weights since; nothing is put back.
    """
    fused: Fused = state.fused
    changed = [n for n, s in fused.sums.items() if not alike(s, _module(state.model, n))]
    if changed:
        raise DiffScalerError(
            f"the weights of {len(changed)} layers changed after fuse_diffscaler() (first "
            f"{first_names(changed, 1)}), by a LoRA fused or unfused perhaps: undo that first"
        )
    for layer, saved in fused.originals.items():
        for parameter, original in zip(weights_of(_module(state.model, layer)), saved, strict=True):
            if parameter is not None and original is not None:
                parameter.copy_(original)
    tasks = {name: state.current(name) for name in state.tasks}
    state.fused = None
    state.adopt(state.build(tasks, compiled="reset"))


def _group_offloaded(model: nn.Module) -> str | None:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    if any("group_offloading" in r.hooks for r in registries if r is not None):
        return "group-offloaded, which would undo the change (fuse before enabling offload)"
    return None


def _module(model: nn.Module, layer: str) -> nn.Module:
    module = resolve(model, layer)
    if module is None:
        raise DiffScalerError(f"layer {layer!r} is gone from this {type(model).__name__}")
    return module


def _per_part(weight: Weight) -> list[float]:
    if not isinstance(weight, Mapping):
        return [float(weight)] * len(PARTS)
    return [float(weight.get(part, 1.0)) for part in PARTS]
