"""The same prompt and seed under several tasks, in one batch."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .comparison import labels_of, same_noise
from .edge_types import CATEGORY
from .inputs import (
    chosen_component,
    component_input,
    connected_tasks,
    strengths_input,
    task_list_input,
)
from .patching import route_tasks
from .row_conds import by_row, routed


class DiffScalerCompareTasks(io.ComfyNode):
    """One batch with a row per task."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerCompareTasks",
            display_name="Compare DiffScaler Tasks",
            category=CATEGORY,
            description="Draws the same prompt from the same noise under each of several tasks, "
            "all in one batch. DiffScaler Task Grid puts the pictures side by side.",
            search_aliases=["diffscaler", "xy plot", "compare loras", "grid", "side by side"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model the tasks were made for."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input("negative", tooltip="What to stay away from."),
                io.Latent.Input("latent", tooltip="One latent; every task starts from it."),
                task_list_input("A task to compare; connect one and a slot for the next appears."),
                strengths_input(),
                io.Boolean.Input(
                    "include_base",
                    default=True,
                    tooltip="Whether the first picture is the model's own, without a task.",
                ),
                component_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the tasks at hand."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt, with a task for each latent."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt, with the same."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="A latent per picture, all with the same noise."
                ),
                io.String.Output(
                    display_name="names",
                    tooltip="What each picture shows, a line each, for DiffScaler Task Grid.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        negative: list[Any],
        latent: dict[str, Any],
        tasks: io.Autogrow.Type,
        strengths: str = "",
        include_base: bool = True,
        component: str = "auto",
    ) -> io.NodeOutput:
        """Runs the node."""
        connected, numbers = connected_tasks(tasks, strengths)
        chosen = chosen_component(component)
        patched, keys = route_tasks(model, connected, chosen)
        routes = by_row(keys, numbers, int(include_base))
        positive, negative = (routed(cond, routes, model.model) for cond in (positive, negative))
        batch = same_noise(latent, len(connected) + int(include_base))
        names = labels_of(connected, numbers, include_base)
        return io.NodeOutput(patched, positive, negative, batch, "\n".join(names))
