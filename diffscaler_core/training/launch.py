"""One process or many: what a distributed launch changes for the loop. accelerate does the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiffScalerError


class Launch:
    """A run of one process; the base class of the other kind."""

    processes = 1
    index = 0
    is_main = True

    sharded = False

    def shard(self, model: nn.Module) -> None:
        """Splits the base's weights over the processes, where the launch asks for that.

        Raises:
            DiffScalerError: There is one process only.
        """
        raise DiffScalerError(
            "shard splits the base over several processes: start with accelerate launch"
        )

    def check(self, batch: int, accumulate: int) -> None:
        """Refuses a batch that cannot be shared out evenly.

        Raises:
            DiffScalerError: It does not divide.
        """
        if batch % (self.processes * accumulate):
            raise DiffScalerError(
                f"a batch of {batch} cannot be shared evenly by {self.processes} processes in "
                f"{accumulate} parts each; make it a multiple of {self.processes * accumulate}"
            )

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes every process's gradients their mean over all processes."""

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over all processes, entry by entry; NaN entries do not count."""
        return values

    def wait(self) -> None:
        """Waits until every process is here."""


class AcceleratedLaunch(Launch):
    """A run under `accelerate launch`.

    Args:
        accelerator: An `accelerate.Accelerator`.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.processes = int(accelerator.num_processes)
        self.index = int(accelerator.process_index)
        self.is_main = bool(accelerator.is_main_process)

    def shard(self, model: nn.Module) -> None:
        """Shards every block by torch's FSDP2, and the rest of the model as one; for good.

        Tasks must be attached before: they read layers' biases, and their own parameters, which
        lie beside the model, stay whole on every process.
        """
        from torch.distributed.fsdp import fully_shard

        if self.processes == 1:
            return super().shard(model)
        lists = (child for child in model.children() if isinstance(child, nn.ModuleList))
        for block in (block for blocks in lists for block in blocks):
            fully_shard(block)
        fully_shard(model)
        self.sharded = True

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages by one message: a task's gradients are a few MB, latency is what costs."""
        if self.processes == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        flat = self.accelerator.reduce(flat, reduction="mean")
        for parameter, part in zip(
            parameters, flat.split([grad.numel() for grad in grads]), strict=True
        ):
            parameter.grad = part.view_as(parameter).clone()

    def mean(self, values: Tensor) -> Tensor:
        """Averages what the processes saw; each saw another share of the batch."""
        if self.processes == 1:
            return values
        seen = torch.isfinite(values)
        both = torch.stack([torch.where(seen, values, 0.0), seen.to(values.dtype)])
        total, count = self.accelerator.reduce(both, reduction="sum")
        return total / count  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Waits at accelerate's barrier."""
        self.accelerator.wait_for_everyone()


def launch_of(accelerator: Any = None) -> Launch:
    """Returns the launch of an `accelerate.Accelerator`, or of one process alone."""
    return Launch() if accelerator is None else AcceleratedLaunch(accelerator)
