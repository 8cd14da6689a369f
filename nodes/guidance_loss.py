"""One thing that a model's pictures are led to."""

from comfy_api.latest import io
from torch import Tensor

from ..diffscaler_core.systems.guidance_losses import GuidanceLoss
from .edge_types import CATEGORY, Guidance
from .model_guidance import KINDS, loss_of


class DiffScalerGuidanceLoss(io.ComfyNode):
    """One loss; the nodes can follow each other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerGuidanceLoss",
            display_name="DiffScaler Guidance Loss",
            category=CATEGORY,
            description="Says what DiffScaler Guide Model leads pictures to: a mean colour, the "
            "edges of a picture, or its features. Several of these nodes in a row add up.",
            search_aliases=["diffscaler", "loss guidance", "colour", "color", "edges", "reference"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default="colour",
                    tooltip="'colour': the mean colour. 'edges': where a picture has its edges. "
                    "'features': what a small network sees in a picture; it knows the pack's "
                    "pictographs only.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Of this loss beside others; below 0 it leads away.",
                ),
                io.Color.Input("colour", default="#2060e0", tooltip="For 'colour': the mean."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="For 'edges' and 'features': the picture to be like. One for all, or "
                    "one per latent of the batch.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture it counts; 'features' see all of it.",
                ),
                Guidance.Input("losses", optional=True, tooltip="Losses to add this one to."),
            ],
            outputs=[
                Guidance.Output(display_name="losses", tooltip="The losses, with this one."),
            ],
        )

    @classmethod
    def execute(
        cls,
        kind: str,
        weight: float,
        colour: str,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        losses: list[GuidanceLoss] | None = None,
    ) -> io.NodeOutput:
        """Runs the node."""
        return io.NodeOutput([*(losses or []), loss_of(kind, weight, colour, image, mask)])
