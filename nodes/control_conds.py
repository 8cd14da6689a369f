"""Control pictures on conditionings: from a node that knows no size to the sampler that does.

A conditioning carries its control in `model_conds`, so that ComfyUI itself repeats it with the
batch, crops it with an area and keeps guidance in one call. The latents' size is known only when
sampling starts: there `placed_conds` puts what the VAE made at that size in the pictures' place.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.conds import CONDRegular
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.control import Control
from ..diffscaler_core.pictures import covered

logger = logging.getLogger(__name__)

#: Before the id of a control, in `model_conds`.
PREFIX = "ds_control:"
#: Where a conditioning carries what is ours for a model that refuses arguments it does not know: on
#: a model without our wrappers, ComfyUI would hand it to it.
ASIDE = "ds_conds"
#: Sizes of one picture that stay encoded.
_KEPT = 4


@dataclass(frozen=True, eq=False)
class Placed:
    """A control at the size of certain latents.

    Attributes:
        latents: (1 or R, C, h, w) in the model's own latent space, or (1, C, f, h, w) for a video.
        mask: (1 or R, 1, h, w), or None.
    """

    latents: Tensor
    mask: Tensor | None

    def cropped(self, window: tuple[int, ...] | None, rows: int | None) -> Control:
        """Returns the control of an area.

        Args:
            window: ComfyUI's area, the sizes and then the starts per dimension; None: everything.
            rows: Of the latents; None: as many as there are pictures.
        """
        parts = [self.latents] if self.mask is None else [self.latents, self.mask]
        parts = [in_window(part, window) for part in parts]
        if window is not None and len(window) == 6:
            latents = parts[0]
            if latents.ndim == 5 and latents.shape[2] > 1:
                parts[0] = latents.narrow(2, window[3], window[0])
        if rows is not None:
            parts = [part.expand(rows, *part.shape[1:]) for part in parts]
        return Control(parts[0], mask=parts[1] if len(parts) > 1 else None)


class ControlPicture:
    """What a node was given for a control task; encodes it at any size it is asked for.

    Args:
        name: The task's name.
        images: (N, H, W, C) in 0..1.
        vae: ComfyUI's VAE.
        mask: (N or 1, H, W) in 0..1, or None.

    Attributes:
        key: Its name in `model_conds`, of its own.
    """

    def __init__(self, name: str, images: Tensor, vae: Any, mask: Tensor | None = None) -> None:
        if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or not len(images):
            raise DiffScalerError(
                f"the control image of {name!r} must be (N, H, W, 1, 3 or 4 channels), "
                f"got {tuple(images.shape)}"
            )
        mask = mask.unsqueeze(0) if mask is not None and mask.ndim == 2 else mask
        self.name, self.vae = name, vae
        self.key = f"{PREFIX}{uuid.uuid4().hex}"
        self._images, self._mask = images, mask
        self._placed: dict[tuple[int, ...], Placed] = {}
        self._said: set[str] = set()

    def on(self, conditioning: Sequence[Any], model: Any, is_on: bool = True) -> list[Any]:
        """Returns a conditioning that carries this control too, or only its place if not `is_on`.

        Conditionings that carry the same controls, on or off, share one call of the model.

        Args:
            conditioning: ComfyUI's list of [context, more].
            model: The `BaseModel` that is to run it.
            is_on: False: these rows run without the control.
        """
        place, cond = place_for(model), ControlCond(self, is_on)
        return [
            [context, {**more, place: {**more.get(place, {}), self.key: cond}}]
            for context, more in conditioning
        ]

    def placed(self, model: Any, shape: Sequence[int]) -> Placed:
        """Returns the control for latents of a shape, encoded once per size.

        Args:
            model: The `BaseModel` to be sampled.
            shape: (B, C, h, w), or (B, C, f, h, w) for a video.

        Raises:
            DiffScalerError: Another number of pictures, masks, frames or channels than these need.
        """
        if len(shape) not in (4, 5):
            raise DiffScalerError(
                f"the control {self.name!r} needs the latents of a picture or a video, "
                f"got {tuple(shape)}"
            )
        frames = shape[2] if len(shape) == 5 else 1
        count, batch = len(self._images), shape[0]
        if frames == 1 and count not in (1, batch):
            raise DiffScalerError(
                f"{count} control images of {self.name!r} for a latent batch of {batch}: give one "
                f"image for all, or one per latent"
            )
        rows = count if frames == 1 else 1
        if self._mask is not None and len(self._mask) not in (1, rows, batch):
            raise DiffScalerError(
                f"{len(self._mask)} control masks of {self.name!r} for a latent batch of {batch}: "
                f"give one mask for all, or one per latent"
            )
        size = tuple(shape[1:])
        if size not in self._placed:
            latents = self._encoded(model, shape)
            self._placed[size] = Placed(latents, self._mask_at(*shape[-2:]))
            for old in list(self._placed)[:-_KEPT]:
                del self._placed[old]
        placed = self._placed[size]
        if placed.mask is not None and len(placed.mask) not in (1, len(placed.latents)):
            rows = len(placed.mask)  # one picture, a mask per latent
            latents = placed.latents.expand(rows, *placed.latents.shape[1:])
            self._placed[size] = placed = Placed(latents, placed.mask)
        return placed

    def say_once(self, message: str, *values: object) -> None:
        """Warns, unless this picture has warned with these words before."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)

    @torch.no_grad()
    def _encoded(self, model: Any, shape: Sequence[int]) -> Tensor:
        _, channels, *size, height, width = shape
        frames = size[0] if size else 1
        ratio = self.vae.spacial_compression_encode()
        images = self._images[..., :3]
        # as it is cut in training, and in diffusers
        pixels = covered(images.movedim(-1, 1).float(), (height * ratio, width * ratio))
        pixels = pixels.clamp(0, 1).movedim(1, -1)
        pixels = pixels.expand(*pixels.shape[:-1], 3)
        if frames > 1 and len(pixels) > 1:
            latents = self._video(self.vae.encode(pixels), frames)
        else:
            # one by one, as a video's VAE takes a batch for the frames of one video
            latents = torch.cat([self.vae.encode(one) for one in pixels.split(1)])
        if latents.ndim == 5 and not size:
            latents = latents[:, :, 0]
        elif latents.ndim == 4 and size:
            latents = latents.unsqueeze(2)
        if latents.shape[1] != channels or latents.shape[-2:] != (height, width):
            raise DiffScalerError(
                f"the VAE makes {_named(latents)} of the control {self.name!r}, but the model "
                f"draws {channels} channels of {width}x{height}: connect the base's own VAE"
            )
        latents = model.process_latent_in(latents)
        return latents[:, :, 0] if latents.ndim == 5 and frames == 1 else latents

    def _video(self, latents: Tensor, frames: int) -> Tensor:
        if latents.ndim == 4:  # a picture's VAE: every frame by itself
            latents = latents.movedim(0, 1).unsqueeze(0)
        if latents.shape[2] != frames:
            step = self.vae.temporal_compression_decode() or 1
            raise DiffScalerError(
                f"{len(self._images)} control images of {self.name!r} make {latents.shape[2]} "
                f"latent frames, but the video has {frames}: give one image for all frames, or "
                f"{(frames - 1) * step + 1}"
            )
        return latents

    def _mask_at(self, height: int, width: int) -> Tensor | None:
        if self._mask is None:
            return None
        return averaged(self._mask.unsqueeze(1).float(), height, width).clamp(0, 1)


