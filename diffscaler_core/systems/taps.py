"""What a frozen base sees: the outputs of its blocks, pooled over the picture. Reads models only.

Blocks are the children of a model's lists of modules, and a U-Net's middle one, as in `targets`;
so any architecture has them, in diffusers and in ComfyUI alike. Of a block's outputs the picture's
own tokens count, as `token_layout` says where they lie; text tokens and filling are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DiffScalerError, unknown
from ..targets import all_targets, base_layer
from ..token_layout import TokenLayout

#: What a U-Net's middle block is called, in diffusers and in ComfyUI.
MIDDLE = ("mid_block", "middle_block")
_LATE = ("up", "output")  # lists that run after it


class _EnoughError(Exception):
    """All that was asked for has been seen: the rest of the forward is not needed."""


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


def tapped(
    model: nn.Module,
    names: Sequence[str],
    call: Callable[[], object],
    layout: TokenLayout,
    pool: int = 1,
) -> dict[str, Tensor]:
    """Returns what blocks gave in one call of a model, pooled: block -> (B, D·pool·pool), float32.

    The call ends behind the last of the blocks; nothing is left on the model.

    Args:
        model: As in `blocks_of`.
        names: Which blocks, from `block_named`.
        call: Calls the model once.
        layout: Where the picture lies in its tokens, for the latents of that call.
        pool: Features are means over pool × pool parts of the picture.

    Raises:
        DiffScalerError: A block was not run, or gives nothing that is the picture; or the model is
            compiled, and would not heed whoever reads along.
    """
    core = getattr(model, "diffusion_model", model)
    blocks, found = blocks_of(core), dict[str, Tensor]()
    _refuse_compiled(core, [blocks[name] for name in names])

    def reader(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = pooled(name, output, layout, pool)
            if len(found) == len(names):
                raise _EnoughError

        return read

    with ExitStack() as undo:
        for name in names:
            hook = _last(blocks[name]).register_forward_hook(reader(name))
            undo.callback(hook.remove)
        try:
            call()
        except _EnoughError:
            return {name: found[name] for name in names}
    missing = [name for name in names if name not in found]
    raise DiffScalerError(
        f"{type(core).__name__} did not run its block {missing[0]!r}; blocks: {', '.join(blocks)}"
    )


def _refuse_compiled(core: nn.Module, blocks: Sequence[nn.Module]) -> None:
    # not `compiled.check_not_compiled`: this is asked at every step, and that drops compiled code
    for module in (core, *blocks):
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise DiffScalerError(
                f"this {type(core).__name__} is compiled, and compiled code heeds nobody who reads "
                f"its blocks: use the model as it was before torch.compile"
            )


def _last(block: nn.Module) -> nn.Module:
    """Returns the module whose output is a block's: ComfyUI's U-Nets call a sequence's members."""
    while isinstance(block, nn.Sequential) and len(block):
        block = block[-1]
    return block


def pooled(name: str, output: Any, layout: TokenLayout, pool: int = 1) -> Tensor:
    """Returns a block's output as features, (B, D·pool·pool), float32.

    Args:
        name: The block, for messages.
        output: What it gave: a tensor, or several.
        layout: Where the picture lies.
        pool: See `tapped`.

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
    # float32 before the mean, so that half precision loses nothing over thousands of tokens
    return F.adaptive_avg_pool2d(maps[0].float(), pool).flatten(1)


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
