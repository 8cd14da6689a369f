"""Leads a model's sampling by losses."""

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..diffscaler_core.systems.guidance_losses import GuidanceLoss
from .edge_types import CATEGORY, Guidance
from .inputs import range_inputs
from .model_guidance import CHEAP, EXACT, guide_model


class DiffScalerGuideModel(io.ComfyNode):
    """A model in, a led model out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerGuideModel",
            display_name="DiffScaler Guide Model",
            category=CATEGORY,
            description="Leads what a model draws by losses: after each step's prediction, it is "
            "moved down their gradient. Works with any sampler, tasks and LoRAs; a noise mask on "
            "the latent keeps it to a part of the picture.",
            search_aliases=["diffscaler", "loss guidance", "universal guidance", "steer"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, with its tasks."),
                Guidance.Input("losses", tooltip="What it is led to."),
                io.Float.Input(
                    "strength",
                    default=0.3,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How far each prediction is moved, as a share of its size; 0 is the "
                    "model alone.",
                ),
                *range_inputs("it"),
                io.Combo.Input(
                    "gradient",
                    options=[CHEAP, EXACT],
                    default=CHEAP,
                    optional=True,
                    tooltip="Where the gradient is taken. 'at the prediction': costs little. "
                    "'through the model': exact, by a pass back through it, which takes more "
                    "time and memory.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's own VAE: losses then see the picture itself. Without it "
                    "they see the rough colours of ComfyUI's previews, which cost nothing.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, led.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        losses: list[GuidanceLoss],
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        gradient: str = CHEAP,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Runs the node."""
        times = (start_percent, end_percent)
        return io.NodeOutput(guide_model(model, losses, vae, strength, *times, gradient))
