"""Every family's denoiser at tiny size: diffusers' own class and a configuration."""

from typing import Any

import diffusers as d
import torch
from torch import nn

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
UNET = dict(
    sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
    layers_per_block=1,
)  # fmt: skip
TEXT_UNET = dict(
    UNET, cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd3": (
        d.SD3Transformer2DModel,
        dict(
            SMALL, sample_size=16, patch_size=2, in_channels=4, out_channels=4,
            caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
            pos_embed_max_size=16,
        ),
    ),
    "flux": (
        d.FluxTransformer2DModel,
        dict(
            HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=[4, 4, 8],
        ),
    ),
    "flux2": (
        d.Flux2Transformer2DModel,
        dict(
            HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        ),
    ),
    "pixart": (
        d.PixArtTransformer2DModel,
        dict(
            num_attention_heads=3, attention_head_dim=8, num_layers=2, patch_size=2,
            cross_attention_dim=24, caption_channels=12, in_channels=4, out_channels=8,
            sample_size=16, use_additional_conditions=False,
        ),
    ),
    "dit": (
        d.DiTTransformer2DModel,
        dict(
            SMALL, sample_size=8, patch_size=2, in_channels=4, out_channels=8,
            num_embeds_ada_norm=1000,
        ),
    ),
    "sana": (
        d.SanaTransformer2DModel,
        dict(
            SMALL, in_channels=4, out_channels=4, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
            sample_size=16, patch_size=1,
        ),
    ),
    "lumina2": (
        d.Lumina2Transformer2DModel,
        dict(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
            num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
            axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=12,
        ),
    ),
    "z_image": (
        d.ZImageTransformer2DModel,
        dict(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
    ),
    "qwen_image": (
        d.QwenImageTransformer2DModel,
        dict(
            HEADS, patch_size=2, in_channels=16, out_channels=4, num_layers=2,
            joint_attention_dim=12, axes_dims_rope=(8, 4, 4),
        ),
    ),
    "hunyuan_dit": (
        d.HunyuanDiT2DModel,
        dict(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8,
            num_attention_heads=3, in_channels=4, cross_attention_dim=12,
            cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=24,
            activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=True,
            text_len=5, text_len_t5=5,
        ),
    ),
    "auraflow": (
        d.AuraFlowTransformer2DModel,
        dict(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
            num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=256,
        ),
    ),
    "cogview4": (
        d.CogView4Transformer2DModel,
        dict(
            SMALL, patch_size=2, in_channels=4, out_channels=4, text_embed_dim=12,
            time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
        ),
    ),
    "cogvideox": (
        d.CogVideoXTransformer3DModel,
        dict(
            SMALL, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
            sample_width=12, sample_height=8, sample_frames=9, max_text_seq_length=7,
        ),
    ),
    "wan": (
        d.WanTransformer3DModel,
        dict(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, in_channels=4,
            out_channels=4, text_dim=12, freq_dim=16, ffn_dim=24, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
    ),
    "ltx_video": (
        d.LTXVideoTransformer3DModel,
        dict(SMALL, in_channels=6, out_channels=6, cross_attention_dim=16, caption_channels=12),
    ),
    "hunyuan_video": (
        d.HunyuanVideoTransformer3DModel,
        dict(
            HEADS, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 6, 6),
        ),
    ),
    "chroma": (
        d.ChromaTransformer2DModel,
        dict(
            HEADS, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            joint_attention_dim=12, axes_dims_rope=[4, 4, 8], approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1,
        ),
    ),
    "hidream": (
        d.HiDreamImageTransformer2DModel,
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
            attention_head_dim=8, num_attention_heads=2, caption_channels=[12, 12],
            text_emb_dim=10, num_routed_experts=2, num_activated_experts=1,
            axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=[0, 1],
        ),
    ),
    "sd15": (
        d.UNet2DConditionModel,
        TEXT_UNET,
    ),
    "sdxl": (
        d.UNet2DConditionModel,
        dict(
            TEXT_UNET, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34,
        ),
    ),
    "unet2d": (
        d.UNet2DModel,
        dict(
            UNET, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
    ),
}  # fmt: skip


def tiny_model(name: str) -> nn.Module:
    """A frozen model, the same each time; nothing in it is zero that would hide what is before."""
    torch.manual_seed(5)
    kind, config = TINY[name]
    model: nn.Module = kind(**config).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if "pad_token" in key or (parameter.ndim > 1 and not bool(parameter.any())):
            nn.init.normal_(parameter, std=0.02)
    return model
