"""What a pipeline's model remembers about its tasks: names, strengths, rows.

The state hangs on the model, outside its state_dict, so that every pipeline made of the same
components sees the same tasks and a deep copy of the model has its own. All tasks of a model share
one `Attachment`: one matrix of strengths, so that batch rows can mix any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attach import Attachment, Row, Weight, attach
from .errors import DiffScalerError
from .matching import QKV, has_fused_qkv
from .targets import resolve
from .task import TaskAdapter

_KEY = "_diffscaler"
#: What diffusers' denoisers call their latents.
_LATENTS = ("hidden_states", "sample", "x")


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
        attachment: All tasks that act through hooks, or None.
        fused: What `fuse.py` folded into the model's weights, or None.
    """

    model: nn.Module
    component: str
    tasks: dict[str, TaskAdapter] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    enabled: bool = True
    rows: RowRequest | None = None
    attachment: Attachment | None = None
    fused: Any = None
    _batch: int | None = None  # the batch size whose rows are in force
    _handle: Any = None
    _owners: list[nn.Module] = field(default_factory=list)

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
        return task.replace(layers=self.attachment.task(name).layers)

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
        """Puts the strengths in force; rows follow at the model's next call."""
        self._batch = None
        if self.attachment is not None:
            known = self.attachment.names
            wanted = {**self.weights, **(self.fused.weights if self.fused else {})}
            on = {n: w for n, w in wanted.items() if n in known} if self.enabled else {}
            self.attachment.set_weights(on)

    @contextmanager
    def running(self, request: RowRequest) -> Iterator[None]:
        """Runs rows until the context ends, then what was in force before."""
        before, self.rows = self.rows, request
        self._batch = None
        try:
            yield
        finally:
            self.rows = before
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

    @torch.compiler.disable  # rows are set between calls, never inside a graph
    def set_rows_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Spreads the rows in force over the batch of a call about to be made."""
        batch = batch_size(args, kwargs)
        if self.rows is None or self.attachment is None or not self.enabled or batch == self._batch:
            return
        spread = spread_rows(self.rows, batch)
        self.attachment.set_rows([self._own(row) for row in spread])
        self._batch = batch

    def _own(self, row: Row) -> Row:
        """A row without the tasks that other components have and this one has not."""
        mix = {row: 1.0} if isinstance(row, str) else row or {}
        known = self.attachment.names if self.attachment is not None else ()
        return {name: weight for name, weight in mix.items() if name in known}


class _CallHook:
    """Runs before the model's forward, because only there is the batch size known."""

    def __init__(self, state: ModelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state.check_qkv()
        if self.state.rows is not None:
            self.state.set_rows_for(args, kwargs)


def state_of(model: nn.Module) -> ModelState | None:
    """Returns the state a model carries, or None."""
    return bare(model).__dict__.get(_KEY)


def bare(model: nn.Module) -> nn.Module:
    """Returns the model below torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Returns how many samples a denoiser is called with.

    Raises:
        DiffScalerError: The call has no latents under a name diffusers uses.
    """
    latents = args[0] if args else next((kwargs[n] for n in _LATENTS if n in kwargs), None)
    if isinstance(latents, Tensor | list | tuple):
        return len(latents)
    raise DiffScalerError(
        f"rows are set, but this call has no {', '.join(_LATENTS)} to count the batch by"
    )


def spread_rows(request: RowRequest, batch: int) -> list[Row]:
    """Returns one row per sample of the batch, in diffusers' order.

    Each prompt's pictures lie together (repeat_interleave); classifier-free guidance in one batch
    puts a second half, in the same order, behind the first (tile), whichever half is the
    unconditional one. Guidance by two calls has batches without halves.

    Raises:
        DiffScalerError: The batch does not fit the number of rows.
    """
    count = len(request.rows)
    if request.images is None:
        prompts, images = _pipeline_call()
    else:
        prompts, images = None, request.images
    if prompts is not None and prompts != count:
        raise DiffScalerError(
            f"diffscaler_rows got {count} rows, but the pipeline runs {prompts} prompts: give one "
            f"entry per prompt, None for the base (or say num_images_per_prompt= as well, should "
            f"this pipeline count pictures as prompts)"
        )
    if images is None:
        images, halves = 1, int(batch == count)
    else:
        halves = batch // (count * images) if batch % (count * images) == 0 else 0
    if not halves:
        raise DiffScalerError(
            f"{count} rows do not fit a batch of {batch}: outside a diffusers pipeline say how the "
            f"batch is built: diffscaler_rows(rows, num_images_per_prompt=…)"
        )
    return [row for row in request.rows for _ in range(images)] * halves


def _pipeline_call() -> tuple[int | None, Any]:
    """Returns (prompts, pictures per prompt) of the pipeline call under way, or (None, None).

    A denoiser is never told how its batch came about, and pipelines differ in what they expose; but
    all of them hold both numbers in local variables of `__call__`, so they are read there.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            names = frame.f_locals
            if hasattr(type(names.get("self")), "components") and "batch_size" in names:
                per_prompt = [v for n, v in names.items() if _counts_pictures(n) and v is not None]
                return names["batch_size"], per_prompt[0] if per_prompt else 1
        frame = frame.f_back  # type: ignore[assignment]
    return None, None


def _counts_pictures(name: str) -> bool:
    return name in ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
