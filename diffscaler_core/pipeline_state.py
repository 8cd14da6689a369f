"""What a pipeline's model remembers about its tasks: names, strengths, rows, controls.

The state hangs on the model, outside its state_dict, so that every pipeline made of the same
components sees the same tasks and a deep copy of the model has its own. All tasks of a model share
one `Attachment`: one matrix of strengths, so that batch rows can mix any of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attach import Attachment, Row, Weight, attach
from .errors import DiffScalerError
from .matching import QKV, has_fused_qkv
from .pipeline_call import Call, spread
from .targets import resolve
from .task import TaskAdapter

if TYPE_CHECKING:
    from .control_request import ControlRequest

logger = logging.getLogger(__name__)

_KEY = "_diffscaler"


@dataclass(frozen=True)
class RowRequest:
    """What a user asked for: one entry per prompt.

    Attributes:
        rows: One entry per prompt.
        images: Pictures per prompt, or None: ask the running pipeline.
    """

    rows: tuple[Row, ...]
    images: int | None = None


@dataclass
class ModelState:
    """The tasks of one model.

    Attributes:
        model: The model, below torch.compile's wrapper.
        component: Its name in pipelines.
        tasks: name -> task. Their facts hold; the tensors in force are the attachment's.
        weights: name -> strength of the active tasks; the others are loaded and rest.
        enabled: False: no task acts, whatever `weights` and `rows` say.
        rows: What rows run, or None.
        held: Controls that stay until they are taken away.
        contexts: Controls of the contexts that are open, the innermost last.
        settled: True: calls need no look at their batch.
        attachment: All tasks that act through hooks, or None.
        fused: What `fuse.py` folded into the model's weights, or None.
    """

    model: nn.Module
    component: str
    tasks: dict[str, TaskAdapter] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    enabled: bool = True
    rows: RowRequest | None = None
    held: list[ControlRequest] = field(default_factory=list)
    contexts: list[ControlRequest] = field(default_factory=list)
    settled: bool = True
    attachment: Attachment | None = None
    fused: Any = None
    _situation: Any = None  # of the call whose rows and controls are in force
    _warned: set[str] = field(default_factory=set)
    _handle: Any = None
    _owners: list[nn.Module] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the controls, which know their pipeline: a copied model has none."""
        return {**self.__dict__, "held": [], "contexts": [], "_situation": None}

    def build(
        self,
        tasks: Mapping[str, TaskAdapter],
        *,
        model: nn.Module | None = None,
        compiled: str = "raise",
    ) -> Attachment:
        """Returns these tasks attached, all at strength 0, beside the attachment in force.

        Args:
            tasks: name -> task.
            model: The model as the pipeline holds it, perhaps compiled.
            compiled: As in `attach`.
        """
        model = self.model if model is None else model
        return attach(model, tasks, 0.0, component=self.component, compiled=compiled)

    def adopt(self, attachment: Attachment) -> None:
        """Puts a new attachment in place of the old one, and the state on the model."""
        old, self.attachment = self.attachment, attachment
        if old is not None:
            old.remove()
        if self._handle is None:
            hook = _CallHook(self)
            self._handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)
        self.model.__dict__[_KEY] = self
        self._owners = self._qkv_owners()
        self.apply()

    def clear(self) -> None:
        """Takes everything off the model, and the state too."""
        if self.attachment is not None:
            self.attachment.remove()
        if self._handle is not None:
            self._handle.remove()
        self.attachment = self._handle = None
        self.model.__dict__.pop(_KEY, None)

    def current(self, name: str) -> TaskAdapter:
        """Returns a task with its tensors as they are now."""
        task = self.tasks[name]
        if self.attachment is None or name not in self.attachment.names or self.is_fused(name):
            return task
        now = self.attachment.task(name)
        return task.replace(layers=now.layers, extras=now.extras)

    def running_tasks(self) -> dict[str, TaskAdapter]:
        """Returns what acts by hooks, as it is now; of a fused task only what could not fold."""
        names = () if self.attachment is None else self.attachment.names
        return {
            n: self.attachment.task(n) if self.is_fused(n) else self.current(n)  # type: ignore
            for n in names
        }

    def is_fused(self, name: str) -> bool:
        """Says whether a task was folded into the model's weights."""
        return self.fused is not None and name in self.fused.weights

    def apply(self) -> None:
        """Puts the strengths in force; rows and controls follow at the model's next call."""
        self.held = [request for request in self.held if request.name in self.tasks]
        self._look_anew()
        if self.attachment is not None:
            with self.attachment.together():
                self.attachment.set_weights(self._wanted() if self.enabled else {})
                self.attachment.set_controls(None)

    def _wanted(self) -> dict[str, Weight]:
        """Returns the strengths of all active tasks that act by hooks."""
        known = self.attachment.names if self.attachment is not None else ()
        wanted = {**self.weights, **(self.fused.weights if self.fused else {})}
        return {name: weight for name, weight in wanted.items() if name in known}

    @contextmanager
    def running(self, request: RowRequest) -> Iterator[None]:
        """Runs rows until the context ends, then what was in force before."""
        before, self.rows = self.rows, request
        self._look_anew()
        try:
            yield
        finally:
            self.rows = before
            self.apply()

    @contextmanager
    def controlled(self, request: ControlRequest) -> Iterator[None]:
        """Gives a control task its picture until the context ends."""
        self.contexts.append(request)
        self._look_anew()
        try:
            yield
        finally:
            self.contexts.remove(request)
            self.apply()

    def hold_control(self, name: str | None, request: ControlRequest | None) -> None:
        """Gives a control task its picture until it gets another; None for all of them, or none."""
        self.held = [own for own in self.held if name is not None and own.name != name]
        self.held += [] if request is None else [request]
        self.apply()

    def check_qkv(self) -> None:
        """Raises if `fuse_qkv_projections` took layers out of use since their task was loaded."""
        if self.enabled and any(map(has_fused_qkv, self._owners)):
            raise DiffScalerError(
                f"the qkv projections of this {type(self.model).__name__} were fused after a task "
                f"was loaded, so parts of the task would not run: call unfuse_qkv_projections()"
            )

    def _qkv_owners(self) -> list[nn.Module]:
        names = [str(s.name) for s in self.attachment.stacks] if self.attachment else []
        parents = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in QKV}
        owners = (resolve(self.model, parent) for parent in parents if parent)
        return [owner for owner in owners if owner is not None]

    def _look_anew(self) -> None:
        """Makes the next call look at its batch, if there is anything to look for."""
        self._situation = None
        asked = self.rows is not None or self.held or self.contexts or self._unmet()
        self.settled = not asked

    @torch.compiler.disable  # rows and controls are set between calls, never inside a graph
    def settle(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Spreads rows and controls over the batch of a call about to be made."""
        if self.attachment is None or not self.enabled:
            return
        for name in self._unmet():
            logger.warning(
                "control task %r was given no picture, so it rests: "
                "with pipe.diffscaler_control(image): …",
                name,
            )
            self._warned.add(name)
            self._look_anew()
        call = Call(self.model, args, kwargs)
        requests = {own.name: own for own in (*self.held, *self.contexts)}  # the innermost last
        own = {name: request.situation(call) for name, request in requests.items()}
        situation = (call.batch, call.prompts, own)
        if situation == self._situation:
            return
        self._situation = None
        controls = {n: requests[n].control(call) for n in own if own[n] is not None}
        with self.attachment.together():
            if self.rows is None:
                self.attachment.set_weights(self._with_controls(self._wanted(), requests, controls))
            else:
                entries, _ = spread(
                    len(self.rows.rows), self.rows.images, call, "diffscaler_rows", "rows"
                )
                mixes = self._mixes(self.rows.rows, requests, controls)
                self.attachment.set_rows([mixes[entry] for entry in entries])
            self.attachment.set_controls({n: c for n, c in controls.items() if c is not None})
        self._situation = situation

    def _mixes(
        self,
        rows: Sequence[Row],
        requests: Mapping[str, ControlRequest],
        controls: Mapping[str, Any],
    ) -> list[dict[str, Weight]]:
        """Returns what each row runs. A control task that no row names acts in all of them."""
        known = self.attachment.names if self.attachment is not None else ()
        plain = [{row: 1.0} if isinstance(row, str) else dict(row or {}) for row in rows]
        named = {name for mix in plain for name in mix}
        mixes = []
        for mix in plain:
            own = {name: weight for name, weight in mix.items() if name in known}
            acting = {n: c for n, c in controls.items() if n in mix or n not in named}
            mixes.append(self._with_controls(own, requests, acting))
        return mixes

    def _with_controls(
        self,
        weights: Mapping[str, Weight],
        requests: Mapping[str, ControlRequest],
        controls: Mapping[str, Any],
    ) -> dict[str, Weight]:
        """Returns the strengths with those of the controls multiplied in."""
        acting = {n: requests[n].weight(weights.get(n, 1.0)) for n in controls}
        return {n: w for n, w in weights.items() if n not in requests} | acting

    def _unmet(self) -> list[str]:
        """Returns the control tasks that should act, have no picture, and were not named before."""
        if self.attachment is None or not self.enabled:
            return []
        if self.rows is None:
            wanted = set(self.weights)
        else:
            rows = ([row] if isinstance(row, str) else row or () for row in self.rows.rows)
            wanted = {name for row in rows for name in row}
        met = {own.name for own in (*self.held, *self.contexts)} | self._warned
        return [n for n in wanted - met if n in self.tasks and self._acts(n)]

    def _acts(self, name: str) -> bool:
        return self.tasks[name].is_control and self.weights.get(name, 1.0) != 0


class _CallHook:
    """Runs before the model's forward, because only there is the batch known."""

    def __init__(self, state: ModelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.check_qkv()
        if not self.state.settled:
            self.state.settle(args, kwargs)


def state_of(model: nn.Module) -> ModelState | None:
    """Returns the state a model carries, or None."""
    return bare(model).__dict__.get(_KEY)


def bare(model: nn.Module) -> nn.Module:
    """Returns the model below torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)
