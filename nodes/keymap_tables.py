"""ARCHITECTURES: what each ComfyUI model class calls the layers that diffusers names otherwise.

Data only. One row per architecture that both hosts have. Where ComfyUI has its own table (a
function of `comfy.utils`) the row names it, and `rules` hold only what that table leaves out. A
native layer in neither keeps its name, as those of Qwen-Image and HiDream do.

Sources: ComfyUI 0.30's modules, and diffusers 0.42's conversions of the published checkpoints
(`loaders/single_file_utils.py`, `scripts/convert_hunyuandit_to_diffusers.py`). Families that only
diffusers has: DiT, Sana, unconditional U-Nets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One architecture's names.

    Attributes:
        diffusers: diffusers' class.
        classes: ComfyUI's classes (of `comfy.model_base`), by exact name.
        table: ComfyUI's own table, a function of `comfy.utils`; "" if it has none.
        foreign: Pattern of names that diffusers' class does not have: a sister architecture's in
            the table, or those of layers that diffusers keeps in another model.
        rules: Native name -> diffusers name, or the names of the parts that lie in it one after the
            other. `*` is the block's number.
        swapped: Native names (of `rules`) whose two halves change places.
        where: What `unet_config` must say, for architectures that share a class.
        row_layouts: Pattern of native names -> "fold" or "flat", as in `families.Family`.
        tokens: What the patch embedding sees, where it is not what diffusers' one does
            (`families.Family.tokens`).
        reference_first: True: the patch embedding gets reference pictures before the latents.
        text: Where text tokens lie among the image's; None: as in diffusers
            (`families.Family.text`), like the next two.
        references: Where reference pictures lie (`token_layout.TokenLayout.references`).
        token_roles: Pattern of native names -> role, as in `families.Family`.
    """

    diffusers: str
    classes: tuple[str, ...]
    table: str = ""
    foreign: str = ""
    rules: Mapping[str, Names] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)
    row_layouts: Mapping[str, str] = field(default_factory=dict)
    tokens: str = ""
    reference_first: bool = False
    text: str | None = None
    references: str | None = None
    token_roles: Mapping[str, str] | None = None


