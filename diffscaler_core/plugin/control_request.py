"""One control that a user asked for, and how its pictures become what the denoiser's call needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..affiner import PARTS
from ..attach import Weight
from ..autoencoder import Encode, vae_encode
from ..control import Control
from ..errors import DiffScalerError
from ..pictures import Size, covered, cut_to
from ..tokens import mixed_rows
from .call import Call, Same, spread, unconditional_rows

#: Where pipelines say how many pixels a latent has along a side.
_FACTORS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")


@dataclass(eq=False)
class ControlRequest:
    """What a user asked for.

    Attributes:
        name: The task.
        pipe: Whose VAE and scheduler are asked.
        pictures: From `as_picture`, or latents; one per prompt, None for none.
        shared: True: there is one, for all prompts.
        strength: Factor on the task's own strength.
        window: (start, end), as shares of the steps.
        mask: (1, 1, H, W), or None.
        in_uncond: False: the unconditional half has no control.
        as_latents: The pictures are latents.
        images: Pictures per prompt, or None: ask the running pipeline.
    """

    name: str
    pipe: Any
    pictures: Sequence[Any]
    shared: bool
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    mask: Tensor | None = None
    in_uncond: bool = True
    as_latents: bool = False
    images: int | None = None
    _encoded: dict[Size, list[Tensor | None]] = field(default_factory=dict, init=False)
    _controls: dict[Any, Control | None] = field(default_factory=dict, init=False)

    def situation(self, call: Call) -> Any:
        """Returns what decides the control in a call; None: the task rests. Cheap, every call."""
        if self.window != (0.0, 1.0):
            start, end = self.window
            done = call.progress(self.pipe.scheduler)
            # what is divided and compared must not miss its step by the last digit
            if done < start - 1e-6 or (end < 1.0 and done >= end - 1e-6):
                return None
        unconditional = None if self.in_uncond else call.is_unconditional
        return (Same(self), call.layout, unconditional)

    def weight(self, own: Weight) -> Weight:
        """Returns the strength of the task, given its own."""
        if isinstance(own, Mapping):
            return {part: float(own.get(part, 1.0)) * self.strength for part in PARTS}
        return float(own) * self.strength

    @torch.no_grad()
    def control(self, call: Call, region: Tensor | None = None) -> Control | None:
        """Returns the control for the batch of a call, or None if no row has any.

        Args:
            call: The call.
            region: Where the task acts, (1 or batch, 1, H, W) in 0..1, or None for everywhere.
        """
        count = 0 if self.shared else len(self.pictures)
        entries, halves = spread(count, self.images, call, "diffscaler_control", "pictures")
        absent = [False] * call.batch if self.in_uncond else unconditional_rows(call, halves)
        size = call.size()
        key = (size, tuple(entries), tuple(absent), Same(region))
        if key not in self._controls:
            if len(self._controls) > 4:
                self._controls.clear()
            self._controls[key] = self._built(size, entries, absent, region)
        return self._controls[key]

    def _built(
        self, size: Size, entries: list[int], absent: list[bool], region: Tensor | None
    ) -> Control | None:
        encoded = self._latents(size)
        kept = [
            encoded[e] is not None and not gone for e, gone in zip(entries, absent, strict=True)
        ]
        there = next((own for own in encoded if own is not None), None)
        if there is None or not any(kept):
            return None
        rows = None if all(kept) else torch.tensor([float(k) for k in kept])
        if self.shared:
            latents = there
        else:
            own = [encoded[e] for e in entries]
            latents, _ = mixed_rows([None if t is None else t[0] for t in own])
        mask = None if self.mask is None else covered(self.mask, self._pixels(size)).clamp(0, 1)
        if region is not None:
            place = F.adaptive_avg_pool2d(region, self._pixels(size))
            mask = place if mask is None else place * mask
            latents = latents.expand(max(len(latents), len(place)), *latents.shape[1:])
        return Control(latents, rows, mask)

    def _latents(self, size: Size) -> list[Tensor | None]:
        """Returns the pictures as latents (1, C, h, w), encoded once per size.

        One at a time, so that a picture's latents do not depend on its neighbours.
        """
        if size not in self._encoded:
            encode = self._given if self.as_latents else encoder_of(self.pipe)
            known: dict[int, Tensor] = {}
            found: list[Tensor | None] = []
            with vae_at_work(None if self.as_latents else getattr(self.pipe, "vae", None)):
                for picture in self.pictures:
                    if picture is not None and id(picture) not in known:
                        pixels = picture if self.as_latents else cut_to(picture, self._pixels(size))
                        known[id(picture)] = _of_size(encode(pixels), size)
                    found.append(None if picture is None else known[id(picture)])
            self._encoded = {size: found}  # of one size at a time: a sampling has one
        return self._encoded[size]

    def _given(self, latents: Tensor) -> Tensor:
        return latents

    def _pixels(self, size: Size) -> Size:
        factor = 1 if self.as_latents else pixels_per_latent(self.pipe)
        return size[0] * factor, size[1] * factor


def encoder_of(pipe: Any) -> Encode:
    """Returns what encodes a pipeline's control pictures, pixels (1, 3, H, W) -> latents.

    Raises:
        DiffScalerError: It has no VAE, and its model draws no pixels.
    """
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        # under the hooks that offload, it does not compute where it lies
        hooked = hasattr(vae, "_hf_hook") or hasattr(vae, "_diffusers_hook")
        return vae_encode(vae, pipe._execution_device if hooked else None)
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if getattr(getattr(model, "config", None), "in_channels", None) == 3:
        return lambda pixels: pixels  # the model's latents are pixels
    raise DiffScalerError(
        f"this {type(pipe).__name__} has no VAE to encode a control picture with: give it one, or "
        f"pass latents with as_latents=True"
    )


@contextmanager
def vae_at_work(vae: Any) -> Iterator[None]:
    """Lets a VAE encode as its pipelines do, then puts it back to where it rested."""
    if vae is None:
        yield
        return
    half = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if half:  # SDXL's overflows in float16
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if half:
            vae.to(dtype=torch.float16)
        hook: Any = getattr(vae, "_hf_hook", None)
        if hasattr(hook, "prev_module_hook"):  # accelerate's CpuOffload, which stays where it ran
            hook.init_hook(vae)


def pixels_per_latent(pipe: Any) -> int:
    """Returns how many pixels a latent of the model has along a side."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return 1
    factor = next((int(getattr(pipe, n)) for n in _FACTORS if getattr(pipe, n, None)), None)
    if factor is None:
        channels = getattr(vae.config, "block_out_channels", None)
        channels = channels or vae.config.encoder_block_out_channels
        factor = int(2 ** (len(channels) - 1))
    return 2 * factor if hasattr(vae, "bn") else factor  # FLUX.2's latents are patches


def _of_size(latents: Tensor, size: Size) -> Tensor:
    if latents.shape[-2:] != size:
        raise DiffScalerError(
            f"a control's latents are {latents.shape[-2]}x{latents.shape[-1]} (height x width), "
            f"but {size[0]}x{size[1]} are drawn: encode it at the size that is drawn"
        )
    return latents
