"""A task's stored prompt as conditioning."""

from comfy_api.latest import io

from ..diffscaler_core import TaskAdapter
from .edge_types import CATEGORY, Task


class DiffScalerTaskConditioning(io.ComfyNode):
    """A prompt that a task file holds, so that no text encoder is needed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerTaskConditioning",
            display_name="DiffScaler Task Conditioning",
            category=CATEGORY,
            description="Gives one of the prompts stored in a task file, already encoded, so that "
            "a workflow needs no text encoder.",
            search_aliases=["diffscaler", "stored prompt", "learned prompt", "textual inversion"],
            inputs=[
                Task.Input("task", tooltip="A task that stores prompts; see DiffScaler Task Info."),
                io.String.Input(
                    "prompt",
                    default="",
                    tooltip="The stored prompt's exact name. Empty: the one without a name (often "
                    "the null prompt) if there is one, else the first.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The prompt, for a sampler."
                )
            ],
        )

    @classmethod
    def execute(cls, task: TaskAdapter, prompt: str) -> io.NodeOutput:
        """Runs the node."""
        context, pooled = task.prompt(prompt if prompt or "" in task.prompts else None)
        extras = {} if pooled is None else {"pooled_output": pooled.float()}
        return io.NodeOutput([[context.float(), extras]])
