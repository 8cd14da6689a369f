"""Puts a task on a model."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..diffscaler_core import TaskAdapter
from .edge_types import CATEGORY, Task
from .inputs import chosen_component, component_input, part_inputs, range_inputs, strength_input
from .patching import apply_task


class DiffScalerApplyTask(io.ComfyNode):
    """One task on a model; the nodes can follow each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerApplyTask",
            display_name="Apply DiffScaler Task",
            category=CATEGORY,
            description="Runs a task on a frozen model. No weight of the model changes, so a new "
            "strength takes effect at once. Several of these nodes in a row add up, in any order.",
            search_aliases=[
                "diffscaler",
                "apply adapter",
                "task adapter",
                "affiner",
                "lora",
                "regional lora",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model the task was made for."),
                Task.Input("task", tooltip="The task to run."),
                strength_input("How strongly the task acts: 1 is as trained, 0 the model alone."),
                *range_inputs(),
                *part_inputs(),
                component_input(),
                io.Mask.Input(
                    "region",
                    optional=True,
                    tooltip="Where in the picture the task acts; the rest is the model's own. One "
                    "mask for all, or one per latent of the batch; of any size.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the task.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        task: TaskAdapter,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        scale: float = 1.0,
        shift: float = 1.0,
        subspace: float = 1.0,
        component: str = "auto",
        region: Tensor | None = None,
    ) -> io.NodeOutput:
        """Runs the node."""
        parts = {"scale": scale, "shift": shift, "subspace": subspace}
        strengths = {part: strength * factor for part, factor in parts.items()}
        chosen = chosen_component(component)
        times = (start_percent, end_percent)
        return io.NodeOutput(apply_task(model, task, strengths, *times, chosen, region))
