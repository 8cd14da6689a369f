"""Denoiser: one shape for every base, predict(x_t, timestep, condition). Knows no host.

diffusers pipelines become one in `bases/`; ComfyUI's models in the node pack.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..attach import attach
from ..resolution import at_resolution
from ..task import TaskAdapter
from ..token_layout import TokenLayout, layout_of
from .frozen import frozen
from .objective import Objective

#: Tensors of one batch: "context" (B, L, D), "mask" (B, L), "pooled" (B, P), "label" (B,); for
#: control tasks also "control" (B, C, h, w), and "control_kept" (B,), 0 where it is left out.
Condition = Mapping[str, Tensor]
Predict = Callable[[Tensor, Tensor, Condition], Tensor]
#: Pixels (B, 3, H, W) in −1..1 -> latents (B, C, h, w), or back.
Encode = Callable[[Tensor], Tensor]


class Trainable(Protocol):
    """Tasks on a base, while they are trained. `Attachment` is one; ComfyUI's carrier another."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in order."""
        ...

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """Returns a task's parameters, "<component>.<module>.<part>" -> parameter, float32."""
        ...

    def requires_grad_(self, requires_grad: bool = True) -> object:
        """Makes copies of the parameters trainable; the attached tasks stay as they are."""
        ...

    def set_groups(self, names: Sequence[str | None] | None) -> None:
        """Says which tasks the next batches run.

        Args:
            names: The batch is made of len(names) groups of equal size, one after the other; group
                i runs the task names[i] alone, or the bare base where that is None. None in place
                of them all: every row runs all tasks.
        """
        ...

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        """Gives the control tasks among them the next batch's control pictures.

        Their affiners in the blocks run in every row, also where there is no control: so a task
        learns to do well without one too.

        Args:
            latents: (B, C, h, w), in the model's own latent space; None: no row has a control.
            kept: Factor per row, (B,), 0 where the control is left out; None: all 1.
        """
        ...

    @property
    def is_timed(self) -> bool:
        """Says whether a task among them acts by noise level, so that `set_time` is needed."""
        ...

    def set_time(self, log_snr: Tensor) -> None:
        """Says at which noise level the next batch is, λ (B,) by row."""
        ...

    def task(self, name: str | None = None) -> TaskAdapter:
        """Returns a task with its parameters as they are now (a copy on the CPU)."""
        ...

    def remove(self) -> None:
        """Takes the tasks off; the base is bit for bit what it was. Idempotent."""
        ...


Attach = Callable[[Mapping[str, TaskAdapter]], Trainable]
Hold = Callable[[bool], AbstractContextManager[object]]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A base as the trainer sees it.

    Attributes:
        model: The frozen module that tasks are attached to.
        predict: (x_t (B, C, …), timestep (B,), condition) -> the model's raw output.
        objective: What it predicts.
        fields: Names of the condition's tensors that `predict` reads.
        component: The model's name in a pipeline and in task files.
        encode: Pixels (B, 3, H, W) in −1..1 -> latents, or None for a model of pixels.
        decode: The inverse of `encode`.
        factor: Sides in pixels must be a multiple of this.
        size: Side of the pictures the base was made for, in pixels; None if it does not say.
        null_label: For models of class labels: the label of "no class"; None if they have none.
        class_count: For models of class labels: how many they know, "no class" included.
        class_names: For models of class labels: name -> label, as far as they have names.
        encode_text: Texts -> their condition, one row each; None without a text encoder.
        channels: Channels of the pictures.
        shape_model: The module whose layer names and shapes a new task takes; None: `model`. (A
            host that names layers differently gives a hollow model with diffusers' names.)
        attach_tasks: Puts tasks on the model, for training or for looking; None: by forward hooks.
        hold: (checkpointing) -> a context in which the model stands still: no gradients, no
            dropout, loaded where it runs, activations recomputed if asked; None: `frozen`.
        encoder_key: Names the VAE and its weights; cached latents are told apart by it. None: they
            are not cached.
        text_key: The same for the text encoders.
        runs_on: Where the model computes, if its parameters may lie elsewhere.
        lay_out: (h, w) of latents -> where the picture lies in the model's tokens; None: as
            diffusers' models have it.
        guided: False: guidance is distilled into the model, which is told its scale; samples are
            drawn without classifier-free guidance.
    """

    model: nn.Module
    predict: Predict
    objective: Objective
    fields: tuple[str, ...] = ()
    component: str = "transformer"
    encode: Encode | None = None
    decode: Encode | None = None
    factor: int = 1
    size: int | None = None
    null_label: int | None = None
    class_count: int = 0
    class_names: Mapping[str, int] = field(default_factory=dict)
    encode_text: Callable[[list[str]], dict[str, Tensor]] | None = None
    channels: int = 3
    shape_model: nn.Module | None = None
    attach_tasks: Attach | None = None
    hold: Hold | None = None
    encoder_key: str | None = None
    text_key: str | None = None
    runs_on: torch.device | None = None
    lay_out: Callable[[Sequence[int]], TokenLayout] | None = None
    guided: bool = True
    _worn: list[Trainable] = field(default_factory=list, init=False, repr=False)

    def __call__(self, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the model's raw output, with the tasks that are attached now (see `attached`).

        Without a task, a class that only a task has is "no class".

        Args:
            x_t: (B, C, …).
            timestep: (B,).
            condition: What the model is told, and the control tasks' pictures.
        """
        told = dict(condition)
        control, kept = told.pop("control", None), told.pop("control_kept", None)
        for trainable in self._worn:
            trainable.set_control(control, kept)
            if trainable.is_timed:
                trainable.set_time(self.objective.log_snr_of(timestep))
        if not self._worn and "label" in told:
            unknown = told["label"] >= self.class_count
            told["label"] = torch.where(unknown, self.null_label or 0, told["label"])
        return self.predict(x_t, timestep, told)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.runs_on or next(self.model.parameters()).device

    def layout(self, size: Sequence[int]) -> TokenLayout:
        """Returns where the picture lies in the model's tokens, for latents of (h, w)."""
        return layout_of(self.model, size) if self.lay_out is None else self.lay_out(size)

    def attach(self, tasks: Mapping[str, TaskAdapter]) -> Trainable:
        """Puts tasks on the model; several attachments at once act as one sum.

        Raises:
            MismatchError: A task does not fit; the model is untouched.
        """
        if self.attach_tasks is not None:
            return self.attach_tasks(tasks)
        return attach(self.model, tasks, component=self.component)

    @contextlib.contextmanager
    def attached(self, tasks: Mapping[str, TaskAdapter]) -> Iterator[Trainable]:
        """Puts tasks on the model for as long as the context lasts."""
        trainable = self.attach(tasks)
        self._worn.append(trainable)
        try:
            yield trainable
        finally:
            self._worn.remove(trainable)
            trainable.remove()

    def autocast(self, precision: str) -> torch.autocast:
        """Returns the context in which the model computes in a precision of the config."""
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision != "no")

    @contextlib.contextmanager
    def held(self, checkpointing: bool = False, resolution: float = 1.0) -> Iterator[None]:
        """Gives a context in which the model stands still (see `hold`).

        Args:
            checkpointing: Recompute activations in the backward pass.
            resolution: Times the size it was trained at: stretches its positions; see
                `resolution.at_resolution`.
        """
        hold = self.hold or functools.partial(frozen, self.model)
        with hold(checkpointing), at_resolution(self.model, resolution):
            yield
