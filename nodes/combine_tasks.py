"""Makes one task of several."""

from comfy_api.latest import io

from ..diffscaler_core import combine_tasks
from .edge_types import CATEGORY, Task
from .inputs import connected_tasks, strengths_input, task_list_input


class DiffScalerCombineTasks(io.ComfyNode):
    """Several tasks as one, exactly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerCombineTasks",
            display_name="Combine DiffScaler Tasks",
            category=CATEGORY,
            description="Makes one task that does exactly what several do together: scales and "
            "shifts add, subspaces lie side by side. Save it to share the mix as one file.",
            search_aliases=["diffscaler", "merge tasks", "merge adapters", "merge lora", "mix"],
            inputs=[
                task_list_input("A task of the mix; connect one and a slot for the next appears."),
                strengths_input(),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="The new task's name; empty joins the names with a plus.",
                ),
            ],
            outputs=[Task.Output(display_name="task", tooltip="The combined task.")],
        )

    @classmethod
    def execute(cls, tasks: io.Autogrow.Type, strengths: str = "", name: str = "") -> io.NodeOutput:
        """Runs the node."""
        connected, numbers = connected_tasks(tasks, strengths)
        return io.NodeOutput(combine_tasks(connected, numbers, name or None))
