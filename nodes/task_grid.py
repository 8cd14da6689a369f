"""Puts a batch of pictures side by side, with their names."""

import torch
from comfy_api.latest import io

from .edge_types import CATEGORY
from .picture_grid import labelled_grid


class DiffScalerTaskGrid(io.ComfyNode):
    """One labelled picture of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerTaskGrid",
            display_name="DiffScaler Task Grid",
            category=CATEGORY,
            description="Puts the pictures of a batch side by side as one picture, each with its "
            "name below it. Made for the names of Compare DiffScaler Tasks; any batch will do.",
            search_aliases=["diffscaler", "xy plot", "image grid", "contact sheet", "labels"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures, a batch."),
                io.String.Input(
                    "names",
                    default="",
                    multiline=True,
                    tooltip="A line for each picture, in order; empty: no names.",
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many pictures stand side by side; 0 makes the grid about square.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The grid, one picture.")],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, names: str, columns: int) -> io.NodeOutput:
        """Runs the node."""
        lines = [line.strip() for line in names.strip().splitlines()]
        return io.NodeOutput(labelled_grid(images, lines, columns))
