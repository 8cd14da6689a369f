"""Control pictures that are made from the pictures themselves. Knows pixels; no files, no models.

Pixels are (channels, H, W) in −1..1, and so is the control that is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import DiffScalerError, unknown
from ..randomness import generator_for
from .cache import digest_of
from .coarse import Coarse, blurred, shrunk

#: (pixels (channels, H, W) in −1..1, seed) -> control pixels of the same shape and range.
MakeControl = Callable[[Tensor, int], Tensor]

#: Of what is cached by a name of CONTROLS; another number finds none of the old files.
VERSION = 1
#: Canny's thresholds, kornia's own; ComfyUI's node *Detect Edges (Canny)* takes the same numbers.
LOW, HIGH = 0.1, 0.2
#: Shares of the picture's sides: how far the blur reaches (three standard deviations), and the
#: least and the largest side of the hole.
BLUR, HOLE = 0.15, (0.3, 0.7)
#: How many times smaller a low-resolution picture is.
SMALLER = 8


def edges(pixels: Tensor, seed: int) -> Tensor:
    """Returns the edges (Canny) in white on black, by the function that ComfyUI's own node calls.

    Raises:
        DiffScalerError: The library kornia is not installed.
    """
    grey_to_one = (pixels.float()[None] + 1) / 2
    found: Tensor = _canny()(grey_to_one, LOW, HIGH)[1][0]  # (1, H, W) of 0 and 1
    return (found * 2 - 1).expand_as(pixels)


def blur(pixels: Tensor, seed: int) -> Tensor:
    """Returns the picture blurred (Gauss), of which only large shapes and colours are left."""
    return blurred(pixels, BLUR)


def mask(pixels: Tensor, seed: int) -> Tensor:
    """Returns the picture with a rectangular hole in mid-grey, where the seed puts it."""
    draws = torch.rand(4, generator=generator_for(seed, "hole")).tolist()
    rows, columns = (
        _stretch(side, share, place)
        for side, share, place in zip(pixels.shape[-2:], draws[:2], draws[2:], strict=True)
    )
    holed = pixels.clone()
    holed[:, rows, columns] = 0
    return holed


def _stretch(side: int, share: float, place: float) -> slice:
    least, largest = HOLE
    length = max(1, round(side * (least + (largest - least) * share)))
    start = round((side - length) * place)
    return slice(start, start + length)


def grey(pixels: Tensor, seed: int) -> Tensor:
    """Returns the picture without its colours (ITU-R BT.601's luma, as Pillow's "L")."""
    if len(pixels) == 1:
        return pixels
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(-1, 1, 1)
    return (pixels.float() * weights).sum(0, keepdim=True).expand_as(pixels)


def low_resolution(pixels: Tensor, seed: int) -> Tensor:
    """Returns the picture as an eighth of its pixels a side would show it, at its own size."""
    return shrunk(pixels, SMALLER)


#: Name, as `control_from` takes it -> how a control is made of a picture.
CONTROLS: dict[str, MakeControl] = {
    "edges": edges,
    "blur": blur,
    "mask": mask,
    "grey": grey,
    "low_resolution": low_resolution,
    "refine": Coarse(),
}


def maker_of(control_from: str | MakeControl) -> tuple[MakeControl, str | None]:
    """Returns how controls are made, and what names it in a cache (None for a user's function).

    A `Coarse` names itself.

    Raises:
        UnknownNameError: None of CONTROLS, and no function.
        DiffScalerError: The library it needs is not installed.
    """
    if isinstance(control_from, str):
        if control_from not in CONTROLS:
            raise unknown("control made from pictures", control_from, CONTROLS)
        if control_from == "edges":
            _canny()  # said before the first picture is read
        own = CONTROLS[control_from]
        return own, own.key if isinstance(own, Coarse) else f"{control_from} {VERSION}"
    return control_from, control_from.key if isinstance(control_from, Coarse) else None


def made(make: MakeControl, pixels: Tensor) -> Tensor:
    """Returns the control of a picture, checked.

    Its seed is a hash of the pixels: a picture has the same control whenever it is made.

    Args:
        make: How.
        pixels: (channels, H, W) in −1..1.

    Raises:
        DiffScalerError: The function fails, or gives another shape, or NaN or Inf.
    """
    seed = int(digest_of(pixels.float().cpu().contiguous().numpy().tobytes())[:15], 16)
    name = getattr(make, "__name__", type(make).__name__)
    try:
        with torch.no_grad():
            control: Any = make(pixels, seed)
    except (ValueError, OSError) as error:  # or it would pass for a broken picture
        if isinstance(error, DiffScalerError):
            raise
        raise DiffScalerError(f"the control function {name!r} failed: {error}") from error
    if not isinstance(control, Tensor) or control.shape != pixels.shape:
        shown = tuple(control.shape) if isinstance(control, Tensor) else type(control).__name__
        raise DiffScalerError(
            f"the control function {name!r} gave {shown} for a picture of {tuple(pixels.shape)}; "
            f"it must give a tensor of the picture's own shape, in −1..1"
        )
    if not bool(torch.isfinite(control).all()):
        raise DiffScalerError(f"the control function {name!r} gave NaN or Inf")
    return control.to(pixels.dtype)


def _canny() -> Any:
    try:
        from kornia.filters import canny
    except ImportError as error:
        raise DiffScalerError(
            "control pictures of edges need kornia; run: pip install kornia"
        ) from error
    return canny
