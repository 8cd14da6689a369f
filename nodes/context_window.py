"""ComfyUI's context windows: calls of the model with a part of what is sampled.

A window over a video's frames, or over a batch, holds whole pictures, so most tasks need not know.
What lies somewhere in the picture, or is given for each latent, would come to lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..diffscaler_core import DiffScalerError
from .control_conds import ControlRows
from .entries import Entry

#: The dimensions of latents, by their number.
_DIMENSIONS = {
    4: ("the batch", "channels", "the height", "the width"),
    5: ("the batch", "channels", "the frames", "the height", "the width"),
}


def check_window(
    window: Any, entries: Sequence[Entry], controls: Mapping[str, ControlRows], ndim: int
) -> None:
    """Says whether a window's call is what the tasks are meant for.

    Args:
        window: ComfyUI's `transformer_options["context_window"]`, or None.
        entries: The tasks of the call.
        controls: The call's controls by key.
        ndim: Of its latents.

    Raises:
        DiffScalerError: A region or a control would act in another place, frame or latent.
    """
    if window is None:
        return
    dimension = _DIMENSIONS.get(ndim, ())[window.dim : window.dim + 1]
    over = dimension[0] if dimension else f"dimension {window.dim}"
    for entry in entries:
        what = _bound(entry, controls, over)
        if what is not None:
            raise DiffScalerError(
                f"context windows over {over} cannot follow {what} of {entry.task.name!r}: take "
                f"off one of the two"
            )


def _bound(entry: Entry, controls: Mapping[str, ControlRows], over: str) -> str | None:
    """Returns what of a task depends on where the window lies."""
    placed = []
    if entry.control in controls:
        placed = [part.placed for part in controls[entry.control].parts if part.placed is not None]
    if over in ("the frames", "the batch"):
        axis = 2 if over == "the frames" else 0
        if any(one.latents.ndim > axis and one.latents.shape[axis] > 1 for one in placed):
            return "the control pictures"
        is_many = entry.region is not None and entry.region.count > 1
        return "the regions per latent" if over == "the batch" and is_many else None
    if placed:
        return "the control picture"
    return None if entry.region is None else "the region"
