"""LOSSES: what guided sampling can lead pictures to. Differentiable functions; knows no sampler.

A loss takes pictures (B, 3, H, W) in −1..1 (of a base without a VAE: its samples) and gives one
number per picture. To add a kind, write its maker and one line in LOSSES; a function of one's own
needs no kind: `GuidanceLoss(function)`.

What is not here, and is not meant to be: a loss that recognises persons. See docs/guidance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DiffScalerError, shown, unknown

#: Pictures (B, 3, H, W) in −1..1 -> losses (B,).
Function = Callable[[Tensor], Tensor]
#: What tells edges from noise, in units of the full range of brightness.
_STEEP = 0.05


@dataclass(frozen=True, eq=False)
class GuidanceLoss:
    """One thing that pictures are led to.

    Attributes:
        function: Pictures -> losses, differentiable.
        weight: Of this loss in a sum; negative leads away.
        name: For messages.
        on_latents: True: the function takes the clean latents as they are, not the picture.
    """

    function: Function
    weight: float = 1.0
    name: str = "function"
    on_latents: bool = False


def make_loss(kind: str, *args: Any, weight: float = 1.0, **settings: Any) -> GuidanceLoss:
    """Returns a loss of a kind in LOSSES, which says what each takes.

    Raises:
        UnknownNameError: No such kind.
    """
    if kind not in LOSSES:
        raise unknown("guidance loss", kind, LOSSES)
    return GuidanceLoss(LOSSES[kind](*args, **settings), weight, kind)


def mean_colour(colour: Any, where: Tensor | None = None) -> Function:
    """Returns the squared distance of a picture's mean colour from a colour.

    Args:
        colour: "#rrggbb", or (3,) in −1..1.
        where: Where the mean is taken, (1 or B, 1, H, W) in 0..1, of any size; None: everywhere.
    """
    aim = torch.as_tensor(parse_colour(colour), dtype=torch.float32)

    def loss(pictures: Tensor) -> Tensor:
        return (_mean(pictures, where) - aim.to(pictures)).square().mean(1)

    return loss


def edge_map(reference: Tensor, where: Tensor | None = None) -> Function:
    """Returns the mean squared distance of a picture's edges from those of a reference.

    Args:
        reference: Pictures, (1 or B, 3 or 1, H, W) in −1..1, of any size.
        where: Where it counts, (1 or B, 1, H, W) in 0..1; None: everywhere.
    """

    def loss(pictures: Tensor) -> Tensor:
        other = sized(reference, pictures).expand(-1, 3, -1, -1)
        return _mean((edges(pictures) - edges(other)).square(), where).mean(1)

    return loss


def same_features(net: Callable[[Tensor], Tensor], reference: Tensor) -> Function:
    """Returns 1 − the cosine between a picture's features and those of a reference.

    Args:
        net: Pictures -> features (B, …), differentiable: any module, or `FeatureNet.features` of
            the small network (`load_features("pocket").features`). Inception as metrics take it
            rounds its input to bytes, so no gradient comes through it.
        reference: Pictures, (1 or B, 3, H, W) in −1..1.
    """

    def loss(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            aim = net(reference.to(pictures)).flatten(1)
        found = net(pictures).flatten(1)
        return 1 - F.cosine_similarity(found, aim.to(found), dim=1).to(pictures)

    return loss


def class_of(net: Callable[[Tensor], Tensor], target: Tensor | int) -> Function:
    """Returns the cross-entropy of a classifier's or a segmenter's answers.

    Args:
        net: Pictures -> logits (B, K), or (B, K, h, w) for classes of pixels.
        target: The class wanted, or (1 or B,), or (1 or B, H, W) for classes of pixels, of any
            size.
    """
    aim = torch.as_tensor(target)

    def loss(pictures: Tensor) -> Tensor:
        logits = net(pictures)
        wanted = aim.to(logits.device).long()
        if logits.ndim == 4:
            wanted = wanted.reshape(-1, *wanted.shape[-2:])
            wanted = F.interpolate(wanted[:, None].float(), logits.shape[2:]).long()[:, 0]
        wanted = wanted.expand(len(logits), *logits.shape[2:])
        found = F.cross_entropy(logits, wanted, reduction="none")
        return found.flatten(1).mean(1).to(pictures) if found.ndim > 1 else found.to(pictures)

    return loss


#: Kind -> what makes its function.
LOSSES: dict[str, Callable[..., Function]] = {
    "colour": mean_colour,
    "edges": edge_map,
    "features": same_features,
    "class": class_of,
}


def total(losses: Sequence[GuidanceLoss], x0: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the weighted sum of some losses, (B,).

    Args:
        losses: One or more.
        x0: Clean latents, (B, C, …).
        decode: Latents -> pictures; called if a loss wants pictures.

    Raises:
        DiffScalerError: A loss gives no number per picture.
    """
    pictures = None
    found = x0.new_zeros(len(x0))
    for each in losses:
        if not each.on_latents and pictures is None:
            pictures = decode(x0)
        values = each.function(x0 if each.on_latents or pictures is None else pictures)
        if values.shape != found.shape:
            raise DiffScalerError(
                f"guidance loss {each.name!r} gave {tuple(values.shape)} for {len(x0)} pictures; "
                f"it must give one number each, {tuple(found.shape)}"
            )
        found = found + each.weight * values.to(found)
    return found


def edges(pictures: Tensor) -> Tensor:
    """Returns how steep the brightness is, (B, 1, H, W): Sobel's filters, 0 to about 1."""
    kernel = pictures.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    both = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(pictures.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    # The root of a sum of squares has no gradient at 0; a little under it, it has.
    squares = F.conv2d(padded, both).square().sum(1, keepdim=True)
    return (squares + _STEEP**2).sqrt() - _STEEP


def sized(picture: Tensor, like: Tensor) -> Tensor:
    """Returns a picture (N, C, *) in the size, dtype and place of others."""
    if picture.shape[-2:] == like.shape[-2:]:
        return picture.to(like)
    shape = like.shape[-2:]
    return F.interpolate(picture.to(like), shape, mode="bilinear", antialias=True)


def parse_colour(colour: Any) -> Any:
    """Returns "#rrggbb" as three numbers in −1..1; numbers as they are.

    Raises:
        DiffScalerError: Something else.
    """
    if isinstance(colour, str):
        digits = colour.strip().removeprefix("#")
        if len(digits) == 6 and all(c in "0123456789abcdefABCDEF" for c in digits):
            return [int(digits[i : i + 2], 16) / 127.5 - 1 for i in (0, 2, 4)]
    elif len(colour) == 3:
        return colour
    raise DiffScalerError(f"a colour is '#rrggbb' or three numbers in -1..1, got {shown(colour)}")


def _mean(values: Tensor, where: Tensor | None) -> Tensor:
    """Returns the mean over a picture, or over a part of it, (B, C)."""
    if where is None:
        return values.mean((2, 3))
    mask = sized(where, values)
    return (values * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1e-6)
