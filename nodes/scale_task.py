"""Makes a task weaker or stronger, whole or in part."""

from comfy_api.latest import io

from ..diffscaler_core import TaskAdapter, scale_task
from ..diffscaler_core.strengths import parse_block_weights
from .edge_types import CATEGORY, Task
from .inputs import part_inputs, strength_input


class DiffScalerScaleTask(io.ComfyNode):
    """A task with other strengths per part and per block."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerScaleTask",
            display_name="Scale DiffScaler Task",
            category=CATEGORY,
            description="Multiplies a task's effect: as a whole, per part, and per block of the "
            "model. The result is a task like any other, and can be saved.",
            search_aliases=["diffscaler", "block weight", "lora block weight", "task strength"],
            inputs=[
                Task.Input("task", tooltip="The task to scale; it stays as it is."),
                strength_input("Multiplies everything: 1 leaves the task as it is."),
                *part_inputs(),
                io.String.Input(
                    "blocks",
                    default="",
                    multiline=True,
                    optional=True,
                    placeholder="0-5: 0.5\ntransformer_blocks.7: 0\nattn: 1.2",
                    tooltip="One line each, 'which: factor'; the first line that fits a layer "
                    "counts, other layers keep 1. Which: block numbers ('3', '0-5'), a list's "
                    "blocks ('transformer_blocks.0-5'), a name in the path ('attn.to_q'), or a "
                    "regular expression for the whole name.",
                ),
            ],
            outputs=[Task.Output(display_name="task", tooltip="The scaled task.")],
        )

    @classmethod
    def execute(
        cls,
        task: TaskAdapter,
        strength: float,
        scale: float = 1.0,
        shift: float = 1.0,
        subspace: float = 1.0,
        blocks: str = "",
    ) -> io.NodeOutput:
        """Runs the node."""
        parts = {"scale": scale, "shift": shift, "subspace": subspace}
        layers = parse_block_weights(blocks or "")
        return io.NodeOutput(scale_task(task, strength, parts=parts, layers=layers))