class ControlCond(CONDRegular):  # type: ignore[misc]
    """One conditioning's control, as ComfyUI's batching sees it.

    Args:
        picture: The picture.
        is_on: False: these rows run without the control.
        placed: The picture at the size that is sampled; None: nobody has asked for it.
        window: The area.
        rows: How many rows the conditioning has.
    """

    def __init__(
        self,
        picture: ControlPicture,
        is_on: bool = True,
        placed: Placed | None = None,
        window: tuple[int, ...] | None = None,
        rows: int = 1,
    ) -> None:
        super().__init__(None)
        self.picture, self.is_on = picture, is_on
        self.placed, self.window, self.rows = placed, window, rows

    def _copy_with(self, cond: object) -> ControlCond:
        return self

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> ControlCond:
        """Returns the same for a batch and an area."""
        if self.placed is None and self.is_on:
            self.picture.say_once(
                "a conditioning carries the control %r, but the model that is sampled does not "
                "run it: connect the model that comes out of the same DiffScaler Control node",
                self.picture.name,
            )
        window = None if area is None else tuple(area)
        return ControlCond(self.picture, self.is_on, self.placed, window, batch_size)

    def can_concat(self, other: object) -> bool:
        """Says whether both can share a call: always, as rows may differ."""
        return isinstance(other, ControlCond)

    def concat(self, others: Iterable[ControlCond]) -> ControlRows:
        """Returns what the model call is given for all of them."""
        return ControlRows((self, *others))

    def size(self) -> list[int]:
        """Returns what ComfyUI counts it as; it is no input of the model's own."""
        return [1]


