"""Coarse pictures to refine: blurred, shrunk, or through heavy JPEG. Knows pixels; no models.

DiffuseVAE (arXiv:2201.00308) has a diffusion model refine the blurry picture of a VAE. Of its two
forms this serves the first, in which the process stays the base's own and the network is shown the
coarse picture besides: here as a control picture. That any coarse picture does in place of a VAE's,
and the three ways to make one, are ours.

Pixels are (channels, H, W) in −1..1, and so is what is made of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DiffScalerError, unknown
from ..randomness import generator_for

#: How far a blur of strength 1 reaches (three standard deviations), as a share of the shorter side.
REACH = 0.15
#: How many times smaller a picture of strength 1 was; of strength 0 it is as large as it is.
TIMES = 12
#: JPEG's quality at strengths 0 and 1.
QUALITY = (30, 1)
#: The least strength that is drawn, as a share of the largest.
LEAST = 0.25
#: Of what is made; another number finds none of what is cached.
VERSION = 1


def blurred(pixels: Tensor, reach: float) -> Tensor:
    """Returns the picture blurred (Gauss).

    Args:
        pixels: (channels, H, W) in −1..1.
        reach: Three standard deviations, as a share of the shorter side.
    """
    radius = max(1, round(reach * min(pixels.shape[-2:])))
    steps = torch.arange(-radius, radius + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (3 * steps / radius) ** 2)
    weights = weights / weights.sum()
    rows = F.pad(pixels.float()[:, None], (radius,) * 4, mode="replicate")
    rows = F.conv2d(rows, weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1))[:, 0].clamp(-1, 1)


def shrunk(pixels: Tensor, times: float) -> Tensor:
    """Returns the picture at its own size, as so many times fewer pixels a side would show it."""
    height, width = pixels.shape[-2:]
    small = (max(1, round(height / times)), max(1, round(width / times)))
    few = F.interpolate(pixels.float()[None], small, mode="area")
    return F.interpolate(few, (height, width), mode="bicubic", antialias=False)[0].clamp(-1, 1)


def through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Returns what a JPEG file of that quality (1 to 95) holds of the picture."""
    import numpy as np
    from PIL import Image

    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(values.movedim(0, -1).squeeze(-1).numpy()))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    held = torch.from_numpy(np.array(Image.open(file))).view(*values.shape[1:], -1)
    return held.movedim(-1, 0).to(pixels.device).float() / 127.5 - 1


def _jpeg(pixels: Tensor, strength: float) -> Tensor:
    best, worst = QUALITY
    return through_jpeg(pixels, round(best + (worst - best) * strength))


#: Kind -> (pixels, strength 0 to 1) -> coarse pixels.
KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "blur": lambda pixels, strength: blurred(pixels, REACH * strength),
    "low_resolution": lambda pixels, strength: shrunk(pixels, 1 + (TIMES - 1) * strength),
    "jpeg": _jpeg,
}


@dataclass(frozen=True)
class Coarse:
    """Makes a coarse picture of one; each picture has a kind and a strength of its own.

    Attributes:
        strength: The largest strength, above 0, at most 1; a quarter of it is the least.
        kinds: Names in KINDS, drawn from evenly.
    """

    strength: float = 1.0
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if not 0 < self.strength <= 1:
            raise DiffScalerError(
                f"the strength of coarse pictures (control_strength) must be above 0 and at most "
                f"1, got {self.strength}"
            )
        if not self.kinds:
            raise DiffScalerError(f"name at least one kind of coarse picture of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind of coarse picture", kind, KINDS)

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """Returns a coarse picture, (channels, H, W): a function of picture and seed alone."""
        which, much = torch.rand(2, generator=generator_for(seed, "coarse")).tolist()
        kind = self.kinds[min(int(which * len(self.kinds)), len(self.kinds) - 1)]
        return KINDS[kind](pixels, self.strength * (LEAST + (1 - LEAST) * much))

    @property
    def key(self) -> str:
        """What names it in a cache."""
        return f"refine {VERSION} {self.strength:g} {' '.join(self.kinds)}"
