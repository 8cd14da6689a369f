"""Loads a task file."""

import folder_paths
from comfy_api.latest import io

from ..diffscaler_core import load_task
from .edge_types import CATEGORY, Task
from .folders import FOLDER, stamp_of, task_files


class DiffScalerLoadTask(io.ComfyNode):
    """A task file from models/diffscaler or output/diffscaler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerLoadTask",
            display_name="Load DiffScaler Task",
            category=CATEGORY,
            description="Loads a task adapter: what a frozen model learned for one task, in one "
            "small safetensors file.",
            search_aliases=["diffscaler", "load adapter", "task adapter", "affiner", "lora"],
            inputs=[
                io.Combo.Input(
                    "task_name",
                    options=task_files(),
                    tooltip="A file in models/diffscaler or output/diffscaler.",
                )
            ],
            outputs=[
                Task.Output(display_name="task", tooltip="The task, to be applied to a model.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, task_name: str) -> object:
        """Returns what changes when the file does, so that an overwritten file is loaded again."""
        path = folder_paths.get_full_path(FOLDER, task_name)
        return task_name if path is None else (path, stamp_of(path))

    @classmethod
    def execute(cls, task_name: str) -> io.NodeOutput:
        """Runs the node."""
        return io.NodeOutput(load_task(folder_paths.get_full_path_or_raise(FOLDER, task_name)))