class ControlRows:
    """The controls of one model call, a part per conditioning.

    Attributes:
        parts: In the order of the rows.
    """

    def __init__(self, parts: Sequence[ControlCond]) -> None:
        self.parts = tuple(parts)

    @property
    def factors(self) -> Tensor:
        """1 or 0 per row, (B,): whether it has the control."""
        return torch.tensor([float(part.is_on) for part in self.parts for _ in range(part.rows)])

    @property
    def is_placed(self) -> bool:
        """Says whether there is anything to give: else they came past the sampler's start."""
        return all(part.placed is not None for part in self.parts)

    @property
    def key(self) -> Any:
        """The same for the same pictures in the same areas, whichever rows have them."""
        return tuple((part.placed, part.window, part.rows) for part in self.parts)

    def control(self) -> Control:
        """Returns the pictures of all rows, or the one that all share."""
        areas = {(part.placed, part.window) for part in self.parts}
        first = self._placed(self.parts[0])
        if len(areas) == 1 and len(first.latents) == 1:
            return first.cropped(self.parts[0].window, None)
        own = [self._placed(part).cropped(part.window, part.rows) for part in self.parts]
        masks = [control.mask for control in own if control.mask is not None]
        latents = torch.cat([control.latents for control in own])
        return Control(latents, mask=torch.cat(masks) if masks else None)

    @staticmethod
    def _placed(part: ControlCond) -> Placed:
        assert part.placed is not None
        return part.placed


def place_for(model: Any) -> str:
    """Returns where a conditioning carries what is ours for this `BaseModel`."""
    parameters = inspect.signature(model.diffusion_model.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return "model_conds" if takes_any else ASIDE


def conds_of(cond: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a conditioning carries for a model's call, by name, wherever it carries it."""
    return {**cond.get("model_conds", {}), **cond.get(ASIDE, {})}


def placed_conds(
    conds: Mapping[str, Sequence[Any]], names: Mapping[str, str], model: Any, shape: Sequence[int]
) -> dict[str, list[Any]]:
    """Returns a guider's conditionings with the controls of this model at the size of its latents.

    The given ones stay as they are: ComfyUI keeps them.

    Args:
        conds: Kind ("positive", …) -> conditionings, as a guider holds them.
        names: Key of each control that the model runs -> its task's name.
        model: The `BaseModel`.
        shape: Of the latents.

    Raises:
        DiffScalerError: A control does not fit the latents.
    """
    found: set[str] = set()
    result = {}
    for kind, own in conds.items():
        result[kind] = [_placed_cond(cond, names, model, shape, found) for cond in own]
    for key in names.keys() - found:
        logger.warning(
            "the model runs the control %r, but no conditioning carries its image, so it has no "
            "effect: connect the positive and negative that come out of the same DiffScaler "
            "Control node",
            names[key],
        )
    return result


def _placed_cond(
    cond: Any, names: Mapping[str, str], model: Any, shape: Sequence[int], found: set[str]
) -> Any:
    placed = {}
    own = cond.get("model_conds", {})
    for key, one in conds_of(cond).items():
        if key in names and isinstance(one, ControlCond):
            found.add(key)
            at = one.placed or one.picture.placed(model, shape)
            placed[key] = ControlCond(one.picture, one.is_on, at)
    return {**cond, "model_conds": {**own, **placed}} if placed else cond


def middle(pictures: Tensor, height: int, width: int) -> Tensor:
    """Returns the largest part of pictures (N, C, H, W), around their middle, of a size's shape."""
    high, wide = pictures.shape[-2:]
    scale = max(height / high, width / wide)
    rows = min(high, max(1, round(height / scale)))
    columns = min(wide, max(1, round(width / scale)))
    top, left = (high - rows) // 2, (wide - columns) // 2
    return pictures[..., top : top + rows, left : left + columns]


def averaged(masks: Tensor, height: int, width: int) -> Tensor:
    """Returns masks (N, 1, H, W) at the size of latents, cut as control pictures are."""
    return F.adaptive_avg_pool2d(middle(masks, height, width), (height, width))


def in_window(whole: Tensor, window: tuple[int, ...] | None) -> Tensor:
    """Returns the part of latents or masks (…, h, w) that an area of ComfyUI's sees.

    Args:
        whole: For the whole picture.
        window: The area, the sizes and then the starts per dimension; None: everything.
    """
    if window is not None:
        half = len(window) // 2
        for axis in (-1, -2):
            whole = whole.narrow(axis, window[axis], window[half + axis])
    return whole


def _named(latents: Tensor) -> str:
    return f"{latents.shape[1]} channels of {latents.shape[-1]}x{latents.shape[-2]}"
