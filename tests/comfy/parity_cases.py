"""Tiny models of one architecture in both hosts, and how to call both on the same inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor]
UNET = dict(sample_size=8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=32)
UNET |= dict(
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=8,
)
UNET_NATIVE = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=64,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    transformer_depth=[1, 1],
    transformer_depth_output=[1, 1, 1, 1],
    transformer_depth_middle=1,
    context_dim=32,
    use_spatial_transformer=True,
    use_linear_in_transformer=False,
    legacy=False,
)
SDXL = UNET | dict(use_linear_projection=True, addition_embed_type="text_time")
SDXL |= dict(
    attention_head_dim=[1, 2],
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=16 + 6 * 8,
)
SDXL_NATIVE = UNET_NATIVE | dict(use_linear_in_transformer=True, num_classes="sequential")
SDXL_NATIVE |= dict(adm_in_channels=64)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_sd3(theirs: Any, ours: Any) -> Outputs:
    x, context, pooled = noise(2, 16, 8, 8), noise(2, 5, 32), noise(2, 16)
    t = torch.tensor([300.0, 700.0])
    a = theirs(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=t).sample
    return a, ours(x, t, context=context, y=pooled)


def packed(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return (
        x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
    )


def run_flux(theirs: Any, ours: Any) -> Outputs:
    x, context, pooled = noise(2, 16, 8, 8), noise(2, 5, 32), noise(2, 16)
    t, guidance = torch.tensor([0.3, 0.8]), torch.tensor([3.5, 2.0])
    side = torch.arange(4.0)
    ids = torch.stack(torch.meshgrid(torch.zeros(1), side, side, indexing="ij"), -1).view(-1, 3)
    a = theirs(
        packed(x),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=t,
        guidance=guidance,
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
    ).sample
    return a, packed(ours(x, t, context=context, y=pooled, guidance=guidance))


def run_pixart(theirs: Any, ours: Any) -> Outputs:
    x, context, t = noise(2, 4, 40, 40), noise(2, 7, 4096) * 0.1, torch.tensor([300.0, 700.0])
    sizes = {"resolution": None, "aspect_ratio": None}
    a = theirs(x, encoder_hidden_states=context, timestep=t, added_cond_kwargs=sizes).sample
    return a[:, :4], ours(x, t, context=context)


def run_hunyuan_dit(theirs: Any, ours: Any) -> Outputs:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    x, t = noise(2, 4, 32, 32), torch.tensor([300.0, 700.0])
    text, long = noise(2, 6, 16), noise(2, 9, 24)
    masks = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    rope = get_2d_rotary_pos_embed(16, ((0, 0), (32, 32)), (16, 16), output_type="pt")
    a = theirs(
        x,
        t,
        encoder_hidden_states=text,
        text_embedding_mask=masks[0],
        encoder_hidden_states_t5=long,
        text_embedding_mask_t5=masks[1],
        image_rotary_emb=rope,
    ).sample
    more = {"encoder_hidden_states_t5": long, "text_embedding_mask_t5": masks[1]}
    b = ours(x, t, context=text.clone(), text_embedding_mask=masks[0], **more)
    return a[:, :4], b


def run_cogvideox(theirs: Any, ours: Any) -> Outputs:
    x, context, t = noise(2, 16, 3, 8, 8), noise(2, 4, 32), torch.tensor([300.0, 700.0])
    rope = ours._get_rotary_emb(4, 4, 3, "cpu")
    a = theirs(x.transpose(1, 2), context, t, image_rotary_emb=rope).sample
    return a, ours(x, t, context).transpose(1, 2)


def run_qwen(theirs: Any, ours: Any) -> Outputs:
    x, context, t = noise(2, 16, 8, 8), noise(2, 5, 3584), torch.tensor([0.3, 0.8])
    mask = torch.ones(2, 5, dtype=torch.long)
    a = theirs(
        packed(x),
        encoder_hidden_states=context,
        encoder_hidden_states_mask=mask,
        timestep=t,
        img_shapes=[[(1, 4, 4)]] * 2,
    ).sample
    return a, packed(ours(x[:, :, None], t, context)[:, :, 0])


def run_unet(theirs: Any, ours: Any) -> Outputs:
    x, context, t = noise(2, 4, 4, 4), noise(2, 5, 32), torch.tensor([300.0, 700.0])
    return theirs(x, t, context).sample, ours(x, t, context=context)


def run_sdxl(theirs: Any, ours: Any) -> Outputs:
    x, context, t = noise(2, 4, 4, 4), noise(2, 5, 32), torch.tensor([300.0, 700.0])
    pooled, sizes = noise(2, 16), torch.arange(12.0).view(2, 6)
    sincos = theirs.add_time_proj(sizes.flatten()).view(2, -1)
    more = {"text_embeds": pooled, "time_ids": sizes}
    a = theirs(x, t, context, added_cond_kwargs=more).sample
    return a, ours(x, t, context=context, y=torch.cat([pooled, sincos], 1))


Case = tuple[str, dict[str, Any], str | None, dict[str, Any], Callable[[Any, Any], Outputs]]
#: Name -> (diffusers class, its config, ComfyUI's config class or None to let it load diffusers'
#: weights itself, its `unet_config`, how to call both).
CASES: dict[str, Case] = {
    "sd3": (
        "SD3Transformer2DModel",
        dict(sample_size=16, num_layers=2, num_attention_heads=2, joint_attention_dim=32)
        | dict(caption_projection_dim=128, pooled_projection_dim=16, pos_embed_max_size=8)
        | dict(out_channels=16, dual_attention_layers=(0,), qk_norm="rms_norm"),
        None,
        {},
        run_sd3,
    ),
    "flux": (
        "FluxTransformer2DModel",
        dict(num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=32)
        | dict(pooled_projection_dim=16, guidance_embeds=True),
        None,
        {},
        run_flux,
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        dict(num_layers=1, sample_size=64, caption_channels=4096, use_additional_conditions=False),
        None,
        {},
        run_pixart,
    ),
    "hunyuan_dit": (
        "HunyuanDiT2DModel",
        dict(num_layers=4, sample_size=32, num_attention_heads=2, attention_head_dim=16)
        | dict(hidden_size=32, in_channels=4, patch_size=2, cross_attention_dim=16)
        | dict(cross_attention_dim_t5=24, pooled_projection_dim=1024, text_len=6, text_len_t5=9)
        | dict(activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False),
        "HunyuanDiT",
        dict(image_model="hydit", depth=4, hidden_size=32, num_heads=2, text_states_dim=16)
        | dict(text_states_dim_t5=24, text_len=6, text_len_t5=9),
        run_hunyuan_dit,
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        dict(num_layers=2, num_attention_heads=2, text_embed_dim=32, time_embed_dim=16)
        | dict(use_rotary_positional_embeddings=True),
        "CogVideoX_T2V",
        dict(image_model="cogvideox", num_layers=2, num_attention_heads=2, text_embed_dim=32)
        | dict(time_embed_dim=16, use_rotary_positional_embeddings=True),
        run_cogvideox,
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        dict(num_layers=2, num_attention_heads=1),
        "QwenImage",
        dict(image_model="qwen_image", in_channels=64, num_layers=2, num_attention_heads=1),
        run_qwen,
    ),
    "sd15": ("UNet2DConditionModel", UNET, "SD15", UNET_NATIVE, run_unet),
    "sdxl": ("UNet2DConditionModel", SDXL, "SDXL", SDXL_NATIVE, run_sdxl),
}
