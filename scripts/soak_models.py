"""Files for the soak: a second base, tasks that fit it, and files that nothing can load."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from diffscaler_core import new_task, save_task

#: The pocket base's widths of prompts and latents, so that its words serve both.
_SHARED = {"in_channels": 16, "joint_attention_dim": 64, "pooled_projection_dim": 64}


def write_files(models: Path) -> Path:
    """Writes into a folder: tiny.safetensors, tiny_a and tiny_b, broken and loha; returns it."""
    from diffusers import SD3Transformer2DModel  # takes seconds, and only this needs it

    for folder in ("diffusion_models", "diffscaler", "loras"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tiny = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=16,
        **_SHARED,
    ).requires_grad_(False)
    weights = {name: tensor.contiguous() for name, tensor in tiny.state_dict().items()}
    save_file(weights, models / "diffusion_models" / "tiny.safetensors")
    for seed, name in enumerate(("tiny_a", "tiny_b")):
        generator = torch.Generator().manual_seed(seed)
        task = new_task(tiny, rank=2, name=name)
        layers = {
            layer: {
                part: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
                for part, tensor in tensors.items()
            }
            for layer, tensors in task.layers.items()
        }
        save_task(task.replace(layers=layers), models / "diffscaler" / f"{name}.safetensors")
    (models / "diffscaler" / "broken.safetensors").write_bytes(b"nothing")
    name = "lora_unet_joint_blocks_0_x_block_attn_proj"
    loha = {f"{name}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    save_file(loha, models / "loras" / "loha.safetensors")
    return models
