"""Where a training node's control pictures come from, and how they become latents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.training.data.batches import TrainingData
from ..diffscaler_core.training.data.controls import CONTROLS
from ..diffscaler_core.training.data.pixels import Size, View, check_size, cut
from ..diffscaler_core.training.denoiser import Encode
from ..diffscaler_core.training.learner import control_kind

NO_CONTROL = "(none)"  # of folders too


def control_choices() -> list[str]:
    """Returns what control pictures can be made of pictures."""
    return [NO_CONTROL, *CONTROLS]


@dataclass(frozen=True)
class ControlSource:
    """Where a run's control pictures come from; nowhere, if nothing is said.

    Attributes:
        made: A name of CONTROLS: of the pictures themselves.
        folder: A folder that the node offers.
        images: IMAGEs, (B, H, W, C) in 0..1 each.
    """

    made: str | None = None
    folder: str | None = None
    images: tuple[Tensor, ...] = ()

    def for_rows(self, count: int, what: str) -> list[Tensor]:
        """Returns the images one by one, (H, W, C), for pictures that are no folder.

        Raises:
            DiffScalerError: A folder is chosen, or there is another number of images.
        """
        if self.folder is not None:
            raise DiffScalerError(
                f"a control_folder belongs to a folder of pictures; for {what} connect "
                f"control_images"
            )
        pictures = [image for batch in self.images for image in batch]
        if pictures and len(pictures) != count:
            raise DiffScalerError(
                f"{count} {what} but {len(pictures)} control images; connect one for each, in the "
                f"same order"
            )
        return pictures


NOTHING = ControlSource()


def control_of(inputs: Mapping[str, Any]) -> tuple[str, ControlSource]:
    """Returns what the control pictures show, "" if there are none, and where they come from.

    Args:
        inputs: The training node's.

    Raises:
        DiffScalerError: Several sources; none, though it is said what they show; or nobody says.
    """
    made = inputs.get("control_from") or NO_CONTROL
    folder = inputs.get("control_folder") or NO_CONTROL
    images = tuple(inputs.get("control_images") or ())
    given = {
        f"control_from {made!r}": made != NO_CONTROL,
        f"control_folder {folder!r}": folder != NO_CONTROL,
        "control_images": bool(images),
    }
    said = [name for name, there in given.items() if there]
    kind = str(inputs.get("control") or "").strip()
    start = inputs.get("task")
    if not said and not kind and (start is None or not start.is_control):
        return "", NOTHING
    if len(said) != 1:
        raise DiffScalerError(
            f"a task that takes control pictures needs one source of them, got "
            f"{' and '.join(said) or 'none'}: choose control_from or control_folder, or connect "
            f"control_images"
        )
    if not kind and made != NO_CONTROL:
        kind = made
    kind = kind or control_kind(start, None)
    if not kind:
        raise DiffScalerError(
            f"{said[0]} is given: say in 'control' what the control pictures show, such as depth"
        )
    source = ControlSource(
        made if made != NO_CONTROL else None, folder if folder != NO_CONTROL else None, images
    )
    return kind, source


def cut_image(image: Tensor, target: Size, name: str) -> Tensor:
    """Returns one picture of an IMAGE, (H, W, C) in 0..1, as (3, height, width) in −1..1.

    Raises:
        DiffScalerError: It would have to grow to more than twice its size.
    """
    values = (image[..., :3].float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    values = values.expand(-1, -1, 3)
    try:
        check_size((values.shape[0], values.shape[1]), target)
    except ValueError as error:
        raise DiffScalerError(f"{name}: {error}") from error
    return cut(Image.fromarray(np.ascontiguousarray(values.numpy())), target, View())


def with_controls(
    data: TrainingData, pictures: Sequence[Tensor], encode: Encode, ratio: int
) -> TrainingData:
    """Returns encoded pictures together with their control pictures.

    Args:
        data: The encoded pictures.
        pictures: A control picture for each, (H, W, C) in 0..1, in the order of the buckets.
        encode: Pixels -> latents.
        ratio: Pixels a side of one latent.
    """
    controls, start = [], 0
    for bucket in data.buckets:
        count, height, width = int(bucket.shape[1]), bucket.shape[-2], bucket.shape[-1]
        numbers = range(start, start + count)
        size = (height * ratio, width * ratio)
        cuts = [cut_image(pictures[i], size, f"control image {i + 1}") for i in numbers]
        controls.append(torch.cat([encode(one[None]).float().cpu() for one in cuts])[None])
        start += count
    ids = (hashlib.sha256(p.float().cpu().contiguous().numpy().tobytes()) for p in pictures)
    together = controls[0] if len(controls) == 1 else tuple(controls)
    return replace(data, control=together, control_ids=tuple(digest.hexdigest() for digest in ids))
