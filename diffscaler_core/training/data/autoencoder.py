"""A diffusers VAE as two functions, pixels to the model's latents and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoiser import Encode


def vae_encode(vae: Any) -> Encode:
    """Returns the `encode` of a diffusers VAE: the posterior's mode, shifted and scaled.

    The mode, not a draw: latents are encoded once and kept, and a kept draw would be trained on as
    if its noise belonged to the picture.

    Args:
        vae: AutoencoderKL, AutoencoderTiny, AutoencoderDC, …; stays where it is, in its own dtype.
            Of one made for videos (Qwen-Image's), a picture is a video of one frame.
    """
    frames = _takes_frames(vae)

    def encode(pixels: Tensor) -> Tensor:
        pixels = pixels.to(vae.device, vae.dtype)
        output = vae.encode(pixels.unsqueeze(2) if frames else pixels)
        if hasattr(output, "latent_dist"):
            latents = output.latent_dist.mode()
        else:
            latents = output[0]  # "latents" of AutoencoderTiny, "latent" of AutoencoderDC
        latents = latents.squeeze(2) if frames else latents
        shift, scale = _units(vae, latents.device)
        return (latents.float() - shift) * scale  # type: ignore[no-any-return]

    return encode


def vae_decode(vae: Any) -> Encode:
    """Returns the inverse of `vae_encode`: latents -> pixels (B, 3, H, W) in −1..1."""
    frames = _takes_frames(vae)

    def decode(latents: Tensor) -> Tensor:
        shift, scale = _units(vae, latents.device)
        z = (latents / scale + shift).to(vae.device, vae.dtype)
        pixels = vae.decode(z.unsqueeze(2) if frames else z).sample
        pixels = pixels.squeeze(2) if frames else pixels
        return pixels.float().clamp(-1, 1)  # type: ignore[no-any-return]

    return decode


def _takes_frames(vae: Any) -> bool:
    return hasattr(vae.config, "temperal_downsample")  # spelt so in diffusers


def _units(vae: Any, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Returns (shift, scale) of latent = (z − shift)·scale: numbers, or one each per channel."""
    config = vae.config
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return float(getattr(config, "shift_factor", None) or 0.0), scale
    shift = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
    return shift, scale / torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)
