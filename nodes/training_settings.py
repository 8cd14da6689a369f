"""All the settings of a training run that its own node does not show."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .edge_types import CATEGORY, Training
from .training_inputs import settings_inputs


class DiffScalerTrainingSettings(io.ComfyNode):
    """Settings for Train DiffScaler Task, each with a default that works."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerTrainingSettings",
            display_name="DiffScaler Training Settings",
            category=CATEGORY,
            description="Further settings for Train DiffScaler Task: layers, learning rates, "
            "noise, prompts, validation, samples, checkpoints, memory. All have defaults that "
            "work.",
            search_aliases=["diffscaler", "optimizer", "learning rate", "training options"],
            inputs=settings_inputs(),
            outputs=[
                Training.Output(display_name="settings", tooltip="For Train DiffScaler Task.")
            ],
        )

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        """Runs the node."""
        return io.NodeOutput(settings)
