"""Tasks on one model object: their parameters, their stacks, and the override for one model call.

While a scope is open, the call `layer(x)` of each target layer yields y + Σ wₖ Δₖ(x, y) instead of
y, and the patch embedding adds the pictures of control tasks. Nothing else in the model ever
changes: no module is replaced, no weight patched, no attribute left behind. Layers are found by
name in the model that is really being called, never remembered from another one.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..diffscaler_core import AffinerStack, DiffScalerError, MismatchError
from ..diffscaler_core.affiner import Affiner, affiner_from
from ..diffscaler_core.control import Control, ControlStack
from ..diffscaler_core.ensemble import Ensemble
from ..diffscaler_core.errors import first_names
from ..diffscaler_core.matching import embedding_at
from ..diffscaler_core.regions import Regions
from ..diffscaler_core.scales import ScaleWatch
from ..diffscaler_core.siblings import Siblings
from ..diffscaler_core.targets import bias_of, geometry_of, resolve
from ..diffscaler_core.tokens import embed_input
from ..diffscaler_core.windows import UnitWindows
from .keymap import is_reference_first, native_row_layout, native_token_form

logger = logging.getLogger(__name__)

_RUNNING = "_diffscaler_running"
_CONTROL = "control/"

Remembered = TypeVar("Remembered", Control, Regions)


class TaskParameters(nn.Module):
    """One task's affiners under a model's own layer names: what ComfyUI moves and counts.

    Every parameter is registered on this one module, so that ComfyUI loads all of them or none.

    Args:
        layers: Layer of the model -> tensors of its affiner.
        info: The task's facts (activation, gain, …).
        controls: Patch embedding of the model -> tensors of its control affiner.
        control_facts: `TaskAdapter.control_facts`.
        windows: Layer -> when its hidden units act; others always do.

    Attributes:
        held_bytes: What ComfyUI was told last that they hold, with all that was computed from them.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Tensor]],
        info: Mapping[str, Any],
        controls: Mapping[str, Mapping[str, Tensor]] | None = None,
        control_facts: Mapping[str, Any] | None = None,
        windows: Mapping[str, UnitWindows] | None = None,
    ) -> None:
        super().__init__()
        self._windows = dict(windows or {})
        self._facts = dict(info), dict(control_facts or {})
        self.affiners: dict[str, Affiner] = {}
        self.controls: dict[str, Affiner] = {}
        self.carriers: weakref.WeakSet[Carrier] = weakref.WeakSet()
        sources = (("", self.affiners, layers), (_CONTROL, self.controls, controls or {}))
        for (prefix, held, given), facts in zip(sources, self._facts, strict=True):
            for layer, tensors in given.items():
                own = None if prefix else self._windows.get(layer)
                held[layer] = affiner = affiner_from(tensors, facts, own)
                for part, parameter in affiner.tensors().items():
                    name = f"{prefix}{layer.replace('.', '/')}/{part}"
                    self.register_parameter(name, parameter)
        self.held_bytes = 0
        self.idle = frozenset(n for n, a in self.affiners.items() if _does_nothing(a))
        weakref.finalize(self, _close_all, self.carriers).atexit = False

    def copy(self) -> TaskParameters:
        """Returns the same parameters once more, to be held on another device."""
        layers = {n: a.tensors() for n, a in self.affiners.items()}
        controls = {n: a.tensors() for n, a in self.controls.items()}
        return TaskParameters(layers, self._facts[0], controls, self._facts[1], self._windows)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter, also one that takes another's place; the affiner follows."""
        super().register_parameter(name, param)
        layer, _, part = name.removeprefix(_CONTROL).rpartition("/")
        held = self.controls if name.startswith(_CONTROL) else self.affiners
        affiner = held[layer.replace("/", ".")]
        if getattr(affiner, part) is not param:
            setattr(affiner, part, param)
            self._unsettle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskParameters:
        before = self.device_held
        super()._apply(fn, recurse)
        if self.device_held != before:
            self._unsettle()
        return self

    @property
    def device_held(self) -> torch.device | None:
        """Where the parameters are now."""
        first = next(self.parameters(), None)
        return None if first is None else first.device

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @property
    def folded_bytes(self) -> int:
        """Bytes of what was computed from the parameters for the models that ran them."""
        return sum(carrier.folded_bytes // carrier.tasks for carrier in self.carriers)

    def _unsettle(self) -> None:
        for carrier in list(self.carriers):
            carrier.unsettle()


class Carrier:
    """One combination of tasks on one model object.

    Args:
        model: ComfyUI's BaseModel.
        tasks: The tasks' parameters, in the order of the strengths: `affiners` by layer and, of
            control tasks, `controls` by patch embedding.
        check: True: log once which layers the first call never reached.

    Raises:
        MismatchError: The model lacks a layer.
    """

    def __init__(
        self, model: nn.Module, tasks: Sequence[TaskParameters], check: bool = True
    ) -> None:
        controls = [_controls_of(task) for task in tasks]
        names = list(dict.fromkeys(name for task in tasks for name in task.affiners))
        embeds = list(dict.fromkeys(name for own in controls for name in own))
        found = {name: resolve(model, name) for name in dict.fromkeys([*names, *embeds])}
        missing = [name for name, module in found.items() if module is None]
        if missing:
            raise MismatchError(
                f"this {type(model).__name__} has no {first_names(missing)}; "
                f"another node replaced these layers, apply the task to the model before it"
            )
        self.tasks = len(tasks)
        self._modules: dict[str, nn.Module] = {n: m for n, m in found.items() if m is not None}
        self._stacks = {name: self._stack(model, name, tasks) for name in names}
        self._controls = {name: self._control_stack(model, name, controls) for name in embeds}
        self._ensemble, siblings, watch = Ensemble(), Siblings(), ScaleWatch()
        for stack in self._stacks.values():
            stack.join(self._ensemble, siblings, watch)
        self._forwards: dict[str, tuple[Any, Callable[..., Tensor]]] = {}
        self._turns = _Turns()
        self._remembered: dict[Hashable, Control | Regions] = {}
        self._weights: Tensor | None = None
        self._grouped = False
        self._held = 0
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._unchecked = check
        self.closed = False
        for task in tasks:
            task.carriers.add(self)

    def _stack(self, model: nn.Module, name: str, tasks: Sequence[TaskParameters]) -> AffinerStack:
        module = self._modules[name]
        slots = [slot for slot, task in enumerate(tasks) if name in task.affiners]
        # without those of a task that is still fresh, so that they do not change how sums round
        slots = [slot for slot in slots if name not in getattr(tasks[slot], "idle", ())] or slots
        affiners = [tasks[slot].affiners[name] for slot in slots]
        scales = any(a.scale is not None and not a.scale_includes_bias for a in affiners)
        bias = _bias(name, module) if scales else None
        layout = native_row_layout(model, name)
        return AffinerStack(name, affiners, slots, bias, geometry_of(module), layout)

    def _control_stack(
        self, model: nn.Module, name: str, controls: Sequence[Mapping[str, Affiner]]
    ) -> ControlStack:
        module = self._modules[name]
        slots = [slot for slot, own in enumerate(controls) if name in own]
        affiners = [controls[slot][name] for slot in slots]
        embedding = embedding_at(name, module, native_token_form(model))
        bias = _bias(name, module)
        return ControlStack(embedding, affiners, slots, bias, geometry_of(module))

    @property
    def folded_bytes(self) -> int:
        """Bytes held beside the parameters."""
        return self._ensemble.computed_bytes + sum(
            stack.kept_bytes for stack in self._controls.values()
        )

    def prepare(self, weights: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
        """Puts strengths in force and computes what follows; says whether other bytes are held.

        Args:
            weights: (K, 3) for the whole batch or (B, K, 3) for rows, on the CPU.
            device: Where the model runs.
            dtype: What it computes in.
        """
        if self._weights is None or not torch.equal(self._weights, weights):
            self._put(weights)
        if self._place != (device, dtype):
            self._ensemble.settle(device, dtype)
            self._place = (device, dtype)
        before, self._held = self._held, self._ensemble.arranged_bytes
        return before != self._held

    def set_groups(self, groups: Sequence[int] | None) -> None:
        """Makes each of len(groups) equal parts of the batch run one task alone, at strength 1.

        Args:
            groups: Per part its task's index; None: the strengths last prepared. `prepare` with
                other strengths ends it too.
        """
        if groups is None:
            self._put(self._weights)
            return
        for stack in self._all_stacks():
            stack.set_groups(groups)
        self._grouped = True

    def _put(self, weights: Tensor | None) -> None:
        if self._grouped:
            for stack in self._stacks.values():
                stack.set_groups(None)
        self._grouped = False
        if weights is not None:
            self._ensemble.set_weights(weights)
            for control in self._controls.values():
                control.set_weights(weights)
        self._weights = weights

    def set_time(self, log_snr: Tensor) -> None:
        """Says at which noise level the next calls are, λ () or (B,), for tasks that go by it."""
        self._ensemble.set_time(log_snr)

    def set_controls(self, controls: Mapping[int, Control]) -> None:
        """Gives control tasks their pictures, until the next call of this.

        Args:
            controls: A task's index -> its control. The same object again means the same pictures,
                so that nothing is computed twice; empty: what was computed for any is dropped.
        """
        for stack in self._controls.values():
            stack.set_controls(controls)
        if not controls:
            self._remembered.clear()

    def set_regions(self, regions: Regions | None) -> None:
        """Makes tasks act in parts of the picture alone, until the next call of this."""
        self._ensemble.set_regions(regions)

    def remembered(self, key: Hashable, make: Callable[[], Remembered]) -> Remembered:
        """Returns the control or regions of this key, made now if they are new.

        `set_controls({})` forgets all.
        """
        if key not in self._remembered:
            self._remembered[key] = make()
        return cast(Remembered, self._remembered[key])

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        """Gives all control tasks the same pictures, to train on; see `Attachment.set_control`."""
        slots = {slot for stack in self._controls.values() for slot in stack.slots}
        shared = None if latents is None else Control(latents, kept)
        self.set_controls({} if shared is None else dict.fromkeys(slots, shared))

    def embed_now(self, x: Tensor) -> None:
        """Computes what the controls add before the call does, so that compiled code need not.

        Args:
            x: The latents of the call, (B, C, …), on its device and in its dtype.
        """
        for name, stack in self._controls.items():
            embed = self._modules[name].forward
            try:
                like = embed(embed_input(x, stack.embedding))
            except DiffScalerError:  # the model puts more than its latents there
                continue
            stack.prepare(embed, like)

    def unsettle(self) -> None:
        """Drops what was computed; the next call computes it again."""
        for stack in self._all_stacks():
            stack.unsettle()
        self._place, self._held = None, 0

    def close(self) -> None:
        """Lets go of everything, because a task is gone."""
        self._stacks, self._controls, self._modules, self._forwards = {}, {}, {}, {}
        self.closed = True

    def _all_stacks(self) -> list[AffinerStack | ControlStack]:
        return [*self._stacks.values(), *self._controls.values()]

    @contextmanager
    def running(
        self, model: nn.Module, compiled: bool = False, references: int | None = None
    ) -> Iterator[None]:
        """A scope in which the model runs the tasks; whatever happens inside, it ends as it began.

        Args:
            model: The model, the one this carrier was made for.
            compiled: True: the call runs compiled code; a check would have it compiled anew.
            references: How many reference pictures this one call embeds beside its latents, by the
                same layer, which must not get the control; None: the scope holds many calls, all
                without.
        """
        self._turns.wanted = -1
        if references is not None:
            self._turns.wanted = references if is_reference_first(model) else 0
        self._turns.taken = 0
        check = self._unchecked and not compiled
        silent = set(self._modules) if check else set()
        before: list[tuple[nn.Module, Any]] = []
        model.__dict__[_RUNNING] = True
        try:
            for name, module in self._modules.items():
                own = module.__dict__.get("forward")
                before.append((module, own))
                forward = self._forward(name, module, own)
                module.__dict__["forward"] = _noting(forward, silent, name) if check else forward
            yield
        finally:
            for module, own in reversed(before):
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = own
            model.__dict__.pop(_RUNNING, None)
        if check:
            self._unchecked = False
            _report_silent(model, silent)

    def _forward(self, name: str, module: nn.Module, own: Any) -> Callable[..., Tensor]:
        """Returns the layer's override, the same object every call, so that nothing recompiles."""
        known = self._forwards.get(name)
        if known is None or known[0] is not own:
            stack, control = self._stacks.get(name), self._controls.get(name)
            override = _override(module.forward, stack, control, self._turns)
            self._forwards[name] = known = (own, override)
        return known[1]


def is_running(model: nn.Module) -> bool:
    """Says whether a scope is open on this model object."""
    return _RUNNING in model.__dict__


class _Turns:
    """Which call of a patch embedding is the latents' own: its number from 0; -1: every call."""

    wanted = -1
    taken = 0


def _override(
    original: Callable[..., Tensor],
    stack: AffinerStack | None,
    control: ControlStack | None,
    turns: _Turns,
) -> Callable[..., Tensor]:
    def adapted(*args: Any, **kwargs: Any) -> Tensor:
        y = original(*args, **kwargs)
        if stack is None:
            return y
        x = args[0] if args else kwargs["input"]
        return stack(x, y, True)  # type: ignore[no-any-return]

    if control is None:
        return adapted

    def controlled(*args: Any, **kwargs: Any) -> Tensor:
        y = adapted(*args, **kwargs)
        if turns.wanted >= 0:
            turns.taken += 1
            if turns.taken != turns.wanted + 1:
                return y
        return control(original, y)

    return controlled


def _does_nothing(affiner: Affiner) -> bool:
    return not any(bool(t.any()) for part, t in affiner.tensors().items() if part != "down")


def _controls_of(task: Any) -> Mapping[str, Affiner]:
    """Returns a task's control affiners by patch embedding; most tasks have none."""
    return getattr(task, "controls", {})


def _noting(forward: Callable[..., Tensor], silent: set[str], name: str) -> Callable[..., Tensor]:
    def noting(*args: Any, **kwargs: Any) -> Tensor:
        silent.discard(name)
        return forward(*args, **kwargs)

    return noting


def _report_silent(model: nn.Module, silent: set[str]) -> None:
    if silent:
        logger.warning(
            "%d layers of this %s were never called, so the task has no effect there (first %s); "
            "some int8 kernels read a layer's weight past the layer: use an fp8 or 16-bit file of "
            "this model if the picture lacks the task",
            len(silent),
            type(model).__name__,
            first_names(sorted(silent)),
        )


def _bias(name: str, module: Any) -> Tensor | None:
    """Returns the bias the layer will really add: ComfyUI patches offloaded ones on the fly."""
    bias = bias_of(name, module)
    if bias is None:
        return None
    late = getattr(module, "bias_lowvram_function", None)
    for patch in [*([late] if late is not None else []), *getattr(module, "bias_function", ())]:
        bias = patch(bias)
    return bias


def _close_all(carriers: weakref.WeakSet[Carrier]) -> None:
    for carrier in list(carriers):
        carrier.close()
