"""Ways to give a base a control picture, all trained by one trainer and measured by one scorer.

Ours are tasks. A foreign network (a ControlNet) is wrapped as a `Trainable`, so that it sees the
same pictures, noise, times, clipping and schedule as a task does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from in_context import InContext
from torch import Tensor, nn

from diffscaler_core import TaskAdapter
from diffscaler_core.training import Denoiser, TrainingConfig


class ControlNet:
    """diffusers' SD3ControlNetModel: a copy of the first blocks, zero convolutions.

    Args:
        transformer: The frozen base.
        blocks: How many of its blocks are copied.
    """

    def __init__(self, transformer: nn.Module, blocks: int) -> None:
        from diffusers import SD3ControlNetModel

        self.net = SD3ControlNetModel.from_transformer(
            transformer, num_layers=blocks, num_extra_conditioning_channels=0
        )
        self.control: Tensor | None = None
        self._handle = transformer.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.control is None:
            return args, kwargs
        told = {k: v for k, v in kwargs.items() if k != "return_dict"}
        added = self.net(controlnet_cond=self.control, return_dict=False, **told)[0]
        return args, {**kwargs, "block_controlnet_hidden_states": added}

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.net.parameters())

    def set_control(self, latents: Tensor | None) -> None:
        """Gives the next calls their control, (B, C, h, w)."""
        self.control = latents

    def remove(self) -> None:
        """Takes it off the base."""
        self._handle.remove()


class Foreign:
    """A network as a `Trainable`: the trainer's loop, another method."""

    def __init__(self, name: str, network: Any) -> None:
        self.names, self.network = (name,), network

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """All its parameters, at the rate of `lr`."""
        return {f"network.{i}.up": p for i, p in enumerate(self.network.parameters())}

    def requires_grad_(self, requires_grad: bool = True) -> Foreign:
        """Makes it trainable."""
        for parameter in self.network.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def set_groups(self, names: Sequence[str] | None) -> None:
        """There is one task only."""

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        """Gives the next batch its control; a row that drops it gets an empty one."""
        if latents is not None and kept is not None:
            latents = latents * kept.view(-1, *(1,) * (latents.ndim - 1))
        self.network.set_control(latents)

    def task(self, name: str | None = None) -> TaskAdapter:
        """A stand-in: the parameters stay in the network."""
        return TaskAdapter({}, {"name": self.names[0], "method": "prompts"})

    def remove(self) -> None:
        """Leaves it on until the scores are taken; see `Method.done`."""


def on(denoiser: Denoiser, network: Any) -> Denoiser:
    """The base with a foreign network in place of tasks."""
    return replace(denoiser, attach_tasks=lambda tasks: Foreign(next(iter(tasks)), network))


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: What it is called.
        settings: What differs from the common settings.
        network: Transformer -> a foreign network; None: a task.
        rates: Learning rates to try; the best on the validation loss is taken.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: Any = None
    rates: tuple[float, ...] = ()

    def config(self, common: Mapping[str, Any], rate: float | None = None) -> TrainingConfig:
        """The settings of one run."""
        return TrainingConfig(
            **{**common, **self.settings, **({} if rate is None else {"lr": rate})}
        )


#: Layers of SD3's text stream: a control says nothing of the text.
TEXT_STREAM = r".*(add_[qkv]_proj|to_add_out|ff_context|norm1_context).*"

METHODS: dict[str, Method] = {
    "image": Method(
        "ours: control affiner + affiners in the blocks' image stream, rank 16",
        {"exclude": TEXT_STREAM, "rank": 16},
    ),
    "ours": Method("ours, in both streams, rank 8"),
    "relu": Method("the same, relu in the control affiner", {"control_activation": "relu"}),
    "copy": Method(
        "trainable copy of the embedding from zero + affiners, rank 8",
        {"control_embedding": "copy"},
    ),
    "embedding": Method("control affiner alone", {"method": "prompts"}),
    "controlnet": Method(
        "ControlNet: 2 of 3 blocks copied, zero convolutions",
        {"control_drop": 0.0},
        lambda transformer: ControlNet(transformer, 2),
        (3e-4, 1e-3, 3e-3),
    ),
    "in_context": Method(
        "in-context tokens under affiners of rank 16",
        {"control_drop": 0.0},
        lambda transformer: InContext(transformer, 16),
        (5e-3, 1e-2),
    ),
}
