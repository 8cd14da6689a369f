"""What a frozen base sees: the outputs of its blocks, pooled over the picture.

A call ends behind the last block that is looked at, so features cost a part of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import blocks_of, picture_of, read_outputs
from ..errors import DiffScalerError
from ..token_layout import TokenLayout


class _EnoughError(Exception):
    """All that was asked for has been seen: the rest of the forward is not needed."""


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

    def reader(name: str) -> Callable[[Any], None]:
        def read(output: Any) -> None:
            found[name] = pooled(name, output, layout, pool)
            if len(found) == len(names):
                raise _EnoughError

        return read

    with ExitStack() as undo:
        for name in names:
            undo.enter_context(read_outputs(blocks[name], reader(name)))
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


def pooled(name: str, output: Any, layout: TokenLayout, pool: int = 1) -> Tensor:
    """Returns a block's output as features, (B, D·pool·pool), float32.

    Args:
        name: The block, for messages.
        output: What it gave: a tensor, or several.
        layout: Where the picture lies.
        pool: See `tapped`.

    Raises:
        DiffScalerError: See `blocks.picture_of`.
    """
    # float32 before the mean, so that half precision loses nothing over thousands of tokens
    return F.adaptive_avg_pool2d(picture_of(name, output, layout).float(), pool).flatten(1)
