"""Published configurations of every family that diffusers and ComfyUI 0.30 both have. Data only.

Each row: name -> (diffusers class, its config (what differs from the class's defaults), ComfyUI's
`unet_config`). For a U-Net the last is None: ComfyUI works it out from diffusers' own names.
Configurations are those of the models' public `config.json` files; ComfyUI's are what its
`detect_unet_config` reads off the published checkpoints.
"""

from __future__ import annotations

from typing import Any

Row = tuple[str, dict[str, Any], dict[str, Any] | None]

_SD3 = dict(
    sample_size=128,
    out_channels=16,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
)
_MMDIT = dict(
    in_channels=16,
    out_channels=16,
    patch_size=2,
    input_size=None,
    adm_in_channels=2048,
    pos_embed_scaling_factor=None,
)


def _mmdit(width: int, depth: int, patches: int, **more: Any) -> dict[str, Any]:
    context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}}
    side = {"num_patches": patches**2, "pos_embed_max_size": patches}
    return {**_MMDIT, **side, "depth": depth, "context_embedder_config": context, **more}


_FLUX = dict(
    image_model="flux",
    in_channels=16,
    out_channels=16,
    patch_size=2,
    hidden_size=3072,
    context_in_dim=4096,
    vec_in_dim=768,
    num_heads=24,
    mlp_ratio=4.0,
    depth=19,
    depth_single_blocks=38,
    axes_dim=[16, 56, 56],
    theta=10000,
    qkv_bias=True,
    txt_ids_dims=[],
    yak_mlp=False,
    txt_norm=False,
)
_FLUX2 = dict(
    image_model="flux2",
    axes_dim=[32, 32, 32, 32],
    mlp_ratio=3.0,
    theta=2000,
    out_channels=128,
    global_modulation=True,
    mlp_silu_act=True,
    qkv_bias=False,
    ops_bias=False,
    default_ref_method="index",
    ref_index_scale=10.0,
    txt_ids_dims=[3],
    patch_size=1,
    in_channels=128,
    vec_in_dim=None,
    yak_mlp=False,
    txt_norm=False,
)
_PIXART = dict(
    num_attention_heads=16,
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    num_layers=28,
    cross_attention_dim=1152,
    caption_channels=4096,
    attention_bias=True,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    activation_fn="gelu-approximate",
)
_PIXART_NATIVE = dict(num_heads=16, patch_size=2, hidden_size=1152, in_channels=4, depth=28)
_WAN = dict(image_model="wan2.1", patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1))
_WAN |= dict(qk_norm=True, cross_attn_norm=True, eps=1e-6)
_HUNYUAN_VIDEO = dict(
    image_model="hunyuan_video",
    in_channels=16,
    patch_size=[1, 2, 2],
    out_channels=16,
    vec_in_dim=768,
    axes_dim=[16, 56, 56],
    meanflow=False,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=20,
    depth_single_blocks=40,
    theta=256,
    qkv_bias=True,
    byt5=False,
    guidance_embed=True,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)
_LLAMA_LAYERS = [*range(32), *[31] * 16]
_HIDREAM = dict(
    attention_head_dim=128,
    axes_dims_rope=[64, 32, 32],
    caption_channels=[4096, 4096],
    max_resolution=[128, 128],
    in_channels=16,
    llama_layers=_LLAMA_LAYERS,
    num_attention_heads=20,
    num_routed_experts=4,
    num_activated_experts=2,
    num_layers=16,
    num_single_layers=32,
    out_channels=16,
    patch_size=2,
    text_emb_dim=2048,
)
_CHROMA = dict(
    image_model="chroma",
    in_channels=64,
    out_channels=64,
    in_dim=64,
    out_dim=3072,
    hidden_dim=5120,
    n_layers=5,
)
_SD_UNET = dict(sample_size=64, attention_head_dim=8, cross_attention_dim=768)
_SDXL_UNET = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
_COGVIDEOX = dict(image_model="cogvideox", attention_head_dim=64, patch_size=2)
_COGVIDEOX |= dict(time_embed_dim=512, text_embed_dim=4096)

