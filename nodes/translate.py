"""Turns a picture of one task into one of another."""

from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .edge_types import CATEGORY
from .translation import LEAST, translated


class DiffScalerTranslate(io.ComfyNode):
    """A latent in, a latent out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerTranslate",
            display_name="DiffScaler Translate",
            category=CATEGORY,
            description="Draws a picture anew under other tasks, prompts or LoRAs, from its own "
            "noise: what stands where stays, what the tasks fix changes. It takes the place of the "
            "sampler.",
            search_aliases=["diffscaler", "cyclediffusion", "img2img", "style transfer", "invert"],
            inputs=[
                io.Model.Input("source_model", tooltip="The model whose style the picture has."),
                io.Model.Input("target_model", tooltip="The same base with other tasks or LoRAs."),
                io.Conditioning.Input("source_positive", tooltip="What the picture shows."),
                io.Conditioning.Input("target_positive", tooltip="What it is to show."),
                io.Conditioning.Input("negative", tooltip="What the target stays away from."),
                io.Latent.Input(
                    "latent",
                    tooltip="The picture, from VAE Encode. With a noise mask, only that part "
                    "changes.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise; it matters little.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps back to noise, and as many forward.",
                ),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance of the target; the source's is 1. At 1 the same model on "
                    "both sides gives the picture back.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.KSampler.SCHEDULERS),
                    default="normal",
                    tooltip="How noise falls from step to step.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=LEAST,
                    max=1.0,
                    step=0.01,
                    tooltip="How far back into noise: 1 is all the way; less keeps more.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="How much of each step is the picture's noise: less keeps less.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The new picture.")],
        )

    @classmethod
    def execute(
        cls,
        source_model: ModelPatcher,
        target_model: ModelPatcher,
        source_positive: list[Any],
        target_positive: list[Any],
        negative: list[Any],
        latent: dict[str, Any],
        eta: float = 1.0,
        **settings: Any,
    ) -> io.NodeOutput:
        """Runs the node."""
        prompts = (source_positive, target_positive, negative)
        models = (source_model, target_model)
        return io.NodeOutput(translated(*models, prompts, latent, eta=eta, **settings))
