"""Where the picture's places are in a model's tokens: what differs from family to family. Pure.

Letters: f frames, (h, w) the size of the latents, p the side of a patch in latents.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import FAMILIES, Family
from .targets import component_of, geometry_of, resolve
from .tokens import LIST_MULTIPLE, OPEN_ENDED

_HOST_PREFIX = "diffusion_model."  # before every layer's name in ComfyUI
#: Roles of all layers of an architecture that nobody knows: only what fits exactly is the picture.
UNKNOWN_ROLES = ((".*", "either"),)

#: A layer's role -> what its tokens are.
ROLES = {
    "image": "image tokens, with reference pictures and filling if there are any",
    "joint": "image and text tokens in one run, in the order `TokenLayout.text` says",
    "either": "called once with image tokens, once with text tokens, told apart by their number",
    "list": "image tokens with their filling, of all rows in one run of vectors",
    "mean": "text tokens, time or pooled vectors, or tokens in an order nobody knows",
}


@dataclass(frozen=True)
class TokenLayout:
    """Where the picture's places are in a model's tokens, for latents of one size.

    Attributes:
        frames: f as tokens: a video's latent frames, divided by the model's temporal patch.
        height: h.
        width: w.
        patch: p of a transformer; 1 for a U-Net.
        text: Where text tokens lie in layers of the role "joint": "first", "last" or "".
        kind: "transformer", or "unet" (tokens and positions at several resolutions, each half of
            the one before).
        roles: (pattern of layer names, role in ROLES), the first that matches counts; a layer that
            none matches is "image".
        references: Where reference pictures, or filling up to a length nobody told, lie beside the
            image's tokens: "first", "last", or "" if there are none.
        multiple: The image's tokens are filled up to a multiple of this.
        text_lengths: How many text tokens each row has, or one number for all rows; needed where
            image tokens follow texts of different lengths at once, or where references come last
            and text first. Empty: as many as remain.
    """

    frames: int
    height: int
    width: int
    patch: int = 1
    text: str = ""
    kind: str = "transformer"
    roles: tuple[tuple[str, str], ...] = ()
    references: str = ""
    multiple: int = 1
    text_lengths: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in one frame; what a patch overhangs counts as one."""
        return -(-self.height // self.patch), -(-self.width // self.patch)

    @property
    def image_tokens(self) -> int:
        """How many image tokens one row has, of all frames."""
        rows, columns = self.grid
        return self.frames * rows * columns

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Sizes of a U-Net's feature maps, from that of the latents down to one position."""
        sizes = [(self.height, self.width)]
        while sizes[-1] != (1, 1):
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return tuple(sizes)

    @property
    def filled(self) -> int:
        """How many tokens those of the image are filled up to."""
        return -(-self.image_tokens // self.multiple) * self.multiple

    def starts(self, role: str, n: int) -> tuple[int, ...] | None:
        """Returns the first image token of each row, or of all rows, among n tokens a row.

        None: so many tokens cannot be.
        """
        room = n - self.filled
        if room < 0 or (room > 0 and role != "joint" and not self.references):
            return None
        if self.references == "first":
            return (room,)
        if role == "joint" and self.text == "first":
            longest = max(self.text_lengths, default=0)
            return (self.text_lengths or (room,)) if longest <= room else None
        return (0,)

    def role(self, name: str) -> str:
        """Returns the role of a layer, by its name below the model."""
        name = name.removeprefix(_HOST_PREFIX)
        for pattern, role in self.roles:
            if re.fullmatch(pattern, name):
                return role
        return "image"


def layout_of(
    model: nn.Module, size: Sequence[int], text_lengths: Sequence[int] = ()
) -> TokenLayout:
    """Returns where the picture's places are in the tokens of a denoiser of diffusers.

    Args:
        model: The denoiser; of an unknown class, only layers with exactly as many tokens as the
            picture has are taken for seeing the picture.
        size: (h, w) of the latents, or (f, h, w) of a video's, before any packing into tokens.
        text_lengths: See `TokenLayout`.
    """
    family = next((f for f in FAMILIES.values() if type(model).__name__ in f.classes), None)
    frames, height, width = (1, *size)[-3:]
    if component_of(model) == "unet":
        roles = tuple(FAMILIES["unet2d_condition"].token_roles.items())
        return TokenLayout(frames, height, width, kind="unet", roles=roles)
    temporal, patch = _patch(model, family)
    frames = -(-frames // temporal)
    if family is None:
        return TokenLayout(frames, height, width, patch, roles=UNKNOWN_ROLES)
    return TokenLayout(
        frames,
        height,
        width,
        patch,
        text=family.text,
        roles=tuple(family.token_roles.items()),
        references="last" if family.tokens in OPEN_ENDED else "",
        multiple=LIST_MULTIPLE if family.tokens == "list" else 1,
        text_lengths=tuple(text_lengths),
    )


def _patch(model: Any, family: Family | None) -> tuple[int, int]:
    """Returns how many frames, and how many latents to a side, one token stands for."""
    config = getattr(model, "config", None)
    temporal = getattr(config, "patch_size_t", None) or 1
    if family is None:
        patch = getattr(config, "patch_size", 1)
        return temporal, patch if isinstance(patch, int) else patch[-1]
    geometry = geometry_of(resolve(model, family.embed))
    if geometry is None:
        return temporal, family.patch
    return geometry.stride[0] if len(geometry.stride) == 3 else temporal, geometry.stride[-1]
