"""Inputs that several nodes share, so that they read and behave alike everywhere."""

from collections.abc import Mapping

from comfy_api.latest import io

from ..diffscaler_core import TaskAdapter
from ..diffscaler_core.strengths import parse_strengths
from .edge_types import Task

#: The most tasks one node takes; more nodes can follow each other.
MOST_TASKS = 32


def strength_input(tooltip: str) -> io.Input:
    """Returns the strength of a whole task."""
    return io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip)


def part_inputs() -> list[io.Input]:
    """Returns the strengths of a task's three parts."""
    parts = {
        "scale": "Multiplies the per-channel scales only.",
        "shift": "Multiplies the per-channel shifts only.",
        "subspace": "Multiplies the new low-rank subspaces only.",
    }
    return [
        io.Float.Input(
            part,
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip=f"{tooltip} 1 is as trained.",
        )
        for part, tooltip in parts.items()
    ]


def range_inputs(what: str = "the task") -> list[io.Input]:
    """Returns where in sampling something is at work."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip=f"Where in sampling {what} begins: 0 is the first step, pure noise.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            tooltip=f"Where in sampling {what} ends: 1 is the last step.",
        ),
    ]


def component_input() -> io.Input:
    """Returns which part of a pipeline the model is, for tasks that adapt several."""
    return io.Combo.Input(
        "component",
        options=["auto", "transformer", "transformer_2", "unet"],
        default="auto",
        optional=True,
        advanced=True,
        tooltip="Which of the task's components this model is. Only tasks that adapt two models "
        "(Wan 2.2's high-noise and low-noise one) need another choice than auto.",
    )


def chosen_component(component: str) -> str | None:
    """Returns what `component_input` was set to, None for auto."""
    return None if component == "auto" else component


def connected_tasks(
    tasks: Mapping[str, TaskAdapter | None], strengths: str | None
) -> tuple[list[TaskAdapter], list[float]]:
    """Returns what `task_list_input` and `strengths_input` were given: the tasks, a strength each.

    Raises:
        DiffScalerError: Another number of strengths, or something that is no number.
    """
    connected = [task for task in tasks.values() if task is not None]
    return connected, parse_strengths(strengths or "", len(connected))


def task_list_input(tooltip: str) -> io.Input:
    """Returns a list of tasks that grows by one slot with every task connected."""
    template = io.Autogrow.TemplatePrefix(
        Task.Input("task", tooltip=tooltip), prefix="task", min=1, max=MOST_TASKS
    )
    return io.Autogrow.Input("tasks", template=template, tooltip=tooltip)


def strengths_input() -> io.Input:
    """Returns the strengths of a list of tasks, as text."""
    return io.String.Input(
        "strengths",
        default="",
        optional=True,
        placeholder="1.0, 0.5",
        tooltip="One number for each task, in order, such as '1.0, 0.5'; or one number for all of "
        "them; empty means 1.",
    )
