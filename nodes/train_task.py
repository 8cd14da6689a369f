"""Trains a task."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from .edge_types import CATEGORY, LossMap, Task
from .training_data import fingerprint_of
from .training_inputs import training_inputs
from .training_job import train

#: Inputs that are lists by nature; all others come as a list of one.
LISTS = ("images", "captions", "latents", "positive", "negative", "control_images")
LISTS += ("validation_latents", "validation_positive")


class DiffScalerTrainTask(io.ComfyNode):
    """A small task learned from pictures, on the model as it is loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerTrainTask",
            display_name="Train DiffScaler Task",
            category=CATEGORY,
            description="Trains a small task on pictures. The model is frozen and stays as it is: "
            "the task can be applied to it at once. Stop it whenever you like: the same settings "
            "queued again go on from there.",
            search_aliases=[
                "diffscaler",
                "train lora",
                "finetune",
                "dreambooth",
                "adapter",
                "difffit",
            ],
            is_input_list=True,
            inputs=training_inputs(),
            outputs=[
                Task.Output(display_name="task", tooltip="The trained task."),
                LossMap.Output(display_name="loss_map", tooltip="The losses, for Plot Loss Graph."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The last pictures drawn with the task, in rows: two of each prompt.",
                ),
                io.String.Output(
                    display_name="summary",
                    tooltip="The run's folder below the output folder, and what came of it.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Returns what changes when the pictures do, so that changed pictures are trained on."""
        single = _single(inputs)
        folders = ("folder", "validation_folder", "control_folder")
        return "".join(fingerprint_of(single.get(name) or "") for name in folders)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """Runs the node."""
        task, losses, samples, summary = train(_single(inputs), cls.hidden.unique_id)
        return io.NodeOutput(task, losses, samples, summary, ui=ui.PreviewText(summary))


def _single(inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs, those that are no lists by themselves taken out of theirs."""
    return {
        name: value[0] if isinstance(value, list) and value and name not in LISTS else value
        for name, value in inputs.items()
    }
