"""Puts a control task on a model and its picture on the prompts."""

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..diffscaler_core import TaskAdapter
from .control_conds import ControlPicture
from .edge_types import CATEGORY, Task
from .inputs import chosen_component, component_input, range_inputs, strength_input
from .patching import apply_control


class DiffScalerControl(io.ComfyNode):
    """One control picture; the nodes can follow each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerControl",
            display_name="DiffScaler Control",
            category=CATEGORY,
            description="Makes a model follow a picture (edges, a silhouette, …) with a control "
            "task. The base's own VAE and patch embedding read the picture; there is no second "
            "model. Several of these nodes in a row are several controls at once.",
            search_aliases=[
                "diffscaler",
                "controlnet",
                "control image",
                "control task",
                "edges",
                "canny",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model the task was made for."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input("negative", tooltip="What to stay away from."),
                Task.Input("task", tooltip="A control task: one trained with control pictures."),
                io.Vae.Input("vae", tooltip="The model's own VAE; it encodes the picture."),
                io.Image.Input(
                    "image",
                    tooltip="The control picture, as the task was trained on: edges, a silhouette "
                    "and so on. One for all, or one per latent of the batch; of any size.",
                ),
                strength_input("How strongly the control acts: 1 is as trained, 0 not at all."),
                *range_inputs(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where in the picture the control counts."
                ),
                io.Boolean.Input(
                    "control_in_uncond",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Whether the negative prompt sees the control too. Off, guidance also "
                    "pushes away from pictures that do not follow it, which is stronger.",
                ),
                component_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the control task."),
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with the control picture."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with it."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        negative: list[Any],
        task: TaskAdapter,
        vae: Any,
        image: torch.Tensor,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        mask: torch.Tensor | None = None,
        control_in_uncond: bool = True,
        component: str = "auto",
    ) -> io.NodeOutput:
        """Runs the node."""
        picture = ControlPicture(task.name, image, vae, mask)
        chosen = chosen_component(component)
        controlled = apply_control(
            model, task, picture, strength, start_percent, end_percent, chosen
        )
        if controlled is model:  # strength 0
            return io.NodeOutput(model, positive, negative)
        positive = picture.on(positive, model.model)
        negative = picture.on(negative, model.model, control_in_uncond)
        return io.NodeOutput(controlled, positive, negative)
