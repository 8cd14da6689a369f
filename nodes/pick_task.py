"""Which of several tasks made a picture."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..diffscaler_core.systems.which_task import ProbeSettings
from .edge_types import CATEGORY, Task
from .inputs import connected_tasks
from .picking_inputs import pick_inputs
from .task_picking import picked


class DiffScalerPickTask(io.ComfyNode):
    """The task under which the model denoises a picture best."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerPickTask",
            display_name="Pick DiffScaler Task",
            category=CATEGORY,
            description="Finds out which of several tasks fits a picture: the one under which the "
            "model removes noise from it best. All tasks run in the same batches.",
            search_aliases=[
                "diffscaler",
                "which task",
                "which lora",
                "classify",
                "diffusion classifier",
                "router",
            ],
            inputs=pick_inputs(),
            outputs=[
                Task.Output(
                    display_name="task",
                    tooltip="The task that fits; if none does, what if_none says.",
                ),
                io.String.Output(display_name="name", tooltip="Its name, or 'none of them'."),
                io.String.Output(
                    display_name="report", tooltip="All tasks in order, with their figures."
                ),
                io.Image.Output(
                    display_name="chart",
                    tooltip="How much better than the model alone each task denoises the picture.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any,
        image: Tensor,
        tasks: io.Autogrow.Type,
        probes: int,
        threshold: float,
        if_none: str,
        seed: int,
        conditioning: list[Any] | None = None,
        least: float = 0.0,
        halving: bool = True,
        batch_size: int = 16,
    ) -> io.NodeOutput:
        """Runs the node."""
        connected, _ = connected_tasks(tasks, "")
        stages = None if halving else ((probes, 1),)
        settings = ProbeSettings(
            probes=probes,
            stages=stages,
            threshold=threshold,
            least=least,
            batch=batch_size,
            seed=seed,
        )
        found = picked(
            model, vae, image, connected, settings, if_none, conditioning, cls.hidden.unique_id
        )
        return io.NodeOutput(*found, ui=ui.PreviewText(found[2]))
