"""The transformer that benchmarks run on: diffusers' DiT at its published sizes."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel

#: Blocks, heads, width of a head.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "XL": (28, 16, 72)}


def base_model(device: str, size: str = "S") -> DiTTransformer2DModel:
    """Returns a frozen DiT (patches of 2, 256 tokens) with random weights."""
    layers, heads, width = SIZES[size]
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return model.to(device).eval().requires_grad_(False)
