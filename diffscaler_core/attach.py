"""The torch carrier: attach(model, tasks) -> Attachment, by forward hooks on untouched layers.

For each target layer f with input x and output y = f(x), the layer's output becomes
y + Σ wₖ Δₖ(x, y) over all tasks attached, by however many calls. Nothing else in the model changes:
no module is replaced, no parameter renamed, no state_dict key added.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from .affiner import PARTS, Affiner, affiner_from
from .compiled import check_not_compiled, forget_compiled_code
from .errors import DiffScalerError, MismatchError, first_names, unknown
from .families import row_layout
from .stack import AffinerStack
from .targets import as_target, bias_of, component_of, geometry_of, resolve
from .task import TaskAdapter

logger = logging.getLogger(__name__)

#: Layers that diffusers' `fuse_qkv_projections` takes out of use.
QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
Weight = float | Mapping[str, float]
Row = str | Mapping[str, Weight] | None


class _LayerHook:
    """The one forward hook of a layer, shared by all attachments; can be pickled and copied."""

    def __init__(self) -> None:
        self.stacks: list[AffinerStack] = []

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        out = y
        for i, stack in enumerate(self.stacks):
            corrected = stack(x, y)  # each sees the frozen output: a parallel sum
            out = corrected if i == 0 else out + (corrected - y)
        return out


class Attachment(nn.Module):
    """Tasks attached to one model, until `remove()`. A context manager, and the tasks' parameters.

    Made by `attach`. It holds the parameters (`parameters()` for an optimiser, `to(device)`), never
    the model.

    Attributes:
        names: Names of the tasks, in the order of weights and rows.
        stacks: One per adapted layer.
    """

    def __init__(
        self, tasks: Mapping[str, TaskAdapter], stacks: Mapping[str, AffinerStack], component: str
    ) -> None:
        super().__init__()
        self.names = tuple(tasks)
        self.stacks = nn.ModuleList(stacks.values())
        self._tasks = dict(tasks)
        self._component = component
        self._weights = dict.fromkeys(self.names, _ONE)
        self._rows: Tensor | None = None
        self._hooks: list[tuple[_LayerHook, AffinerStack, Any]] = []
        self.requires_grad_(False)

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The strengths in force for the whole batch: task -> part -> strength."""
        return {n: dict(zip(PARTS, w, strict=True)) for n, w in self._weights.items()}

    @property
    def rows(self) -> Tensor | None:
        """The strengths per batch row, (B, K, 3), or None."""
        return self._rows

    def set_weights(self, weights: Weight | Mapping[str, Weight]) -> None:
        """Sets the strengths: one number for all tasks, or {task: strength}; absent tasks get 0.

        A strength is a number, or per part: {"scale": …, "shift": …, "subspace": …}, absent ones 1.
        Tensors change in place: no new attach, no recompile. Rows, if set, are dropped.

        Raises:
            UnknownNameError: No such task is attached, or no such part exists.
            DiffScalerError: A strength that is NaN or infinite.
        """
        new = {name: (0.0,) * len(PARTS) for name in self.names}
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(self.names, weights)
        for name, weight in weights.items():
            new[self._known(name)] = _per_part(weight)
        self._weights = new
        self.set_rows(None)

    def set_rows(self, rows: Sequence[Row] | Tensor | None) -> None:
        """Sets which tasks each row of the batch runs, in one forward.

        Args:
            rows: One entry per batch row: a task's name (strength 1), a mix {task: strength}, or
                None for the base; or strengths (B, K) or (B, K, 3); or None to end rows.

        Raises:
            UnknownNameError: A row names a task that is not attached.
            DiffScalerError: A tensor of another shape, no row at all, or NaN or Inf.
        """
        self._rows = None if rows is None else self._row_weights(rows)
        now = self._rows
        if now is None:
            now = torch.tensor([self._weights[name] for name in self.names])
        for stack in self._stacks():
            stack.set_weights(now)

    def requires_grad_(self, requires_grad: bool = True) -> Attachment:
        """Makes all parameters trainable, or frozen again.

        Training changes copies: the task that was attached stays as it is, `task()` returns the new.
        """
        for stack in self._stacks():
            stack.unsettle()  # what was folded before the training is out of date after it
        for parameter in self.parameters() if requires_grad else ():
            parameter.data = parameter.data.clone()
        super().requires_grad_(requires_grad)
        return self

    def task(self, name: str | None = None) -> TaskAdapter:
        """Returns a task with its parameters as they are now (a copy on the CPU), to be saved."""
        name = self.names[0] if name is None else self._known(name)
        slot = self.names.index(name)
        layers: dict[str, dict[str, Tensor]] = {}
        for stack in self._stacks():
            if slot in stack.slots:
                affiner = cast(Affiner, stack.affiners[stack.slots.index(slot)])
                layers[f"{self._component}.{stack.name}"] = {
                    k: v.detach().to("cpu", copy=True) for k, v in affiner.tensors().items()
                }
        ordered = {n: layers[n] for n in self._tasks[name].layers if n in layers}
        return self._tasks[name].replace(layers=ordered)

    def remove(self) -> None:
        """Takes the tasks off; the model is bit for bit what it was. In any order; idempotent."""
        for hook, stack, handle in self._hooks:
            hook.stacks.remove(stack)
            if not hook.stacks:
                handle.remove()
        if self._hooks:
            forget_compiled_code()
        self._hooks.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _stacks(self) -> list[AffinerStack]:
        return [cast(AffinerStack, stack) for stack in self.stacks]

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise unknown("task", name, self.names)
        return name

    def _row_weights(self, rows: Sequence[Row] | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            if rows.ndim == 2:
                rows = rows[..., None].expand(-1, -1, len(PARTS))
            if rows.ndim != 3 or rows.shape[1:] != (len(self.names), len(PARTS)):
                raise DiffScalerError(
                    f"rows must be (B, {len(self.names)}) or (B, {len(self.names)}, 3), "
                    f"got {tuple(rows.shape)}"
                )
            if not len(rows) or not bool(torch.isfinite(rows).all()):
                raise DiffScalerError("rows must hold finite strengths for at least one row")
            return rows.float()
        if not len(rows):
            raise DiffScalerError("rows must name a task, a mix or None for at least one row")
        table = torch.zeros(len(rows), len(self.names), len(PARTS))
        for i, row in enumerate(rows):
            mix = {row: 1.0} if isinstance(row, str) else row or {}
            for name, weight in mix.items():
                slot = self.names.index(self._known(name))
                table[i, slot] = torch.tensor(_per_part(weight))
        return table


def attach(
    model: nn.Module,
    tasks: TaskAdapter | Mapping[str, TaskAdapter],
    weights: Weight | Mapping[str, Weight] | None = None,
    *,
    component: str | None = None,
    compiled: str = "raise",
) -> Attachment:
    """Adds tasks to a frozen model until the attachment is removed. All or nothing.

    Several attachments to one model act as one parallel sum. Parameters are shared with the task's
    tensors and do not require gradients; call `requires_grad_()` on the attachment to train.

    Args:
        model: A denoiser; its weights are neither read nor changed.
        tasks: One task, or {name: task}.
        weights: As in `Attachment.set_weights`; None: every task at strength 1.
        component: Which of a task's components this model is; needed only if it has several.
        compiled: What to do if the model was compiled already, as compiled code ignores new hooks:
            "raise", or "reset" (drop torch's compiled code; the next call compiles anew).

    Raises:
        MismatchError: A layer of a task has no counterpart of its shape; the model is untouched.
        DiffScalerError: The model was compiled already, or its qkv layers were fused.
    """
    if isinstance(tasks, TaskAdapter):
        tasks = {tasks.name: tasks}
    component = component or _component_for(model, tasks)
    model = check_not_compiled(model, compiled)
    layers = {name: task.component_layers(component) for name, task in tasks.items()}
    _check_component(tasks, layers, component)
    modules = match_layers(model, tasks, layers)
    stacks = build_stacks(tasks, layers, modules, type(model).__name__)
    attachment = Attachment(tasks, stacks, component)
    with ExitStack() as undo:
        undo.callback(attachment.remove)
        for name, stack in stacks.items():
            attachment._hooks.append(_hook(modules[name], stack))
        attachment.set_weights(1.0 if weights is None else weights)
        _settle(stacks, modules)
        undo.pop_all()
    logger.info("attached %s to %d layers of %s", list(tasks), len(stacks), type(model).__name__)
    return attachment


def match_layers(
    model: nn.Module,
    tasks: Mapping[str, TaskAdapter],
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, nn.Module]:
    """Returns the module of every layer of every task, or raises one error with all misfits."""
    modules: dict[str, nn.Module] = {}
    for task_name, own in layers.items():
        missing, wrong, fused = [], [], []
        seen: dict[int, str] = {}
        for name, tensors in own.items():
            module = resolve(model, name)
            target = None if module is None else as_target(name, module)
            if module is None or target is None:
                missing.append(name)
                continue
            if not fits(tensors, target.shape):
                wrong.append(f"{name} is {'x'.join(map(str, target.shape))}")
            if seen.setdefault(id(module), name) != name:
                wrong.append(f"{name} is the same module as {seen[id(module)]}")
            if _is_fused(model, name):
                fused.append(name)
            modules[name] = module
        _raise_misfit(model, tasks[task_name], len(own), missing, wrong, fused)
    return modules


def fits(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> bool:
    """Says whether a layer's tensors belong on a target of shape (C_out, C_in, *kernel)."""
    out_features, *window = shape
    up, down = tensors.get("up"), tensors.get("down")
    vectors = [tensors[part] for part in ("scale", "shift") if part in tensors]
    if any(v.shape != (out_features,) for v in vectors):
        return False
    if up is None or down is None:
        return up is down
    return list(down.shape[1:]) == window and up.shape == (out_features, down.shape[0])


def build_stacks(
    tasks: Mapping[str, TaskAdapter],
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    modules: Mapping[str, nn.Module],
    class_name: str = "",
) -> dict[str, AffinerStack]:
    """Returns one stack per module, holding the affiners of every task that has that layer."""
    names = list(tasks)
    stacks: dict[str, AffinerStack] = {}
    for layer, module in modules.items():
        here = [name for name in names if layer in layers[name]]
        bias_counts = any(
            "scale" in layers[name][layer] and not tasks[name].info.get("scale_includes_bias")
            for name in here
        )
        stacks[layer] = AffinerStack(
            layer,
            [affiner_from(layers[name][layer], tasks[name].info) for name in here],
            [names.index(name) for name in here],
            bias_of(layer, module) if bias_counts else None,
            geometry_of(module),
            row_layout(class_name, layer),
        )
    return stacks


_ONE = (1.0,) * len(PARTS)
_PLAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _per_part(weight: Weight) -> tuple[float, ...]:
    if not isinstance(weight, Mapping):
        weight = dict.fromkeys(PARTS, weight)
    for part in weight:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    strengths = tuple(float(weight.get(part, 1.0)) for part in PARTS)
    if not all(map(math.isfinite, strengths)):
        raise DiffScalerError(f"a strength must be a finite number, got {dict(weight)}")
    return strengths


def _hook(module: nn.Module, stack: AffinerStack) -> tuple[_LayerHook, AffinerStack, Any]:
    for key, hook in module._forward_hooks.items():
        if isinstance(hook, _LayerHook):
            hook.stacks.append(stack)
            return hook, stack, _Handle(module, key)
    hook = _LayerHook()
    hook.stacks.append(stack)
    handle = module.register_forward_hook(hook, with_kwargs=True)
    return hook, stack, handle


class _Handle:
    """Removes a hook that another attachment registered."""

    def __init__(self, module: nn.Module, key: int) -> None:
        self.module, self.key = module, key

    def remove(self) -> None:
        self.module._forward_hooks.pop(self.key, None)
        self.module._forward_hooks_with_kwargs.pop(self.key, None)


def _component_for(model: nn.Module, tasks: Mapping[str, TaskAdapter]) -> str:
    components = dict.fromkeys(c for task in tasks.values() for c in task.components)
    if len(components) > 1:
        own = component_of(model)
        if own not in components:
            raise MismatchError(
                f"the tasks {list(tasks)} adapt {', '.join(components)}; "
                f"say which this model is: attach(…, component=…)"
            )
        return own
    return next(iter(components), component_of(model))


def _settle(stacks: Mapping[str, AffinerStack], modules: Mapping[str, nn.Module]) -> None:
    """Folds for the layers' own dtypes, so that compiled code finds tensors it can rely on."""
    for name, stack in stacks.items():
        weight = modules[name].weight
        if isinstance(weight, Tensor) and weight.dtype in _PLAIN_DTYPES and not weight.is_meta:
            stack.settle(weight.device, weight.dtype)


def _check_component(
    tasks: Mapping[str, TaskAdapter], layers: Mapping[str, Mapping[str, Any]], component: str
) -> None:
    there = dict.fromkeys(c for task in tasks.values() for c in task.components)
    if there and not any(layers.values()):
        raise MismatchError(
            f"the tasks {list(tasks)} adapt {', '.join(there)}, none of them {component!r}"
        )


def _is_fused(model: nn.Module, name: str) -> bool:
    """Says whether diffusers' `fuse_qkv_projections` made this q, k or v layer a dead one."""
    parent, _, leaf = name.rpartition(".")
    owner = resolve(model, parent) if parent else model
    return owner is not None and leaf in QKV and has_fused_qkv(owner)


def has_fused_qkv(attention: Any) -> bool:
    """Says whether an attention of diffusers now runs without its q, k and v layers.

    Its older `Attention` keeps the mark for ever; there the processor tells.
    """
    if not getattr(attention, "fused_projections", False):
        return False
    if type(attention).__name__ != "Attention":
        return True
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def _raise_misfit(
    model: nn.Module,
    task: TaskAdapter,
    count: int,
    missing: Sequence[str],
    wrong: Sequence[str],
    fused: Sequence[str],
) -> None:
    if fused:
        raise DiffScalerError(
            f"{type(model).__name__} had its qkv projections fused, so {len(fused)} layers of task "
            f"{task.name!r} are never called (first {first_names(fused, 1)}); call "
            f"unfuse_qkv_projections() before attaching"
        )
    if not missing and not wrong:
        return
    base = task.info.get("base") or {}
    made_for = f"{base.get('family', 'an unknown base')} ({base.get('class', 'unknown class')})"
    problems = []
    if missing:
        problems.append(f"{len(missing)} layers missing, first {first_names(missing)}")
    if wrong:
        problems.append(f"{len(wrong)} misfit, first {first_names(wrong)}")
    raise MismatchError(
        f"task {task.name!r}, made for {made_for} with {count} layers, does not fit this "
        f"{type(model).__name__}: {'; '.join(problems)}; attach it to the base it was made for"
    )
