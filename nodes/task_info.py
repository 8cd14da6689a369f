"""Shows what a task is."""

from comfy_api.latest import io, ui

from ..diffscaler_core import TaskAdapter
from ..diffscaler_core.describe import describe
from .edge_types import CATEGORY, Task
from .pictures import thumbnail_of


class DiffScalerTaskInfo(io.ComfyNode):
    """A task's facts, as text and picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerTaskInfo",
            display_name="DiffScaler Task Info",
            category=CATEGORY,
            description="Shows what a task was made for, its method, size and training.",
            search_aliases=["diffscaler", "inspect adapter", "metadata", "lora info", "trigger"],
            is_output_node=True,
            inputs=[Task.Input("task", tooltip="The task to look at.")],
            outputs=[
                Task.Output(display_name="task", tooltip="The same task."),
                io.String.Output(display_name="text", tooltip="The facts, one a line."),
                io.Image.Output(
                    display_name="thumbnail",
                    tooltip="The picture stored in the file; a small black one if there is none.",
                ),
            ],
        )

    @classmethod
    def execute(cls, task: TaskAdapter) -> io.NodeOutput:
        """Runs the node."""
        text = describe(task)
        return io.NodeOutput(task, text, thumbnail_of(task), ui=ui.PreviewText(text))
