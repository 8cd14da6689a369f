"""Latents as a patch embedding takes them, and its outputs as the model has them. Pure tensors.

Letters: R rows, C channels of a latent, f frames, (h, w) its size, p the side of a patch, N tokens
of one row, D the embedding's width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DiffScalerError
from .families import TokenForm

#: A model that takes a list of samples fills each one's tokens up to a multiple of this.
LIST_MULTIPLE = 32
#: Where more tokens may follow those of the latents: reference pictures, or what fills up.
OPEN_ENDED = ("packed2", "packed", "filled")


class Embedding(NamedTuple):
    """A patch embedding, as far as shapes go.

    Attributes:
        name: For messages.
        in_features: C_in of a convolution, C·p·p of a Linear.
        stride: A convolution's; empty for a Linear.
        form: How it sees latents.
    """

    name: str
    in_features: int
    stride: tuple[int, ...]
    form: TokenForm


def pack(x: Tensor, patch: int = 2, order: str = "cpq") -> Tensor:
    """Returns latents (R, C, h, w) as tokens of p×p latents, (R, h/p·w/p, C·p·p).

    Args:
        x: Latents; h and w are multiples of p.
        patch: p.
        order: How a patch's numbers lie: "cpq" channel, row, column; "pqc" row, column, channel.
    """
    count, channels, height, width = x.shape
    x = x.view(count, channels, height // patch, patch, width // patch, patch)
    axes = (0, 2, 4, 1, 3, 5) if order == "cpq" else (0, 2, 4, 3, 5, 1)
    return x.permute(*axes).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns the inverse of `pack` with p = 2, for latents of that height and width."""
    grid: Tensor = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def patch_of(embedding: Embedding, channels: int) -> int:
    """Returns p, given the latents' channels C.

    Raises:
        DiffScalerError: The embedding takes other latents.
    """
    if embedding.stride:
        fits, patch = embedding.in_features == channels, embedding.stride[-1]
    else:
        guessed = math.isqrt(embedding.in_features // channels) if channels else 0
        patch = embedding.form.patch or guessed
        fits = patch * patch * channels == embedding.in_features
    if not fits or not patch:
        per_token = " per token" if not embedding.stride else ""
        raise DiffScalerError(
            f"the control has {channels} channels as latents, but {embedding.name!r} takes "
            f"{embedding.in_features}{per_token}: encode it with the base's own VAE"
        )
    return patch


def embed_input(latents: Tensor, embedding: Embedding) -> Tensor:
    """Returns latents as the embedding takes them; sides are filled up to whole patches.

    Args:
        latents: (R, C, h, w), or (R, C, f, h, w) for one picture per frame.
        embedding: The layer.

    Raises:
        DiffScalerError: Another number of channels or dimensions.
    """
    if latents.ndim not in (4, 5):
        raise DiffScalerError(
            f"control latents are (R, C, h, w) or (R, C, f, h, w), got {tuple(latents.shape)}"
        )
    patch = patch_of(embedding, latents.shape[1])
    x = _filled_up(latents, patch)
    if len(embedding.stride) == 3:
        return x if x.ndim == 5 else x.unsqueeze(2)
    rows = x.shape[0]
    if x.ndim == 5:
        x = x.transpose(1, 2).flatten(0, 1)  # frames fold into the rows
    if embedding.stride:
        return x
    tokens: Tensor = pack(x, patch, embedding.form.order).unflatten(0, (rows, -1))
    return tokens.flatten(1, 2)


def _filled_up(x: Tensor, patch: int) -> Tensor:
    below, beside = -x.shape[-2] % patch, -x.shape[-1] % patch
    if not below and not beside:
        return x
    if x.ndim == 4:
        return F.pad(x, (0, beside, 0, below), mode="replicate")
    return F.pad(x, (0, beside, 0, below, 0, 0), mode="replicate")


def token_mask(mask: Tensor, latents: Tensor, embedding: Embedding, embedded: Tensor) -> Tensor:
    """Returns a mask of pictures as factors on embedded tokens.

    Args:
        mask: (1 or R, 1, H, W) in 0..1, of any size: it is averaged over each token.
        latents: The latents that were embedded.
        embedding: The layer.
        embedded: What came of them.
    """
    mask = mask.to(embedded)
    if embedding.stride:
        factors = F.adaptive_avg_pool2d(mask, (embedded.shape[-2], embedded.shape[-1]))
        if embedded.ndim == 4 and len(factors) > 1:  # frames may fold into the rows
            factors = factors.repeat_interleave(embedded.shape[0] // len(factors), dim=0)
        return factors.unsqueeze(2) if embedded.ndim == 5 else factors
    patch = patch_of(embedding, latents.shape[1])
    height, width = latents.shape[-2:]
    factors = F.adaptive_avg_pool2d(mask, (-(-height // patch), -(-width // patch)))
    factors = factors.flatten(2).transpose(1, 2)
    return factors.repeat(1, embedded.shape[1] // factors.shape[1], 1)


def fitted(added: Tensor, rows: int, y: Tensor, embedding: Embedding) -> Tensor:
    """Returns what an embedding made of R rows, laid as the model has its own tokens.

    One row serves the whole batch, one picture all frames. Tokens that the model has beyond those
    of its latents (filling, reference pictures, which come last) get nothing.

    Args:
        added: From `embed_input` through the layer.
        rows: R.
        y: The layer's output in the model.
        embedding: The layer.

    Raises:
        DiffScalerError: The sizes do not fit.
    """
    kind = embedding.form.kind
    if len(embedding.stride) == 3:
        if added.shape[2] == 1:
            added = added.expand(-1, -1, y.shape[2], -1, -1)
    elif kind == "ncfhw" and 1 < added.shape[0] < y.shape[0]:  # frames fold into the rows
        if added.shape[0] == rows and y.shape[0] % rows == 0:
            added = added.repeat_interleave(y.shape[0] // rows, dim=0)
        elif rows == 1 and y.shape[0] % added.shape[0] == 0:
            added = added.repeat(y.shape[0] // added.shape[0], *[1] * (added.ndim - 1))
    elif kind == "list":
        length = -(-added.shape[1] // LIST_MULTIPLE) * LIST_MULTIPLE
        added = F.pad(added, (0, 0, 0, length - added.shape[1]))
        count = y.shape[0] // length
        added = (added.expand(count, -1, -1) if rows == 1 else added).flatten(0, 1)
    elif y.ndim == 3 and y.shape[1] > added.shape[1]:
        if kind == "packed_frames" and y.shape[1] % added.shape[1] == 0:
            added = added.repeat(1, y.shape[1] // added.shape[1], 1)
        elif kind in OPEN_ENDED:
            added = F.pad(added, (0, 0, 0, y.shape[1] - added.shape[1]))
    if added.shape[1:] != y.shape[1:] or added.shape[0] not in (1, y.shape[0]):
        raise DiffScalerError(
            f"the control was embedded as {tuple(added.shape)}, but {embedding.name!r} of the "
            f"model made {tuple(y.shape)}: give one control picture for all rows or one per row, "
            f"encoded at the size that is drawn"
        )
    return added


def mixed_rows(latents: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Returns rows' latents as one tensor (R, C, …), and which rows have any, (R,) of 1 and 0.

    Args:
        latents: Per row (C, …), or None; not all None.

    Raises:
        DiffScalerError: No row has any, or their shapes differ.
    """
    there = [own for own in latents if own is not None]
    if not there or len({own.shape for own in there}) > 1:
        shapes = sorted({tuple(own.shape) for own in there})
        raise DiffScalerError(f"control rows need latents of one shape, got {shapes or 'none'}")
    full = [torch.zeros_like(there[0]) if own is None else own for own in latents]
    return torch.stack(full), torch.tensor([float(own is not None) for own in latents])
