"""What the schedule node was told, as a schedule."""

from __future__ import annotations

from comfy.hooks import HookKeyframeGroup

from ..diffscaler_core.schedule import Schedule


def schedule_of(
    points: str,
    interpolation: str,
    start: float,
    end: float,
    fade: float,
    keyframes: HookKeyframeGroup | None,
) -> Schedule:
    """Returns a schedule: of the keyframes, else of the points, else of the window.

    Args:
        points: For `Schedule.parse`; empty: none.
        interpolation: What is between points.
        start: Where the window begins, a percent of sampling time.
        end: Where it ends.
        fade: Of the window.
        keyframes: ComfyUI's; each holds from its start until the next one's. Its guaranteed steps
            are not counted, as a schedule knows percents and no steps.

    Raises:
        DiffScalerError: Points or a window that cannot be meant.
    """
    if keyframes is not None and not keyframes.is_empty():
        by_percent = {float(f.start_percent): float(f.strength) for f in keyframes.keyframes}
        return Schedule.of(list(by_percent.items()), "step")
    if points.strip():
        return Schedule.parse(points, interpolation)
    return Schedule.window(start, end, fade)
