"""The blocks of somebody else's model, and what of a block's output is the picture. Reads only.

Blocks are the children of a model's lists of modules, and a U-Net's middle one, as in `targets`;
so any architecture has them, in diffusers and in ComfyUI alike. Of a block's outputs the picture's
own tokens count, as `token_layout` says where they lie; text tokens and filling are left out.
Nothing is changed but for forward hooks, while a context lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DiffScalerError, unknown
from .targets import all_targets, base_layer
from .token_layout import TokenLayout

#: What a U-Net's middle block is called, in diffusers and in ComfyUI.
MIDDLE = ("mid_block", "middle_block")
_LATE = ("up", "output")  # lists that run after it


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a model's blocks by their names in it, in the order in which they run.

    Args:
        model: A denoiser of diffusers, or ComfyUI's `BaseModel`.

    Raises:
        DiffScalerError: It has none.
    """
    core = getattr(model, "diffusion_model", model)
    core = getattr(core, "_orig_mod", core)
    found: list[tuple[int, str, nn.Module]] = []
    for name, child in core.named_children():
        child = base_layer(child)
        place = 1 if name in MIDDLE else 2 * name.startswith(_LATE)
        if isinstance(child, nn.ModuleList):
            own = [(f"{name}.{i}", base_layer(one)) for i, one in enumerate(child)]
        else:
            own = [(name, child)] if name in MIDDLE else []
        found += [(place, n, one) for n, one in own if next(all_targets(one), None) is not None]
    if not found:
        raise DiffScalerError(f"{type(core).__name__} has no blocks whose outputs could be read")
    return {name: block for _, name, block in sorted(found, key=lambda one: one[0])}


def block_named(model: nn.Module, block: str | int | None = None) -> str:
    """Returns the name of a block.

    Args:
        model: As in `blocks_of`.
        block: Its name, or its number from 0; None: the middle one.

    Raises:
        UnknownNameError: No such block.
    """
    names = list(blocks_of(model))
    if block is None:
        return next((n for n in names if n in MIDDLE), names[(len(names) - 1) // 2])
    if isinstance(block, str) and not block.isdecimal():
        if block not in names:
            raise unknown("block", block, names)
        return block
    if not 0 <= int(block) < len(names):
        raise unknown("block", block, [f"{i} ({name})" for i, name in enumerate(names)])
    return names[int(block)]


@contextlib.contextmanager
def read_outputs(block: nn.Module, reader: Callable[[Any], object]) -> Iterator[None]:
    """Calls the reader with what a block gives, whenever it runs, while the context lasts."""
    # ComfyUI's U-Nets call a sequence's members, never the sequence
    while isinstance(block, nn.Sequential) and len(block):
        block = block[-1]

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        reader(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def picture_of(name: str, output: Any, layout: TokenLayout) -> Tensor:
    """Returns the picture in a block's output, (B, D, rows, columns); of a video, frames' mean.

    Args:
        name: The block, for messages.
        output: What it gave: a tensor, or several.
        layout: Where the picture lies.

    Raises:
        DiffScalerError: Nothing of it is the picture, or nobody can tell which part is.
    """
    given = list(_tensors(output))
    if layout.kind == "unet":
        maps = [t for t in given if t.ndim == 4][:1]
    else:
        exact = [t for t in given if t.ndim == 3 and t.shape[1] in _counts(layout)]
        joint = [t for t in given if t.ndim == 3 and layout.starts("joint", t.shape[1])]
        maps = [_as_map(t, layout) for t in exact or joint[:1]]
    if len(maps) != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in given) or "no tensor"
        why = "as many text tokens as tokens of the picture" if maps else "none is the picture"
        raise DiffScalerError(
            f"block {name!r} gave {shapes}: {why}, which has {layout.image_tokens} tokens; use "
            f"another block or another size"
        )
    return maps[0]


def _counts(layout: TokenLayout) -> tuple[int, ...]:
    return (layout.image_tokens, layout.filled)


def _as_map(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Returns the picture's tokens of (B, N, D) as (B, D, rows, columns), the mean of frames."""
    count = tokens.shape[1]
    exact = count in _counts(layout)
    starts = (0,) if exact else layout.starts("joint", count) or (0,)
    if len(starts) == 1:
        own = tokens[:, starts[0] : starts[0] + layout.image_tokens]
    else:
        rows = zip(tokens, starts, strict=True)
        own = torch.stack([row[start : start + layout.image_tokens] for row, start in rows])
    grid: Tensor = own.transpose(1, 2).unflatten(2, (layout.frames, *layout.grid))
    return grid.mean(2)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
