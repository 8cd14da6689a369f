"""Representation alignment (REPA): a block's tokens are drawn towards what an encoder sees.

REPA (arXiv:2410.06940): beside the denoising loss, the hidden states of an early block, seen
through a small projector, are to point where a frozen encoder's tokens of the clean picture point,

    L = L_denoise − λ · mean over rows and tokens of cos(projector(h_d(x_t, t)), z),   λ = 0.5.

There the whole network is trained; here the base is frozen, and only the task's affiners up to that
block (and the projector) can follow, so less is to be expected of it. That the term ends after a
share of the steps, and how wide the projector is, are ours.

Pure tensors: B rows, N tokens of a block on a grid (h, w), D their width; M tokens of the encoder,
Z their width. The projector is trained beside the task, and is no part of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DiffScalerError

#: The projector's hidden width where nobody says: so many times the block's, at most the paper's.
WIDER, WIDEST = 4, 2048
Grid = tuple[int, int]


class Projector(nn.Sequential):
    """D → H → SiLU → H → SiLU → Z, as in the paper's code; Xavier-uniform, biases 0.

    Args:
        width: D.
        hidden: H; 0: four times D, at most 2048.
        out: Z.
        generator: What the start is drawn from.
    """

    def __init__(self, width: int, hidden: int, out: int, generator: torch.Generator) -> None:
        hidden = hidden or min(WIDER * width, WIDEST)
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator
            super().__init__(
                nn.Linear(width, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, out),
            )
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)


def cosines(hidden: Tensor, features: Tensor) -> Tensor:
    """Returns the mean cosine between tokens, per row, (B,), in float32.

    Args:
        hidden: Projected tokens of the block, (B, N, Z).
        features: The encoder's tokens on the same grid, (B, N, Z).
    """
    return F.cosine_similarity(hidden.float(), features.float(), dim=-1).mean(1)


def on_grid(features: Tensor, have: Grid, wanted: Grid) -> Tensor:
    """Returns tokens (B, M, Z) of one grid on another, (B, N, Z): bicubic interpolation."""
    if have == wanted:
        return features
    maps = features.transpose(1, 2).unflatten(2, have).float()
    fitted = F.interpolate(maps, wanted, mode="bicubic", antialias=True)
    return fitted.flatten(2).transpose(1, 2)


def grid_of(count: int, height: int, width: int) -> Grid:
    """Returns the grid that so many tokens of a picture lie on, row by row.

    Args:
        count: Tokens.
        height: Of the picture, in any unit.
        width: Of the picture.

    Raises:
        DiffScalerError: They fill no grid of the picture's shape.
    """
    rows = max(1, round(math.sqrt(count * height / width)))
    if count % rows or not 0.5 <= (count // rows * height) / (rows * width) <= 2:
        raise DiffScalerError(
            f"{count} tokens fill no grid of a picture of {width}x{height}: an encoder for repa "
            f"gives one token per patch, row by row, and none beside them"
        )
    return rows, count // rows


def weight_at(step: int, steps: int, weight: float, until: float) -> float:
    """Returns λ at step number `step` (from 0): `weight` for the first share `until` of them."""
    return weight if step < round(until * steps) else 0.0
