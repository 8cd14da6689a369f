"""What a pipeline's model remembers about its tasks: names, strengths, rows, controls.

The state hangs on the model, outside its state_dict, so that every pipeline made of the same
components sees the same tasks and a deep copy of the model has its own. All tasks of a model share
one `Attachment`: one matrix of strengths, so that batch rows can mix any of them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attach import Attachment, Weight, attach, mix_of
from ..errors import DiffScalerError
from ..matching import QKV, has_fused_qkv
from ..schedule import Factors, Schedule
from ..targets import resolve
from ..task import TaskAdapter
from ..token_layout import TokenLayout
from ..windows import ranges_of
from .caches import forget_steps, leaves_rows_out
from .call import Call, spread
from .regions import RegionRequest, layout_for
from .rows import RowRequest, mixes_of, times, with_controls
from .schedule import log_snr_of, percent_of

if TYPE_CHECKING:
    from .control_request import ControlRequest

logger = logging.getLogger(__name__)

_KEY = "_diffscaler"

Gates = tuple[Mapping[str, Tensor], TokenLayout | None]


@dataclass
class ModelState:
    """The tasks of one model.

    Attributes:
        model: The model, below torch.compile's wrapper.
        component: Its name in pipelines.
        tasks: name -> task. Their facts hold; the tensors in force are the attachment's.
        weights: name -> strength of the active tasks; the others are loaded and rest.
        schedules: name -> how its strength goes over sampling time, instead of the task's own.
        regions: Where tasks act, or None: everywhere.
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
    schedules: dict[str, Schedule] = field(default_factory=dict)
    regions: RegionRequest | None = None
    enabled: bool = True
    rows: RowRequest | None = None
    held: list[ControlRequest] = field(default_factory=list)
    contexts: list[ControlRequest] = field(default_factory=list)
    settled: bool = True
    attachment: Attachment | None = None
    fused: Any = None
    _situation: Any = None  # of the call whose rows, controls, schedules and regions are in force
    _gates: Gates | None = ({}, None)  # the regions in force; None: nobody knows
    _pipe: weakref.ref[Any] | None = None  # whose scheduler is asked where no pipeline is running
    _warned: set[str] = field(default_factory=set)
    _handle: Any = None
    _owners: list[nn.Module] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what knows its pipeline, so also the controls: a copied model has none."""
        return {**self.__dict__, "held": [], "contexts": [], "_situation": None, "_pipe": None}

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
        attachment.set_time(0.0)  # every call says its own, before anything runs
        self._gates = ({}, None)
        if old is not None:
            old.remove()
        if self._handle is None:
            hook = _CallHook(self)
            self._handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)
        self.model.__dict__[_KEY] = self
        self._owners = self._qkv_owners()
        self.apply()

    def choose(
        self,
        pipe: Any,
        weights: Mapping[str, Weight],
        schedules: Mapping[str, Schedule] | None = None,
        regions: RegionRequest | None = None,
    ) -> None:
        """Makes these tasks the active ones, with these schedules and regions and no others.

        Args:
            pipe: The pipeline that asks for it.
            weights: name -> strength.
            schedules: name -> schedule.
            regions: Where they act.
        """
        self._pipe = weakref.ref(pipe)
        self.weights, self.schedules = dict(weights), dict(schedules or {})
        self.regions = regions
        self.apply()

    def take_in(self, name: str, task: TaskAdapter, model: nn.Module) -> None:
        """Attaches one more task, at strength 0, beside those there are. All or nothing.

        Args:
            name: What the task is called here.
            task: The task.
            model: The model as the pipeline holds it, perhaps compiled.
        """
        if self.attachment is None:
            attachment = self.build({name: task}, model=model)
            self.tasks[name] = task
            self.adopt(attachment)
            return
        self.attachment.add(model, name, task)
        self.tasks[name] = task
        self._owners = self._qkv_owners()
        self.apply()

    def let_go(self, names: Sequence[str]) -> None:
        """Takes tasks off; names of others are passed over."""
        own = [name for name in names if name in self.tasks]
        for name in own:
            del self.tasks[name]
            self.weights.pop(name, None)
        if not own:
            return
        if not self.tasks or self.attachment is None:
            self.clear()
            return
        for name in own:
            if name in self.attachment.names:
                self.attachment.drop(name)
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
        """Puts the strengths in force; all else follows at the model's next call."""
        self.held = [request for request in self.held if request.name in self.tasks]
        self.schedules = {n: own for n, own in self.schedules.items() if n in self.tasks}
        if self.regions is not None and not self.regions.masks.keys() & self.tasks.keys():
            self.regions = None
        self._look_anew()
        forget_steps(self.model)
        if self.attachment is not None:
            with self.attachment.together():
                self.attachment.set_weights(self._wanted() if self.enabled else {})
                self.attachment.set_controls(None)
                self._gate({}, None)

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
        given = self.rows is not None or self.held or self.contexts or self.regions is not None
        self.settled = not (given or self._scheduled() or self._timed() or self._unmet())

    def schedule_of(self, name: str) -> Schedule | None:
        """Returns how a task's strength goes over sampling time, None: it stays."""
        own = self.schedules.get(name)
        own = self.tasks[name].schedule if own is None and name in self.tasks else own
        return None if own == Schedule() else own

    def is_bound(self, name: str) -> bool:
        """Says whether a task has a schedule, a mask, or units that act by noise level."""
        masked = self.regions is not None and name in self.regions.masks
        timed = name in self.tasks and self.tasks[name].is_timed
        return masked or timed or self.schedule_of(name) is not None

    def _scheduled(self) -> dict[str, Schedule]:
        """Returns the schedules of the tasks that may act."""
        found = {name: self.schedule_of(name) for name in self._may_act()}
        return {name: schedule for name, schedule in found.items() if schedule is not None}

    def _timed(self) -> list[str]:
        """Returns the tasks that may act whose hidden units act by noise level."""
        return [name for name in self._may_act() if self.tasks[name].is_timed]

    def _may_act(self) -> list[str]:
        if self.attachment is None or not self.enabled:
            return []
        asked = {own.name for own in (*self.held, *self.contexts)} | self.weights.keys()
        names = self.attachment.names if self.rows is not None else asked
        return [name for name in self.attachment.names if name in names and name in self.tasks]

    @torch.compiler.disable  # what is set between calls is never inside a graph
    def settle(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Puts rows, controls, schedules and regions in force for a call about to be made."""
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
        factors = self._factors(call)
        places = None if self.regions is None else self.regions.situation(call)
        level, ranges = self._level(call)
        situation = (call.batch, call.prompts, own, factors, places, ranges)
        if situation == self._situation:
            return
        self._situation = None
        forget_steps(self.model)
        masks = self._masks(call)
        controls = {n: requests[n].control(call, masks.get(n)) for n in own if own[n] is not None}
        pictures = {n: control for n, control in controls.items() if control is not None}
        self._check_rows_stay(pictures, masks)
        with self.attachment.together():
            if level is not None:
                self.attachment.set_time(level)
            if self.rows is None:
                acting = with_controls(self._wanted(), requests, controls)
                self.attachment.set_weights(times(acting, factors))
            else:
                mixes = mixes_of(self.rows.rows, self.attachment.names, requests, controls)
                entries, _ = spread(len(mixes), self.rows.images, call, "diffscaler_rows", "rows")
                self.attachment.set_rows([times(mixes[entry], factors) for entry in entries])
            self.attachment.set_controls(pictures)
            self._gate(masks, layout_for(call) if masks else None)
        self._situation = situation

    def _check_rows_stay(self, pictures: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """Raises if rows differ and a cache takes some of them out of the batch."""
        differ = self.rows is not None or any(len(mask) > 1 for mask in masks.values())
        differ = differ or any(len(p.latents) > 1 or p.is_gated for p in pictures.values())
        if differ and leaves_rows_out(self.model):
            raise DiffScalerError(
                f"FasterCache leaves the unconditional half of the batch out of this "
                f"{type(self.model).__name__}, so rows with tasks, masks or pictures of their own "
                f"cannot be told apart: call disable_cache(), or give all rows the same"
            )

    def _factors(self, call: Call) -> dict[str, Factors]:
        """Returns what the schedules multiply strengths by in a call."""
        schedules = self._scheduled()
        percent = percent_of(call, self._pipe_of(call)) if schedules else 0.0
        return {name: schedule.at(percent) for name, schedule in schedules.items()}

    def _level(self, call: Call) -> tuple[float | None, tuple[int, ...]]:
        """Returns the noise level of a call, if a task goes by it, and each such task's range."""
        windows = [self.tasks[name].windows for name in self._timed()]
        if not windows:
            return None, ()
        level = log_snr_of(call, self._pipe_of(call))
        known = torch.tensor(level)
        return level, tuple(int(ranges_of(own.edges, known)) for own in windows if own is not None)

    def _masks(self, call: Call) -> dict[str, Tensor]:
        """Returns the masks of the regions for a call, name -> (1 or batch, 1, H, W)."""
        if self.regions is None or self.attachment is None:
            return {}
        images = None if self.rows is None else self.rows.images
        return self.regions.masks_for(call, self.attachment.names, images, self._pipe_of(call))

    def _gate(self, masks: Mapping[str, Tensor], layout: TokenLayout | None) -> None:
        """Puts regions in force, unless they are."""
        known, self._gates = self._gates, None
        if known is None or known[1] != layout or known[0].keys() != masks.keys():
            anew = True
        else:
            anew = any(mask is not known[0][name] for name, mask in masks.items())
        if anew and self.attachment is not None:
            self.attachment.set_regions(masks or None, layout)
        self._gates = (masks, layout)

    def _pipe_of(self, call: Call) -> Any:
        """Returns the pipeline that makes a call, or the last that chose tasks, or None."""
        return call.pipe or (None if self._pipe is None else self._pipe())

    def _unmet(self) -> list[str]:
        """Returns the control tasks that should act, have no picture, and were not named before."""
        if self.attachment is None or not self.enabled:
            return []
        if self.rows is None:
            wanted = set(self.weights)
        else:
            wanted = {name for row in self.rows.rows for name in mix_of(row)}
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