FULL_SIZE: dict[str, Row] = {
    "sd3_medium": (
        "SD3Transformer2DModel",
        _SD3
        | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        | dict(pos_embed_max_size=192),
        _mmdit(1536, 24, 192),
    ),
    "sd35_medium": (
        "SD3Transformer2DModel",
        _SD3
        | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        | dict(pos_embed_max_size=384, qk_norm="rms_norm")
        | dict(dual_attention_layers=tuple(range(13))),
        _mmdit(1536, 24, 384, qk_norm="rms", x_block_self_attn_layers=list(range(13))),
    ),
    "sd35_large": (
        "SD3Transformer2DModel",
        _SD3
        | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
        | dict(pos_embed_max_size=192, qk_norm="rms_norm"),
        _mmdit(2432, 38, 192, qk_norm="rms", x_block_self_attn_layers=[]),
    ),
    "flux1_dev": (
        "FluxTransformer2DModel",
        dict(guidance_embeds=True),
        {**_FLUX, "guidance_embed": True},
    ),
    "flux1_schnell": ("FluxTransformer2DModel", {}, {**_FLUX, "guidance_embed": False}),
    "flux1_fill": (
        "FluxTransformer2DModel",
        dict(guidance_embeds=True, in_channels=384, out_channels=64),
        {**_FLUX, "guidance_embed": True, "in_channels": 96},
    ),
    "flux2_dev": (
        "Flux2Transformer2DModel",
        {},
        _FLUX2
        | dict(hidden_size=6144, context_in_dim=15360, num_heads=48, guidance_embed=True)
        | dict(depth=8, depth_single_blocks=48),
    ),
    "flux2_klein_4b": (
        "Flux2Transformer2DModel",
        dict(num_layers=5, num_single_layers=20, num_attention_heads=24)
        | dict(joint_attention_dim=7680, guidance_embeds=False),
        _FLUX2
        | dict(hidden_size=3072, context_in_dim=7680, num_heads=24, guidance_embed=False)
        | dict(depth=5, depth_single_blocks=20),
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {},
        {k: v for k, v in _FLUX.items() if k not in ("yak_mlp", "txt_norm")} | _CHROMA,
    ),
    "pixart_alpha": (
        "PixArtTransformer2DModel",
        _PIXART | dict(sample_size=128, use_additional_conditions=True),
        _PIXART_NATIVE | dict(image_model="pixart_alpha", micro_condition=True, input_size=128),
    ),
    "pixart_sigma": (
        "PixArtTransformer2DModel",
        _PIXART | dict(sample_size=128, use_additional_conditions=False),
        _PIXART_NATIVE | dict(image_model="pixart_sigma", micro_condition=False),
    ),
    "hunyuan_dit_12": (
        "HunyuanDiT2DModel",
        dict(num_layers=40, sample_size=128, num_attention_heads=16, attention_head_dim=88)
        | dict(hidden_size=1408, mlp_ratio=4.3637, in_channels=4, patch_size=2, learn_sigma=True)
        | dict(cross_attention_dim=1024, cross_attention_dim_t5=2048, pooled_projection_dim=1024)
        | dict(activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False),
        dict(image_model="hydit", depth=40, hidden_size=1408, mlp_ratio=4.3637),
    ),
    "hunyuan_dit_11": (
        "HunyuanDiT2DModel",
        dict(num_layers=40, sample_size=128, num_attention_heads=16, attention_head_dim=88)
        | dict(hidden_size=1408, mlp_ratio=4.3637, in_channels=4, patch_size=2, learn_sigma=True)
        | dict(cross_attention_dim=1024, cross_attention_dim_t5=2048, pooled_projection_dim=1024)
        | dict(activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=True),
        dict(image_model="hydit1", depth=40, hidden_size=1408, mlp_ratio=4.3637)
        | dict(size_cond=True, use_style_cond=True),
    ),
    "auraflow_03": (
        "AuraFlowTransformer2DModel",
        dict(pos_embed_max_size=9216),
        dict(max_seq=9216, cond_seq_dim=2048, n_double_layers=4, n_layers=36),
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        dict(cap_feat_dim=2304),
        dict(image_model="lumina2", patch_size=2, in_channels=16, dim=2304, cap_feat_dim=2304)
        | dict(n_layers=26, qk_norm=True, n_heads=24, n_kv_heads=8, axes_dims=[32, 32, 32])
        | dict(axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0),
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {},
        dict(image_model="lumina2", patch_size=2, in_channels=16, dim=3840, cap_feat_dim=2560)
        | dict(n_layers=30, qk_norm=True, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48])
        | dict(axes_lens=[1536, 512, 512], rope_theta=256.0, ffn_dim_multiplier=8.0 / 3.0)
        | dict(z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32),
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {},
        dict(image_model="qwen_image", in_channels=64, num_layers=60),
    ),
    "wan21_t2v_14b": (
        "WanTransformer3DModel",
        {},
        _WAN
        | dict(dim=5120, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40, in_dim=16)
        | dict(model_type="t2v"),
    ),
    "wan21_t2v_1b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        _WAN
        | dict(dim=1536, out_dim=16, num_heads=12, ffn_dim=8960, num_layers=30, in_dim=16)
        | dict(model_type="t2v"),
    ),
    "wan21_i2v_14b": (
        "WanTransformer3DModel",
        dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        _WAN
        | dict(dim=5120, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40, in_dim=36)
        | dict(model_type="i2v"),
    ),
    "wan22_ti2v_5b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
        _WAN
        | dict(dim=3072, out_dim=48, num_heads=24, ffn_dim=14336, num_layers=30, in_dim=48)
        | dict(model_type="t2v"),
    ),
    "wan21_vace_1b": (
        "WanVACETransformer3DModel",
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30, vace_in_channels=96)
        | dict(vace_layers=list(range(0, 30, 2))),
        _WAN
        | dict(dim=1536, out_dim=16, num_heads=12, ffn_dim=8960, num_layers=30, in_dim=16)
        | dict(model_type="vace", vace_in_dim=96, vace_layers=15),
    ),
    "ltx_video": (
        "LTXVideoTransformer3DModel",
        {},
        dict(image_model="ltxv", num_layers=28, attention_head_dim=64, cross_attention_dim=2048),
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {},
        dict(image_model="ltxav", num_layers=48, attention_head_dim=128, cross_attention_dim=4096),
    ),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}, _HUNYUAN_VIDEO),
    "hidream": ("HiDreamImageTransformer2DModel", _HIDREAM, _HIDREAM | dict(image_model="hidream")),
    "cogvideox_2b": (
        "CogVideoXTransformer3DModel",
        {},
        _COGVIDEOX
        | dict(num_attention_heads=30, num_layers=30, in_channels=16)
        | dict(use_learned_positional_embeddings=False, use_rotary_positional_embeddings=True),
    ),
    "cogvideox15_5b": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42, patch_size_t=2, patch_bias=False)
        | dict(use_rotary_positional_embeddings=True, sample_frames=81),
        _COGVIDEOX
        | dict(num_attention_heads=48, num_layers=42, patch_size_t=2, in_channels=16)
        | dict(use_learned_positional_embeddings=False, use_rotary_positional_embeddings=True),
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {},
        dict(image_model="krea2", features=6144, channels=16, patch=2, layers=28, heads=48)
        | dict(kvheads=12, txtlayers=12, txtdim=2560),
    ),
    "sd15": ("UNet2DConditionModel", _SD_UNET, None),
    "sd21": (
        "UNet2DConditionModel",
        dict(sample_size=96, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024)
        | dict(use_linear_projection=True),
        None,
    ),
    "sd21_unclip": (
        "UNet2DConditionModel",
        dict(sample_size=96, attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024)
        | dict(use_linear_projection=True, class_embed_type="projection")
        | dict(projection_class_embeddings_input_dim=2048),
        None,
    ),
    "sdxl": ("UNet2DConditionModel", _SDXL_UNET, None),
    "sdxl_refiner": (
        "UNet2DConditionModel",
        _SDXL_UNET
        | dict(block_out_channels=(384, 768, 1536, 1536), attention_head_dim=[6, 12, 24, 24])
        | dict(transformer_layers_per_block=4, cross_attention_dim=1280)
        | dict(projection_class_embeddings_input_dim=2560)
        | dict(
            down_block_types=(
                "DownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ),
            up_block_types=(
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "UpBlock2D",
            ),
        ),
        None,
    ),
}
