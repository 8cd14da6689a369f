"""The blocks of somebody else's model, and the tokens of the picture that one of them gives.

Found as presets find targets (`targets.in_preset`): a block is an entry of a list right below the
model. Nothing is changed but for a forward hook, while a context lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import DiffScalerError
from .alignment import Grid

#: The paper's block 8 of SiT-XL/2's 28, as a share: where nobody says which.
EARLY = 8 / 28
_PATCHES = (1, 2, 4, 8)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the model's repeated blocks, in the order they stand in it.

    A ComfyUI model's lie one level deeper (`diffusion_model`).
    """
    inner = getattr(model, "diffusion_model", None)
    if isinstance(inner, nn.Module):
        return blocks_of(inner)
    lists = (child for child in model.children() if isinstance(child, nn.ModuleList))
    return [block for blocks in lists for block in blocks]


def block_number(model: nn.Module, said: int) -> int:
    """Returns which block (from 1) is meant; 0: the one as early as the paper's.

    Raises:
        DiffScalerError: The model has no such block.
    """
    count = len(blocks_of(model))
    if not count:
        raise DiffScalerError(f"{type(model).__name__} has no list of blocks for repa to look into")
    if said > count:
        raise DiffScalerError(f"repa_block {said}: {type(model).__name__} has {count} blocks")
    return said or max(1, round(EARLY * count))


@contextlib.contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[Any]]:
    """Gives a list that holds what the block gave, call by call, while the context lasts."""
    found: list[Any] = []
    handle = block.register_forward_hook(lambda module, given, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def picture_tokens(output: Any, latents: Tensor, patch: int | None) -> tuple[Tensor, Grid]:
    """Returns a block's tokens of the picture, (B, N, D), and their grid.

    Args:
        output: What the block gave: a tensor, or several, one of which is the picture's.
        latents: What the model was given, (B, C, h, w).
        patch: Side of a patch in latents; None: unknown.

    Raises:
        DiffScalerError: None of them, or more than one, has the picture's number of tokens.
    """
    if latents.ndim != 4:
        raise DiffScalerError("repa looks at pictures; this base draws videos")
    given = output if isinstance(output, (tuple, list)) else (output,)
    fits: list[tuple[Tensor, Grid]] = []
    for one in given:
        if isinstance(one, Tensor) and (own := _of_picture(one, latents, patch)) is not None:
            fits.append(own)
    if len(fits) != 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in given if isinstance(one, Tensor))
        raise DiffScalerError(
            f"repa found {'no' if not fits else 'no single'} output of the picture's size among "
            f"what the block gave ({shapes}) for latents of {tuple(latents.shape)}: choose another "
            f"repa_block"
        )
    return fits[0]


def patch_side(model: nn.Module) -> int | None:
    """Returns the side of a patch in latents as the model says it, None if it does not."""
    inner = getattr(model, "diffusion_model", model)
    config = getattr(inner, "config", None)
    said = getattr(inner if config is None else config, "patch_size", None)
    said = said[-1] if isinstance(said, (tuple, list)) and said else said
    return said if isinstance(said, int) and said > 0 else None


def _of_picture(one: Tensor, latents: Tensor, patch: int | None) -> tuple[Tensor, Grid] | None:
    rows, _, height, width = latents.shape
    if one.shape[0] != rows:
        return None
    if one.ndim == 4:
        return one.flatten(2).transpose(1, 2), (int(one.shape[2]), int(one.shape[3]))
    # where the pipeline packs latents, two by two, the model says 1
    for side in _PATCHES if patch is None else (1, 2) if patch == 1 else (patch,):
        grid = (-(-height // side), -(-width // side))
        if one.ndim == 3 and one.shape[1] == grid[0] * grid[1]:
            return one, grid
    return None
