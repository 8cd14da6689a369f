"""Makes a task's strength follow sampling time."""

from comfy.hooks import HookKeyframeGroup
from comfy_api.latest import io

from ..diffscaler_core import TaskAdapter
from ..diffscaler_core.schedule import INTERPOLATIONS
from .edge_types import CATEGORY, Task
from .task_schedule import schedule_of

_WINDOW = (
    ("start", 0.0, "Where in sampling the task begins: 0 is pure noise."),
    ("end", 1.0, "Where in sampling the task ends: 1 is the picture."),
    ("fade", 0.0, "How long it takes to come in after the start and to go before the end."),
)


class DiffScalerScheduleTask(io.ComfyNode):
    """A task whose strength changes while a picture is drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerScheduleTask",
            display_name="Schedule DiffScaler Task",
            category=CATEGORY,
            description="Makes a task stronger or weaker while a picture is drawn: its strength is "
            "multiplied at every step by a factor that depends on how far sampling is. Nothing is "
            "loaded or patched for it, and every prompt still shares one call of the model.",
            search_aliases=[
                *("diffscaler", "strength over time", "lora schedule", "keyframes", "fade in"),
            ],
            inputs=[
                Task.Input("task", tooltip="The task; it stays as it is."),
                io.String.Input(
                    "points",
                    default="",
                    multiline=True,
                    placeholder="0: 0\n0.3: 1\n1: 1",
                    tooltip="One line each, 'percent: factor'. Percent 0 is pure noise, 1 the "
                    "picture, as start_percent elsewhere. 'scale 0.3: 1' (or shift, subspace) is a "
                    "point of that part alone. Before the first point and after the last the "
                    "factor stays. Empty: start, end and fade count instead.",
                ),
                io.Combo.Input(
                    "interpolation",
                    options=list(INTERPOLATIONS),
                    default="linear",
                    tooltip="What lies between points: a straight line, the last point's factor "
                    "until the next, or a line that is level at the points.",
                ),
                *(
                    io.Float.Input(
                        name,
                        default=default,
                        min=0.0,
                        max=1.0,
                        step=0.001,
                        optional=True,
                        tooltip=f"{tooltip} Used where no points are written.",
                    )
                    for name, default, tooltip in _WINDOW
                ),
                io.HookKeyframes.Input(
                    "keyframes",
                    optional=True,
                    tooltip="ComfyUI's own hook keyframes, as points: each one's strength counts "
                    "from its start_percent. Connected, they take the place of the text.",
                ),
            ],
            outputs=[
                Task.Output(display_name="task", tooltip="The task with its schedule, to apply.")
            ],
        )

    @classmethod
    def execute(
        cls,
        task: TaskAdapter,
        points: str,
        interpolation: str,
        start: float = 0.0,
        end: float = 1.0,
        fade: float = 0.0,
        keyframes: HookKeyframeGroup | None = None,
    ) -> io.NodeOutput:
        """Runs the node."""
        schedule = schedule_of(points, interpolation, start, end, fade, keyframes)
        return io.NodeOutput(task.replace(schedule=schedule))
