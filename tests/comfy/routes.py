"""Short ways to run the nodes that give prompts and rows tasks of their own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor

BY_ROW = "one task per latent"
TOGETHER = "all tasks together"


def router_site(pack: ModuleType, model: Any) -> tuple[str, Any]:
    """The block of a MODEL that routers read, and where a router's file says that is."""
    base, core = model.model, pack.diffscaler_core
    name = core.blocks.block_named(base)
    hollow = pack.nodes.keymap.diffusers_model(base)
    return name, core.systems.router.site_of(base, name, 1, hollow)


class Routes:
    """The nodes, and samplers for what they give.

    Args:
        tiny: Tiny models.
        pack: The node pack.
    """

    def __init__(self, tiny: Any, pack: ModuleType) -> None:
        self.tiny, self.pack, self.core = tiny, pack, pack.diffscaler_core

    def route(
        self,
        model: Any,
        positive: Any,
        *tasks: Any,
        strengths: str = "",
        mode: str = TOGETHER,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """What the node gives: model, positive, negative."""
        output = self.pack.nodes.route_tasks.DiffScalerRouteTasks.execute(
            model, positive, _slots(tasks), strengths=strengths, mode=mode, **options
        )
        return tuple(output.args)

    def compare(
        self, model: Any, positive: Any, negative: Any, latent: Any, *tasks: Any, **options: Any
    ) -> tuple[Any, ...]:
        """What the node gives: model, positive, negative, latent, names."""
        output = self.pack.nodes.compare_tasks.DiffScalerCompareTasks.execute(
            model, positive, negative, latent, _slots(tasks), **options
        )
        return tuple(output.args)

    def schedule(
        self, task: Any, points: str = "", interpolation: str = "linear", **options: Any
    ) -> Any:
        """The task with a schedule."""
        output = self.pack.nodes.schedule_task.DiffScalerScheduleTask.execute(
            task, points, interpolation, **options
        )
        return output.args[0]

    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent: Any,
        steps: int = 2,
        cfg: float = 4.0,
        sampler: str = "euler",
    ) -> Tensor:
        """Samples a LATENT through ComfyUI's own node."""
        sampled = self.tiny.nodes.KSampler().sample(
            model, 3, steps, cfg, sampler, "normal", positive, negative, latent, 1.0
        )
        return sampled[0]["samples"].clone()


def _slots(tasks: Sequence[Any]) -> dict[str, Any]:
    return {f"task{i}": task for i, task in enumerate(tasks)}


@contextmanager
def calls_of(model: Any) -> Iterator[list[int]]:
    """Yields the rows of each call that the denoiser gets meanwhile."""
    rows: list[int] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    try:
        yield rows
    finally:
        handle.remove()
