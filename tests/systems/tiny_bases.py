"""Tiny real bases of diffusers' own classes, with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from diffscaler_core import TaskAdapter


class Pipe:
    """What is read of a pipeline."""

    def __init__(self, scheduler: Any, transformer: Any = None, unet: Any = None) -> None:
        self.scheduler, self.transformer, self.unet, self.vae = scheduler, transformer, unet, None


def sd3_pipe() -> Pipe:
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
        joint_attention_dim=12, pooled_projection_dim=10, pos_embed_max_size=8,
    )  # fmt: skip
    return Pipe(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), model.eval())


def dit_pipe() -> Pipe:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    return Pipe(scheduler, model.eval())


def unet_pipe() -> Pipe:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return Pipe(diffusers.DDPMScheduler(), unet=model.eval())


PIPES = {"sd3": sd3_pipe, "dit": dit_pipe, "unet2d": unet_pipe}


def words_of() -> TaskAdapter:
    """Returns stored prompts for the tiny SD3, the empty one among them."""
    generator = torch.Generator().manual_seed(3)
    conditioning = {
        "context": torch.randn(2, 3, 12, generator=generator),
        "pooled": torch.randn(2, 10, generator=generator),
    }
    info = {"name": "words", "method": "prompts", "prompts": ["", "red"]}
    return TaskAdapter({}, info, conditioning)
