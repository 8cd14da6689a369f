"""The transformer that benchmarks run on: diffusers' DiT at its published sizes."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

#: Blocks, heads, width of a head.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "XL": (28, 16, 72)}


def base_model(device: str, size: str = "S", blocks: int | None = None) -> DiTTransformer2DModel:
    """Returns a frozen DiT (patches of 2, 256 tokens) with random weights.

    Args:
        device: Where it is to run.
        size: A name in SIZES.
        blocks: How many blocks; None: as published.
    """
    layers, heads, width = SIZES[size]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        out_channels=8,
        num_layers=layers if blocks is None else blocks,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model.to(device).eval().requires_grad_(False)


def inputs_of(batch: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns the arguments of a call: random latents at one timestep, a class a row."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 32, 32, generator=generator).to(device, dtype),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": torch.arange(batch, device=device),
    }
