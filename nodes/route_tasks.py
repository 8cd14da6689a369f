"""Puts tasks on conditionings, so that prompts with different tasks run in one batch."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from .edge_types import CATEGORY
from .inputs import (
    chosen_component,
    component_input,
    connected_tasks,
    strengths_input,
    task_list_input,
)
from .patching import route_tasks
from .row_conds import by_row, routed, together

TOGETHER, BY_ROW = "all tasks together", "one task per latent"
_NO_NEGATIVE = ExecutionBlocker(
    "DiffScaler Route Tasks has no negative to give, as none is connected to it: connect the "
    "prompt's own negative to the sampler, which then runs the base, or connect it here"
)


class DiffScalerRouteTasks(io.ComfyNode):
    """Tasks for one conditioning; the nodes can follow each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerRouteTasks",
            display_name="Route DiffScaler Tasks",
            category=CATEGORY,
            description="Runs tasks only where this prompt is drawn, or a task of its own in each "
            "latent of the batch. Prompts with different tasks share one call of the model: "
            "combine them, give them areas or masks, with guidance as usual.",
            search_aliases=[
                *("diffscaler", "route", "per prompt", "per row", "mixed batch", "many tasks"),
                *("lora per conditioning", "task per image"),
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The diffusion model the tasks were made for; of several nodes of this "
                    "kind, the model that came out of the one before.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt that runs the tasks."),
                task_list_input("A task to run; connect one and a slot for the next appears."),
                strengths_input(),
                io.Combo.Input(
                    "mode",
                    options=[TOGETHER, BY_ROW],
                    default=TOGETHER,
                    tooltip="'all tasks together': every latent of this prompt runs the mix. "
                    "'one task per latent': the first latent of the batch runs the first task, the "
                    "second the second, and so on; the batch has as many latents as tasks.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt, if it is to run the tasks too, as usual; a "
                    "negative that goes to the sampler by itself runs the base.",
                ),
                component_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the tasks at hand."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt that runs the tasks."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt that runs them."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        tasks: io.Autogrow.Type,
        strengths: str = "",
        mode: str = TOGETHER,
        negative: list[Any] | None = None,
        component: str = "auto",
    ) -> io.NodeOutput:
        """Runs the node."""
        connected, numbers = connected_tasks(tasks, strengths)
        chosen = chosen_component(component)
        patched, keys = route_tasks(model, connected, chosen)
        routes = (by_row if mode == BY_ROW else together)(keys, numbers)
        positive = routed(positive, routes, model.model)
        if negative is None:
            return io.NodeOutput(patched, positive, _NO_NEGATIVE)
        return io.NodeOutput(patched, positive, routed(negative, routes, model.model))
