"""Puts several tasks on a model at once."""

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .edge_types import CATEGORY
from .inputs import (
    chosen_component,
    component_input,
    connected_tasks,
    strengths_input,
    task_list_input,
)
from .patching import apply_tasks


class DiffScalerStackTasks(io.ComfyNode):
    """A growing list of tasks on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerStackTasks",
            display_name="Stack DiffScaler Tasks",
            category=CATEGORY,
            description="Runs several tasks on a model at once. They add up, and their order does "
            "not matter. The same as Apply DiffScaler Task several times in a row.",
            search_aliases=["diffscaler", "stack adapters", "several tasks", "lora stack", "mix"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model the tasks were made for."),
                task_list_input("A task to run; connect one and a slot for the next appears."),
                strengths_input(),
                component_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with all the tasks.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        tasks: io.Autogrow.Type,
        strengths: str = "",
        component: str = "auto",
    ) -> io.NodeOutput:
        """Runs the node."""
        connected, numbers = connected_tasks(tasks, strengths)
        chosen = chosen_component(component)
        return io.NodeOutput(apply_tasks(model, connected, numbers, chosen))
