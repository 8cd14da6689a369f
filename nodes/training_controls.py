"""Where a training node's control pictures come from, and how they become latents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.training.data.batches import TrainingData
from ..diffscaler_core.training.data.controls import CONTROLS
from ..diffscaler_core.training.data.pixels import Size, View, check_size, cut
from ..diffscaler_core.training.denoiser import Encode

NO_CONTROL = "(none)"


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
