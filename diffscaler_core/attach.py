"""The torch carrier: attach(model, tasks) -> Attachment, by forward hooks on untouched layers.

For each target layer f with input x and output y = f(x), the layer's output becomes
y + Σ wₖ Δₖ(x, y) over all tasks attached, by however many calls. Nothing else in the model changes:
no module is replaced, no parameter renamed, no state_dict key added.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affiner import PARTS
from .classes import CLASSES, ClassStack, hang_classes
from .compiled import check_not_compiled, forget_compiled_code
from .control import Control, ControlStack
from .ensemble import Ensemble
from .errors import DiffScalerError, MismatchError, unknown
from .hooks import ControlHook, LayerHook, hang
from .matching import fit
from .regions import Regions
from .scales import ScaleWatch
from .siblings import Siblings
from .stack import AffinerStack
from .targets import component_of
from .task import CONTROL, TaskAdapter
from .token_layout import TokenLayout

logger = logging.getLogger(__name__)

Weight = float | Mapping[str, float]
Row = str | Mapping[str, Weight] | None
Stack = AffinerStack | ControlStack | ClassStack


class Attachment(nn.Module):
    """Tasks attached to one model, until `remove()`. A context manager, and the tasks' parameters.

    Made by `attach`. It holds the parameters (`parameters()` for an optimiser, `to(device)`), never
    the model.

    A control task acts in those rows only that have a control (`set_controls`); the others run the
    base, bit for bit, and their other tasks.

    Attributes:
        stacks: One per adapted layer.
        controls: One per patch embedding that control tasks see their pictures through.
        classes: One per table of class embeddings that tasks bring new classes to.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskAdapter],
        stacks: Mapping[str, AffinerStack],
        component: str,
        controls: Mapping[str, ControlStack] | None = None,
        classes: Mapping[str, ClassStack] | None = None,
    ) -> None:
        super().__init__()
        self._slots = {name: slot for slot, name in enumerate(tasks)}
        self.stacks = nn.ModuleList(stacks.values())
        self.controls = nn.ModuleList((controls or {}).values())
        self.classes = nn.ModuleList((classes or {}).values())
        self._ensemble = Ensemble()
        self._shared = Siblings(), ScaleWatch()
        for stack in stacks.values():
            stack.join(self._ensemble, *self._shared)
        self._tasks = dict(tasks)
        self._component = component
        self._weights = dict.fromkeys(self.names, _ONE)
        self._rows: Tensor | None = None
        self._given: dict[str, Control] = {}
        self._gated = True
        self._waits = False
        self._grouped: tuple[str | None, ...] | None = None
        self._hooks: list[tuple[LayerHook, AffinerStack, Any]] = []
        self._handles: dict[ControlStack | ClassStack, Any] = {}
        self.requires_grad_(False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of weights and rows."""
        return tuple(self._tasks)

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
        self._put_in_force()

    @property
    def is_timed(self) -> bool:
        """Says whether a task has units that act by noise level, so that `set_time` is needed."""
        return any(task.is_timed for task in self._tasks.values())

    def set_time(self, log_snr: float | Tensor) -> None:
        """Says at which noise level the next calls are, for tasks that act by it.

        Tensors change in place: no new attach, no recompile. Pipelines with `load_diffscaler`, the
        trainer and ComfyUI do it themselves.

        Args:
            log_snr: λ = 2 ln(α/σ): falls with noise. One for the whole batch, or (B,) by row.

        Raises:
            DiffScalerError: NaN, or a tensor of another shape.
        """
        level = torch.as_tensor(log_snr).detach().float()
        if level.ndim > 1 or not level.numel():
            raise DiffScalerError(f"log_snr must be a number or (B,), got {tuple(level.shape)}")
        self._ensemble.set_time(level)

    def set_controls(self, controls: Mapping[str, Control] | None) -> None:
        """Gives control tasks their pictures, in place of those they had; their strengths stay.

        Args:
            controls: Task -> control; tasks that are left out, and rows with the factor 0, run the
                base. None: no task has a control.

        Raises:
            UnknownNameError: No such task is attached.
            DiffScalerError: A task that takes no control, or rows that are not those in force.
        """
        given = dict(controls or {})
        for name in given:
            if not self._tasks[self._known(name)].is_control:
                raise DiffScalerError(
                    f"task {name!r} takes no control picture; control tasks here: "
                    f"{', '.join(n for n, t in self._tasks.items() if t.is_control) or 'none'}"
                )
        before = self._given, self._gated
        self._given, self._gated = given, True
        try:
            self._put_in_force()
        except DiffScalerError:
            self._given, self._gated = before
            raise

    def set_regions(
        self, masks: Mapping[str, Tensor] | None, layout: TokenLayout | None = None
    ) -> None:
        """Makes tasks act in a part of the picture alone, in the same forward as all others.

        Each token's Δ is weighted by the mask there; text tokens and whatever else is no place in
        the picture get the mask's mean.

        Args:
            masks: Task -> (1 or B, 1, H, W) in 0..1, of any size; tasks without one act everywhere.
                None: all do.
            layout: The latents' size and how the model's tokens lie: `token_layout.layout_of`.

        Raises:
            UnknownNameError: No such task is attached.
            DiffScalerError: A mask of another shape or out of range, or masks without a layout.
        """
        if not masks:
            self._ensemble.set_regions(None)
            return
        if layout is None:
            raise DiffScalerError("masks need to know how tokens lie: set_regions(masks, layout)")
        slots = {self.slot_of(name): mask for name, mask in masks.items()}
        count = 1 + max(self._slots.values())
        self._ensemble.set_regions(Regions(slots, layout, count))

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        """Gives all control tasks the same pictures, to train on; see `Trainable.set_control`."""
        controls = {}
        if latents is not None:
            shared = Control(latents, kept)
            controls = {name: shared for name, task in self._tasks.items() if task.is_control}
        self._given = controls
        if self._gated:
            self._gated, grouped = False, self._grouped
            self._put_in_force()
            if grouped is not None:
                self.set_groups(grouped)
        self._give()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Puts the strengths, rows and controls that are set inside in force at its end, at once.

        What was set before need not fit what is set first.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            self._put_in_force()

    def _put_in_force(self) -> None:
        """Tells the stacks the strengths of every task in every row, and the controls."""
        if self._waits:
            return
        if self._grouped is not None:
            for stack in self._stacks():
                stack.set_groups(None)
        self._grouped = None
        now = self._rows
        if now is None:
            now = torch.tensor([self._weights[name] for name in self.names])
        gated = self._gate(now) if self._gated and len(self.controls) else now
        self._ensemble.set_weights(self._by_slot(gated))
        for own in self._class_stacks():
            own.set_weights(self._by_slot(gated))
        for control in self._control_stacks():  # which knows its rows' factors by itself
            control.set_weights(self._by_slot(now))
        self._give()

    def _by_slot(self, weights: Tensor) -> Tensor:
        """Returns strengths in the stacks' own order, (…, S, 3): tasks may have come and gone."""
        slots = list(self._slots.values())
        if slots == list(range(len(slots))):
            return weights
        placed = weights.new_zeros(*weights.shape[:-2], 1 + max(slots), weights.shape[-1])
        placed[..., slots, :] = weights
        return placed

    def _gate(self, weights: Tensor) -> Tensor:
        """Returns the strengths with 0 where a control task has no control."""
        for slot, (name, task) in enumerate(self._tasks.items()):  # not the stacks' slots
            if not task.is_control:
                continue
            given = self._given.get(name)
            if given is None or not given.is_gated:
                weights = weights.clone()
                weights[..., slot, :] *= float(given is not None)
                continue
            factors = cast(Tensor, given.rows).to("cpu", torch.float32)
            if weights.ndim == 3 and len(factors) not in (1, len(weights)):
                raise DiffScalerError(
                    f"the control of {name!r} is for {len(factors)} rows, but {len(weights)} rows "
                    f"are set: give as many"
                )
            if weights.ndim == 2:
                weights = weights.expand(len(factors), -1, -1)
            weights = weights.clone()
            weights[:, slot, :] *= factors[:, None]
        if self._rows is None and weights.ndim == 3 and bool((weights == weights[:1]).all()):
            return weights[0]  # so that sums round as they do without rows
        return weights

    def _give(self) -> None:
        slots = {self._slots[name]: control for name, control in self._given.items()}
        for stack in self._control_stacks():
            stack.set_controls(slots)

    def set_groups(self, names: Sequence[str | None] | None) -> None:
        """Makes each of len(names) equal parts of the batch run one task alone, at strength 1.

        The parts lie one after the other, whatever the batch size. Gradients of a task come from
        its own part only. The last of `set_weights`, `set_rows` and `set_groups` is in force.

        Args:
            names: One task per part, None among them: the base there; or None in their place: the
                weights or rows that were in force before.

        Raises:
            UnknownNameError: No such task is attached.
            DiffScalerError: No name at all.
        """
        if names is None:
            self.set_rows(self._rows)
            return
        if not names:
            raise DiffScalerError("groups must name at least one task")
        slots = [_BASE if name is None else self.slot_of(name) for name in names]
        for stack in self._all_stacks():
            stack.set_groups(slots)
        self._grouped = tuple(names)

    def slot_of(self, name: str) -> int:
        """Returns a task's index in the stacks.

        Raises:
            UnknownNameError: No such task is attached.
        """
        return self._slots[self._known(name)]

    def add(
        self, model: nn.Module, name: str, task: TaskAdapter, *, compiled: str = "raise"
    ) -> None:
        """Attaches one more task, at strength 0; what is there is not touched. All or nothing.

        Regions, groups and controls of the others stay.

        Args:
            model: The model this is attached to.
            name: What the task is called here.
            task: The task.
            compiled: As in `attach`.

        Raises:
            MismatchError: The task does not fit the model.
            DiffScalerError: The name is in use, or the model was compiled already.
        """
        if name in self._tasks:
            raise DiffScalerError(f"a task {name!r} is attached already; drop it first")
        model = check_not_compiled(model, compiled)
        fitted = fit(model, {name: task}, self._component)
        taken = set(self._slots.values())
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        with ExitStack() as undo:
            undo.callback(self._forget_task, name)
            self._tasks[name], self._slots[name] = task, slot
            self._weights[name] = (0.0,) * len(PARTS)
            if self._rows is not None:
                self._rows = F.pad(self._rows, (0, 0, 0, 1))
            self._take_in(slot, fitted.stacks, fitted.modules)
            self._take_in(slot, fitted.controls, fitted.embeddings)
            self._take_in(slot, fitted.classes, fitted.tables)
            self._put_in_force()
            undo.pop_all()

    def drop(self, name: str) -> None:
        """Takes one task off; the others stay as they are.

        Raises:
            UnknownNameError: No such task is attached.
        """
        self._forget_task(self._known(name))
        self._put_in_force()

    def _take_in(
        self,
        slot: int,
        added: Mapping[str, AffinerStack] | Mapping[str, ControlStack] | Mapping[str, ClassStack],
        modules: Mapping[str, nn.Module],
    ) -> None:
        """Puts one task's stacks, each with one task, among those there are."""
        there = {stack.name: stack for stack in self._all_stacks()}
        for name, new in added.items():
            known = there.get(name)
            if isinstance(known, type(new)):
                if isinstance(known, ClassStack) and isinstance(new, ClassStack):
                    known.check_start(new)
                known.put(slot, new.affiner_of(0), new.bias)  # type: ignore[arg-type]
            elif isinstance(new, AffinerStack):
                new.renumber(slot)
                new.join(self._ensemble, *self._shared)
                self.stacks.append(new)
                self._hooks.append(hang(modules[name], new))
            else:
                new.renumber(slot)
                (self.controls if isinstance(new, ControlStack) else self.classes).append(new)
                self._hang(new, modules[name])

    def _hang(self, stack: ControlStack | ClassStack, module: nn.Module) -> None:
        """Puts a stack behind its embedding."""
        if isinstance(stack, ControlStack):
            self._handles[stack] = module.register_forward_hook(ControlHook(stack))
        else:
            self._handles[stack] = hang_classes(module, stack)

    def _forget_task(self, name: str) -> None:
        slot = self._slots.pop(name)
        if self._rows is not None:
            column = self.names.index(name)
            kept = [i for i in range(self._rows.shape[1]) if i != column]
            self._rows = self._rows[:, kept]
        for stack in self._all_stacks():
            stack.drop(slot)
        for held in (self._tasks, self._weights, self._given):
            held.pop(name, None)
        self._unhang([stack for stack in self._all_stacks() if not stack.slots])

    def _unhang(self, stacks: Sequence[Stack]) -> None:
        """Takes stacks off their layers."""
        gone = set(stacks)
        self._take_off(gone)
        self._ensemble.discard([s.layer for s in gone if isinstance(s, AffinerStack)])
        self.stacks = nn.ModuleList(s for s in self.stacks if s not in gone)
        self.controls = nn.ModuleList(s for s in self.controls if s not in gone)
        self.classes = nn.ModuleList(s for s in self.classes if s not in gone)

    def _take_off(self, stacks: Collection[Stack]) -> None:
        """Takes stacks' hooks off their layers."""
        hung = [held for held in self._hooks if held[1] in stacks]
        for hook, own, handle in hung:
            hook.stacks.remove(own)
            if not hook.stacks:
                handle.remove()
        self._hooks = [held for held in self._hooks if held[1] not in stacks]
        others = [stack for stack in self._handles if stack in stacks]
        for stack in others:
            self._handles.pop(stack).remove()
        if hung or others:
            forget_compiled_code()

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Returns a task's parameters by their names in its file -> parameter.

        Raises:
            UnknownNameError: No such task is attached.
        """
        slot = self.slot_of(name)
        return {
            f"{_prefix(stack)}{self._component}.{stack.name}.{part}": cast(nn.Parameter, parameter)
            for stack in self._all_stacks()
            if slot in stack.slots
            for part, parameter in stack.affiner_of(slot).tensors().items()
        }

    def requires_grad_(self, requires_grad: bool = True) -> Attachment:
        """Makes all parameters trainable, or frozen again.

        Training changes copies: the attached task stays as it is, `task()` returns the new one.
        """
        for stack in self._all_stacks():
            stack.unsettle()  # what was folded before the training is out of date after it
        for parameter in self.parameters() if requires_grad else ():
            parameter.data = parameter.data.clone()
        super().requires_grad_(requires_grad)
        return self

    def task(self, name: str | None = None) -> TaskAdapter:
        """Returns a task with its parameters as they are now (a copy on the CPU), to be saved."""
        name = self.names[0] if name is None else self._known(name)
        slot = self.slot_of(name)
        layers: dict[str, dict[str, Tensor]] = {}
        for stack in self._stacks():
            if slot in stack.slots:
                own = stack.affiner_of(slot).tensors()
                layers[f"{self._component}.{stack.name}"] = {
                    k: v.detach().to("cpu", copy=True) for k, v in own.items()
                }
        ordered = {n: layers[n] for n in self._tasks[name].layers if n in layers}
        now = self.parameters_of(name)
        extras = {
            n: now[n].detach().to("cpu", copy=True) for n in self._tasks[name].extras if n in now
        }
        return self._tasks[name].replace(layers=ordered, extras=extras)

    def remove(self) -> None:
        """Takes the tasks off; the model is bit for bit what it was. In any order; idempotent."""
        self._take_off(set(self._all_stacks()))

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _stacks(self) -> list[AffinerStack]:
        return [cast(AffinerStack, stack) for stack in self.stacks]

    def _class_stacks(self) -> list[ClassStack]:
        return [cast(ClassStack, stack) for stack in self.classes]

    def _all_stacks(self) -> list[Stack]:
        return [*self._stacks(), *self._control_stacks(), *self._class_stacks()]

    def _control_stacks(self) -> list[ControlStack]:
        return [cast(ControlStack, stack) for stack in self.controls]

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
            for name, weight in mix_of(row).items():
                slot = self.names.index(self._known(name))
                table[i, slot] = torch.tensor(_per_part(weight))
        return table


def mix_of(row: Row) -> dict[str, Weight]:
    """Returns what a row runs, {task: strength}: of a name alone, a mix, or None for the base."""
    return {row: 1.0} if isinstance(row, str) else dict(row or {})


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
    fitted = fit(model, tasks, component)
    attachment = Attachment(tasks, fitted.stacks, component, fitted.controls, fitted.classes)
    with ExitStack() as undo:
        undo.callback(attachment.remove)
        for name, stack in fitted.stacks.items():
            attachment._hooks.append(hang(fitted.modules[name], stack))
        for name, control in fitted.controls.items():
            attachment._hang(control, fitted.embeddings[name])
        for name, own in fitted.classes.items():
            attachment._hang(own, fitted.tables[name])
        attachment.set_weights(1.0 if weights is None else weights)
        undo.pop_all()
    logger.info(
        "attached %s to %d layers of %s", list(tasks), len(fitted.stacks), type(model).__name__
    )
    return attachment


_ONE = (1.0,) * len(PARTS)
_BASE = -1  # no task's index
_PREFIXES: dict[type, str] = {ControlStack: CONTROL, ClassStack: CLASSES}


def _prefix(stack: Stack) -> str:
    return next((own for kind, own in _PREFIXES.items() if isinstance(stack, kind)), "")


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