def _qkv(prefix: str, *leaves: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{leaf}" for leaf in leaves or ("to_q", "to_k", "to_v"))


#: Flux.1 and Flux.2 (and tools' variants of their names) are one table in ComfyUI.
_NOT_FLUX1 = (
    r".*\.ff(_context)?\.linear_(in|out)|controlnet_x_embedder"
    r"|single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)"
)
_NOT_FLUX2 = (
    r".*\.ff(_context)?\.net\..*|controlnet_x_embedder|time_text_embed\..*"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
_FLUX2 = {
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}
_CHROMA = {
    "distilled_guidance_layer.layers.*.in_layer": "distilled_guidance_layer.layers.*.linear_1",
    "distilled_guidance_layer.layers.*.out_layer": "distilled_guidance_layer.layers.*.linear_2",
}
_HUNYUAN_DIT = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2",
    "pooler.q_proj": "time_extra_emb.pooler.q_proj",
    "pooler.k_proj": "time_extra_emb.pooler.k_proj",
    "pooler.v_proj": "time_extra_emb.pooler.v_proj",
    "pooler.c_proj": "time_extra_emb.pooler.c_proj",
    "mlp_t5.0": "text_embedder.linear_1",
    "mlp_t5.2": "text_embedder.linear_2",
    "blocks.*.attn1.Wqkv": _qkv("blocks.*.attn1"),
    "blocks.*.attn1.out_proj": "blocks.*.attn1.to_out.0",
    "blocks.*.attn2.q_proj": "blocks.*.attn2.to_q",
    "blocks.*.attn2.kv_proj": _qkv("blocks.*.attn2", "to_k", "to_v"),
    "blocks.*.attn2.out_proj": "blocks.*.attn2.to_out.0",
    "blocks.*.default_modulation.1": "blocks.*.norm1.linear",
    "blocks.*.mlp.fc1": "blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "blocks.*.ff.net.2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_LUMINA2 = {
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
for _stage in ("noise_refiner.*", "context_refiner.*", "layers.*"):
    _LUMINA2 |= {
        f"{_stage}.attention.qkv": _qkv(f"{_stage}.attn"),
        f"{_stage}.attention.out": f"{_stage}.attn.to_out.0",
        f"{_stage}.feed_forward.w1": f"{_stage}.feed_forward.linear_1",
        f"{_stage}.feed_forward.w2": f"{_stage}.feed_forward.linear_2",
        f"{_stage}.feed_forward.w3": f"{_stage}.feed_forward.linear_3",
        f"{_stage}.adaLN_modulation.1": f"{_stage}.norm1.linear",
    }
_WAN = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "vace_blocks.*.before_proj": "vace_blocks.*.proj_in",
    "vace_blocks.*.after_proj": "vace_blocks.*.proj_out",
    "head.head": "proj_out",
}
for _stage in ("blocks.*", "vace_blocks.*"):
    _WAN |= {
        f"{_stage}.{native}.{short}": f"{_stage}.{name}.{long}"
        for native, name in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for short, long in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    } | {
        f"{_stage}.cross_attn.k_img": f"{_stage}.attn2.add_k_proj",
        f"{_stage}.cross_attn.v_img": f"{_stage}.attn2.add_v_proj",
        f"{_stage}.ffn.0": f"{_stage}.ffn.net.0.proj",
        f"{_stage}.ffn.2": f"{_stage}.ffn.net.2",
    }
_LTX = {
    "patchify_proj": "proj_in",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "adaln_single.linear": "time_embed.linear",
}
_LTX2 = dict(_LTX) | {"audio_patchify_proj": "audio_proj_in"}
for _native, _name in (
    ("audio_adaln_single", "audio_time_embed"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
):
    for _leaf in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"):
        _LTX2[f"{_native}.{_leaf}"] = f"{_name}.{_leaf}"
_COGVIDEOX = {
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "ofs_embedding_linear_1": "ofs_embedding.linear_1",
    "ofs_embedding_linear_2": "ofs_embedding.linear_2",
    "blocks.*.norm1.linear": "transformer_blocks.*.norm1.linear",
    "blocks.*.norm2.linear": "transformer_blocks.*.norm2.linear",
    "blocks.*.q": "transformer_blocks.*.attn1.to_q",
    "blocks.*.k": "transformer_blocks.*.attn1.to_k",
    "blocks.*.v": "transformer_blocks.*.attn1.to_v",
    "blocks.*.attn_out": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.ff_proj": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.ff_out": "transformer_blocks.*.ff.net.2",
}
_HUNYUAN_VIDEO: dict[str, Names] = {
    "img_in.proj": "x_embedder.proj",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
    "single_blocks.*.modulation.lin": "single_transformer_blocks.*.norm.linear",
    "single_blocks.*.linear1": (
        *_qkv("single_transformer_blocks.*.attn"),
        "single_transformer_blocks.*.proj_mlp",
    ),
    "single_blocks.*.linear2": "single_transformer_blocks.*.proj_out",
}
for _native, _name in (("t_embedder", "timestep_embedder"), ("c_embedder", "text_embedder")):
    for _layer, _linear in (("in_layer", "linear_1"), ("out_layer", "linear_2")):
        _HUNYUAN_VIDEO[f"txt_in.{_native}.{_layer}"] = (
            f"context_embedder.time_text_embed.{_name}.{_linear}"
        )
for _native, _name in (
    ("adaLN_modulation.1", "norm_out.linear"),
    ("self_attn.proj", "attn.to_out.0"),
    ("mlp.0", "ff.net.0.proj"),
    ("mlp.2", "ff.net.2"),
):
    _HUNYUAN_VIDEO[f"txt_in.individual_token_refiner.blocks.*.{_native}"] = (
        f"context_embedder.token_refiner.refiner_blocks.*.{_name}"
    )
_HUNYUAN_VIDEO["txt_in.individual_token_refiner.blocks.*.self_attn.qkv"] = _qkv(
    "context_embedder.token_refiner.refiner_blocks.*.attn"
)
_HUNYUAN_VIDEO |= {
    "double_blocks.*.img_attn.qkv": _qkv("transformer_blocks.*.attn"),
    "double_blocks.*.txt_attn.qkv": _qkv(
        "transformer_blocks.*.attn", "add_q_proj", "add_k_proj", "add_v_proj"
    ),
    "double_blocks.*.img_attn.proj": "transformer_blocks.*.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": "transformer_blocks.*.attn.to_add_out",
    "double_blocks.*.img_mod.lin": "transformer_blocks.*.norm1.linear",
    "double_blocks.*.txt_mod.lin": "transformer_blocks.*.norm1_context.linear",
    "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.net.0.proj",
    "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.net.2",
    "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.net.0.proj",
    "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.net.2",
}

# Which tokens layers see: those in none of these see the image's (`token_layout.ROLES`).
_SINGLE_BLOCKS = {r"single_blocks\..*": "joint"}
_FLUX_ROLES = {r"txt_in|double_blocks\.\d+\.txt_\w+\..*": "mean"} | _SINGLE_BLOCKS
_HUNYUAN_VIDEO_ROLES = {
    # modulations may have two vectors a row: for the first frame, and for the others
    r"\w+_in\.(?!proj$).*|.*\.(img_mod|txt_\w+|modulation)\..*|.*\.adaLN_modulation\..*": "mean",
} | _SINGLE_BLOCKS
_LUMINA2_ROLES = {
    r"cap_embedder\..*|context_refiner\..*|siglip_\w+\..*": "mean",
    r"layers\..*|final_layer\.linear": "joint",
}
_WAN_ROLES = {
    r"(text|time)_\w+\.\d|img_emb\..*|.*\.cross_attn\.[kv](_img)?": "mean",
}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "SD3Transformer2DModel",
        ("SD3",),
        "mmdit_to_diffusers",
        token_roles={r"context_\w+(\..*)?|joint_blocks\.\d+\.context_block\..*": "mean"},
    ),
    Architecture(
        "FluxTransformer2DModel",
        ("Flux",),
        "flux_to_diffusers",
        _NOT_FLUX1,
        token_roles=_FLUX_ROLES,
    ),
    Architecture(
        "Flux2Transformer2DModel",
        ("Flux2",),
        "flux_to_diffusers",
        _NOT_FLUX2,
        _FLUX2,
        token_roles=_FLUX_ROLES,
    ),
    Architecture(
        "ChromaTransformer2DModel",
        ("Chroma",),
        "flux_to_diffusers",
        _NOT_FLUX1,
        _CHROMA,
        token_roles={r"distilled_guidance_layer\..*": "mean"} | _FLUX_ROLES,
    ),
    Architecture(
        "AuraFlowTransformer2DModel",
        ("AuraFlow",),
        "auraflow_to_diffusers",
        token_roles={
            r"cond_seq_linear|double_layers\.\d+\.(attn\.w1\w|mlpC\..*)": "mean",
            r"single_layers\..*": "joint",
        },
    ),
    Architecture(
        "PixArtTransformer2DModel",
        ("PixArt",),
        "pixart_to_diffusers",
        row_layouts={r"blocks\.\d+\.cross_attn\.kv_linear": "flat"},
        token_roles={r"y_embedder\..*|.*\.cross_attn\.kv_linear": "mean"},
    ),
    Architecture(
        "ZImageTransformer2DModel",
        ("Lumina2",),
        "z_image_to_diffusers",
        where={"z_image_modulation": True},
        tokens="patchified",
        reference_first=True,
        text="first",
        references="first",
        token_roles=_LUMINA2_ROLES,
    ),
    Architecture(
        "Lumina2Transformer2DModel",
        ("Lumina2",),
        rules=_LUMINA2,
        reference_first=True,
        references="first",
        token_roles=_LUMINA2_ROLES,
    ),
    Architecture(
        "Krea2Transformer2DModel",
        ("Krea2",),
        "krea2_to_diffusers",
        r".*\.attn\.to_out",
        text="first",
        references="last",
        token_roles={
            r"txtfusion\..*|(txtmlp|tmlp|tproj)\.\d": "mean",
            r"blocks\..*|last\.linear": "joint",
        },
    ),
    Architecture(
        "HunyuanDiT2DModel",
        ("HunyuanDiT",),
        rules=_HUNYUAN_DIT,
        swapped=("final_layer.adaLN_modulation.1",),
        row_layouts={r"mlp_t5\.\d": "fold"},
        token_roles={r"mlp_t5\.\d|pooler\..*|.*\.attn2\.kv_proj": "mean"},
    ),
    Architecture("QwenImageTransformer2DModel", ("QwenImage",)),
    Architecture("HiDreamImageTransformer2DModel", ("HiDream",), references=""),
    Architecture(
        "WanTransformer3DModel",
        ("WAN21", "WAN22"),
        rules=_WAN,
        row_layouts={r"time_embedding\.\d": "fold"},
        token_roles=_WAN_ROLES,
    ),
    Architecture(
        "WanVACETransformer3DModel",
        ("WAN21_Vace",),
        rules=_WAN,
        row_layouts={r"time_embedding\.\d": "fold"},
        token_roles=_WAN_ROLES,
    ),
    Architecture(
        "LTXVideoTransformer3DModel",
        ("LTXV",),
        rules=_LTX,
        row_layouts={r"adaln_single\..*": "fold"},
        token_roles={r"adaln_single\..*|caption_projection\..*|.*\.attn2\.to_[kv]": "mean"},
    ),
    Architecture(
        "LTX2VideoTransformer3DModel",
        ("LTXAV",),
        foreign=r"(audio|video)_embeddings_connector\..*",
        rules=_LTX2,
        row_layouts={r".*adaln_single\..*": "fold"},
    ),
    Architecture(
        "CogVideoXTransformer3DModel",
        ("CogVideoX",),
        rules=_COGVIDEOX,
        row_layouts={r"patch_embed\.proj": "fold"},
        token_roles={r"patch_embed\.text_proj": "mean", r"blocks\..*": "joint"},
    ),
    Architecture(
        "HunyuanVideoTransformer3DModel",
        ("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V"),
        rules=_HUNYUAN_VIDEO,
        swapped=("final_layer.adaLN_modulation.1",),
        text="first",
        references="first",
        token_roles=_HUNYUAN_VIDEO_ROLES,
    ),
    Architecture(
        "UNet2DConditionModel",
        ("SDXL", "SDXLRefiner", "SDXL_instructpix2pix"),
        "unet_to_diffusers",
        r"class_embedding\..*",
    ),
    Architecture(
        "UNet2DConditionModel",
        ("BaseModel", "SD21UNCLIP", "SD15_instructpix2pix", "SD_X4Upscaler", "Lotus"),
        "unet_to_diffusers",
        r"add_embedding\..*",
    ),
)
