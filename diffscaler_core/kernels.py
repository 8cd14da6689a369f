"""One CUDA kernel for what follows the product with D: activation, strengths, U, shift and scale.

Without it these are three or four kernels that write the layer's output to memory, and read it
again, in between. Written in Triton, which comes with torch for CUDA; never used unless asked for
(`use_kernels`, or DIFFSCALER_KERNELS=1 in the environment), because it has been run in Triton's
interpreter alone so far: no time of it on a GPU is known. Its twin is `forms.apply_form`.

Letters as in `forms.py`; T tokens of one row.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .errors import DiffScalerError
from .forms import WIDE, Form

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without CUDA, or for another kind of GPU
    triton = None

#: Tokens and channels that one program of the kernel takes.
_TOKENS, _CHANNELS = 64, 64
_enabled = os.environ.get("DIFFSCALER_KERNELS", "") == "1"


def use_kernels(enabled: bool = True) -> None:
    """Lets CUDA layers outside of compiled code run the kernel, in the whole process.

    Raises:
        DiffScalerError: Triton is not installed.
    """
    global _enabled
    if enabled and triton is None:
        raise DiffScalerError("the kernels need Triton, which this torch came without")
    _enabled = enabled


def serves(x: Tensor, y: Tensor, form: Form) -> bool:
    """Says whether the kernel is wanted for a Linear's call, and able to do it."""
    if not _enabled or triton is None or not (y.is_cuda or _is_interpreted()):
        return False
    if form.down is None or form.floor is not None or y.dtype == torch.float64:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def finish(product: Tensor, y: Tensor, form: Form, masked: bool = True) -> Tensor:
    """Returns what `apply_form` does with a Linear, given D x: rounded once, from 32 bits.

    Args:
        product: D x, (…, R), gathered (B, T, M·R); activated already or not.
        y: The layer's output, (…, C_out); not modified.
        form: As there, without floors.
        masked: As there.
    """
    assert form.up is not None
    rows = form.rows or 1
    channels = y.shape[-1]
    own = y.reshape(rows, -1, channels).contiguous()
    hidden = product.reshape(rows, own.shape[1], -1).contiguous()
    chosen = form.chosen
    if form.is_by_row and chosen is None:
        chosen = torch.arange(rows, device=y.device)
    rank = form.up.shape[1]
    places = hidden.shape[-1] // rank
    out = torch.empty_like(own)
    # strides of U: the task, the hidden unit, the channel
    if chosen is None:
        strides = (0, form.up.stride(1), form.up.stride(0))
    else:
        strides = (form.up.stride(0), form.up.stride(1), form.up.stride(2))
    gain, offset, mask = form.gain, form.offset, form.mask if masked else None
    grid = (triton.cdiv(own.shape[1], _TOKENS), triton.cdiv(channels, _CHANNELS), rows)
    _finish[grid](
        own, hidden, form.up, out,
        own if gain is None else gain, own if offset is None else offset,
        own if mask is None else mask, hidden if chosen is None else chosen,
        own.shape[1], channels, *strides,
        0 if gain is None or gain.ndim == 1 else gain.stride(0),
        0 if offset is None or offset.ndim == 1 else offset.stride(0),
        0 if mask is None or mask.ndim == 1 else mask.stride(0),
        RANK=rank, PLACES=places, RANK_BLOCK=max(16, triton.next_power_of_2(rank)),
        HAS_GAIN=gain is not None, HAS_OFFSET=offset is not None, HAS_MASK=mask is not None,
        GATHERED=chosen is not None, RELU=not form.linear, ONE_IN_GAIN=y.dtype in WIDE,
        TOKENS=_TOKENS, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return out.view(y.shape)


def _finish_kernel(
    y: Any, hidden: Any, up: Any, out: Any, gain: Any, offset: Any, mask: Any, chosen: Any,
    tokens: Any, channels: Any, up_task: Any, up_unit: Any, up_channel: Any,
    gain_row: Any, offset_row: Any, mask_row: Any,
    RANK: tl.constexpr, PLACES: tl.constexpr, RANK_BLOCK: tl.constexpr,
    HAS_GAIN: tl.constexpr, HAS_OFFSET: tl.constexpr, HAS_MASK: tl.constexpr,
    GATHERED: tl.constexpr, RELU: tl.constexpr, ONE_IN_GAIN: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    unit = tl.arange(0, RANK_BLOCK)
    is_token, is_channel, is_unit = token < tokens, channel < channels, unit < RANK
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for place in range(PLACES):
        at = (row * tokens + token[:, None]) * (PLACES * RANK) + place * RANK + unit[None, :]
        # in 32 bits: the sum over a rank is short, and its time is that of reading y anyhow
        h = tl.load(hidden + at, mask=is_token[:, None] & is_unit[None, :], other=0.0)
        h = h.to(tl.float32)
        if RELU:
            h = tl.maximum(h, 0.0)
        if HAS_MASK:
            strength = tl.load(mask + row * mask_row + place * RANK + unit, mask=is_unit, other=0.0)
            h = h * strength[None, :].to(tl.float32)
        task = 0
        if GATHERED:
            task = tl.load(chosen + row * PLACES + place)
        at = task * up_task + unit[:, None] * up_unit + channel[None, :] * up_channel
        u = tl.load(up + at, mask=is_unit[:, None] & is_channel[None, :], other=0.0)
        total += tl.dot(h, u.to(tl.float32), input_precision="ieee")
    if HAS_OFFSET:
        own = tl.load(offset + row * offset_row + channel, mask=is_channel, other=0.0)
        total += own[None, :].to(tl.float32)
    at = (row * tokens + token[:, None]) * channels + channel[None, :]
    is_there = is_token[:, None] & is_channel[None, :]
    own = tl.load(y + at, mask=is_there, other=0.0).to(tl.float32)
    if HAS_GAIN:
        factor = tl.load(gain + row * gain_row + channel, mask=is_channel, other=0.0)
        total += own * factor[None, :].to(tl.float32)
        if not ONE_IN_GAIN:
            total += own
    else:
        total += own
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_there)


_finish: Any = None if triton is None else triton.jit(_finish_kernel)
