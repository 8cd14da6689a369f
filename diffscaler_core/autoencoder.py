"""A diffusers VAE as two functions, pixels to the model's latents and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Pixels (B, 3, H, W) in −1..1 -> latents (B, C, h, w), or back.
Encode = Callable[[Tensor], Tensor]


def vae_encode(vae: Any, device: torch.device | None = None) -> Encode:
    """Returns the `encode` of a diffusers VAE: the posterior's mode, shifted and scaled.

    The mode, not a draw: latents are encoded once and kept, and a kept draw would be trained on as
    if its noise belonged to the picture.

    Args:
        vae: AutoencoderKL, AutoencoderTiny, AutoencoderDC, …; stays where it is, in its own dtype.
            Of one made for videos (Qwen-Image's), a picture is a video of one frame.
        device: Where it computes, if that is not where its parameters lie.
    """
    frames = _takes_frames(vae)

    def encode(pixels: Tensor) -> Tensor:
        pixels = pixels.to(vae.device if device is None else device, vae.dtype)
        output = vae.encode(pixels.unsqueeze(2) if frames else pixels)
        if hasattr(output, "latent_dist"):
            latents = output.latent_dist.mode()
        else:
            latents = output[0]  # "latents" of AutoencoderTiny, "latent" of AutoencoderDC
        latents = _patched(vae, latents.squeeze(2) if frames else latents)
        shift, scale = _units(vae, latents.device)
        return (latents.float() - shift) * scale

    return encode


def vae_decode(vae: Any) -> Encode:
    """Returns the inverse of `vae_encode`: latents -> pixels (B, 3, H, W) in −1..1."""
    frames = _takes_frames(vae)

    def decode(latents: Tensor) -> Tensor:
        shift, scale = _units(vae, latents.device)
        z = _unpatched(vae, latents / scale + shift).to(vae.device, vae.dtype)
        pixels = vae.decode(z.unsqueeze(2) if frames else z).sample
        pixels = pixels.squeeze(2) if frames else pixels
        return pixels.float().clamp(-1, 1)  # type: ignore[no-any-return]

    return decode


def _takes_frames(vae: Any) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def _normalises_patches(vae: Any) -> bool:
    """Says whether this is FLUX.2's VAE, whose latents are 2×2 patches under a batch norm."""
    return hasattr(vae, "bn") and hasattr(vae.config, "batch_norm_eps")


def _patched(vae: Any, latents: Tensor) -> Tensor:
    if not _normalises_patches(vae):
        return latents
    return nn.functional.pixel_unshuffle(latents, 2)


def _unpatched(vae: Any, latents: Tensor) -> Tensor:
    if not _normalises_patches(vae):
        return latents
    return nn.functional.pixel_shuffle(latents, 2)


def _units(vae: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Returns (shift, scale) of latent = (z − shift)·scale: numbers, or one each per channel."""
    config = vae.config
    if _normalises_patches(vae):
        variance = vae.bn.running_var.float() + config.batch_norm_eps
        mean, std = vae.bn.running_mean.float(), variance.sqrt()
        return _per_channel(mean, device), 1 / _per_channel(std, device)
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    mean, std = (_statistics(vae, name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return float(getattr(config, "shift_factor", None) or 0.0), scale
    return _per_channel(mean, device), scale / _per_channel(std, device)


def _statistics(vae: Any, name: str) -> Any:
    """Returns a VAE's numbers per channel, which LTX's has as buffers, or None."""
    listed = getattr(vae.config, name, None)
    return dict(vae.named_buffers(recurse=False)).get(name) if listed is None else listed


def _per_channel(values: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(values).to(device, torch.float32).view(-1, 1, 1)
