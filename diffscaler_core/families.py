"""FAMILIES: what each architecture does its own way. Data only: nothing of a host is imported.

Read off diffusers' sources, one row per denoiser class that the project knows by name. A model that
is in no row can still carry tasks: the rows are asked only for what the model itself does not show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import unknown


class TokenForm(NamedTuple):
    """How a patch embedding sees latents.

    Attributes:
        kind: `Family.tokens`.
        order: `Family.patch_order`.
        patch: `Family.patch`; 0: nobody knows, as many as the layer's numbers allow.
    """

    kind: str = "nchw"
    order: str = "cpq"
    patch: int = 0


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: Its short name, as files say it.
        title: Its name for people.
        classes: diffusers' denoiser classes.
        embed: Path of the patch embedding (its output receives control tokens).
        tokens: What that layer sees: "nchw" latents, "ncfhw" video latents, "packed2" (2×2 latents
            packed to a token by the pipeline), "patchified" (cut into patches by the model itself),
            "filled" (the same, then filled up to a fixed length),
            "packed" (one latent a token), "packed_frames" (the same of a video, frame after frame),
            "list" (a list of samples, tokens one after the other).
        patch_order: How a patch's numbers lie in a token: "cpq" channel, row, column; "pqc" row,
            column, channel.
        objective: "flow" (noise − data), "flow_reversed" (data − noise), "epsilon" or "v".
        learned_sigma: True: the output's second half of channels is a variance; train on the first.
        timestep_scale: What the model's timestep is at full noise (1000 or 1).
        guidance: How the pipeline runs classifier-free guidance: "uncond_first" or "cond_first"
            (one doubled batch), "two_calls", or "none" (distilled).
        row_layouts: Pattern of target names -> "fold" or "flat", for layers whose first
            dimension is not the batch (see `stack.AffinerStack`).
        text: Where text tokens lie in layers that see them in one run with the image's: "first",
            "last", or "" if there are no such layers.
        token_roles: Pattern of target names -> role (`token_layout.ROLES`), for layers whose tokens
            are not simply the image's.
        class_tables: Pattern of the tables that class numbers are looked up in (see `classes.py`).
        null_class: Which class means "no class": "last", or "" if the architecture has none.
        positions: How positions can be stretched to another resolution (`resolution.py`): "table"
            (sin-cos), "ids" (rotary, told where each token lies), or "" if nobody knows.
        modelspec: ModelSpec's architecture identifier, where one is registered.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    embed: str
    tokens: str = "nchw"
    patch_order: str = "cpq"
    patch: int = 2
    objective: str = "flow"
    learned_sigma: bool = False
    timestep_scale: float = 1000.0
    guidance: str = "uncond_first"
    row_layouts: dict[str, str] = field(default_factory=dict)
    text: str = ""
    token_roles: dict[str, str] = field(default_factory=dict)
    class_tables: str = ""
    null_class: str = ""
    positions: str = ""
    modelspec: str = ""


#: Layers of a text stream beside the image's, and those that see the text in cross-attention.
_TEXT_STREAM = {
    r"context_embedder(\..*)?|.*\.(add_[qkv]_proj|to_add_out)|.*\.ff_context\..*": "mean"
}
_CROSS_ATTENTION = {r"caption_projection\..*|.*\.attn2\.(to|add)_[kv](_proj)?": "mean"}
#: Blocks after those of two streams, which see text and image in one run.
_SINGLE_BLOCKS = {r"single_transformer_blocks\..*": "joint"}

_ROWS = (
    Family(
        "sd3",
        "Stable Diffusion 3 / 3.5",
        ("SD3Transformer2DModel",),
        "pos_embed.proj",
        token_roles=_TEXT_STREAM,
        positions="table",
        modelspec="stable-diffusion-v3",
    ),
    Family(
        "flux",
        "FLUX.1",
        ("FluxTransformer2DModel",),
        "x_embedder",
        tokens="packed2",
        timestep_scale=1.0,
        guidance="two_calls",
        text="first",
        token_roles=_TEXT_STREAM | _SINGLE_BLOCKS,
        positions="ids",
        modelspec="flux-1-dev",
    ),
    Family(
        "flux2",
        "FLUX.2",
        ("Flux2Transformer2DModel",),
        "x_embedder",
        tokens="packed",
        patch=1,
        timestep_scale=1.0,
        guidance="two_calls",
        text="first",
        token_roles=_TEXT_STREAM | _SINGLE_BLOCKS,
        positions="ids",
        modelspec="flux-2",
    ),
    Family(
        "pixart",
        "PixArt-α / Σ",
        ("PixArtTransformer2DModel",),
        "pos_embed.proj",
        objective="epsilon",
        learned_sigma=True,
        token_roles=_CROSS_ATTENTION,
        positions="table",
        modelspec="pixart",
    ),
    Family(
        "dit",
        "DiT",
        ("DiTTransformer2DModel",),
        "pos_embed.proj",
        objective="epsilon",
        learned_sigma=True,
        guidance="cond_first",
        class_tables=r"transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.embedding_table",
        null_class="last",
        positions="table",
        modelspec="dit",
    ),
    Family(
        "sana",
        "Sana",
        ("SanaTransformer2DModel",),
        "patch_embed.proj",
        token_roles=_CROSS_ATTENTION,
        modelspec="sana",
    ),
    Family(
        "lumina2",
        "Lumina Image 2",
        ("Lumina2Transformer2DModel",),
        "x_embedder",
        tokens="patchified",
        patch_order="pqc",
        objective="flow_reversed",
        timestep_scale=1.0,
        guidance="two_calls",
        text="first",
        token_roles={
            r"time_caption_embed\..*|context_refiner\..*": "mean",
            r"layers\..*|norm_out\.linear_2": "joint",
        },
        modelspec="lumina-2",
    ),
    Family(
        "z_image",
        "Z-Image",
        ("ZImageTransformer2DModel",),
        "all_x_embedder.2-1",
        tokens="list",
        patch_order="pqc",
        objective="flow_reversed",
        timestep_scale=1.0,
        guidance="cond_first",
        text="last",
        token_roles={
            r"cap_embedder\..*|context_refiner\..*": "mean",
            r"layers\..*|all_final_layer\..*": "joint",
            r"all_x_embedder\..*": "list",
        },
        modelspec="z-image",
    ),
    Family(
        "qwen_image",
        "Qwen-Image",
        ("QwenImageTransformer2DModel",),
        "img_in",
        tokens="packed2",
        timestep_scale=1.0,
        guidance="two_calls",
        token_roles={r"txt_in|.*\.txt_(mod|mlp)\..*|.*\.(add_[qkv]_proj|to_add_out)": "mean"},
        modelspec="qwen-image",
    ),
    Family(
        "hunyuan_dit",
        "Hunyuan-DiT",
        ("HunyuanDiT2DModel",),
        "pos_embed.proj",
        objective="v",
        learned_sigma=True,
        row_layouts={r"text_embedder\..*": "fold"},
        token_roles={r"text_embedder\..*": "mean"} | _CROSS_ATTENTION,
        modelspec="hunyuan-dit",
    ),
    Family(
        "auraflow",
        "AuraFlow",
        ("AuraFlowTransformer2DModel",),
        "pos_embed.proj",
        tokens="patchified",
        timestep_scale=1.0,
        text="first",
        token_roles=_TEXT_STREAM | _SINGLE_BLOCKS,
        modelspec="auraflow",
    ),
    Family(
        "cogview4",
        "CogView4",
        ("CogView4Transformer2DModel",),
        "patch_embed.proj",
        tokens="patchified",
        guidance="two_calls",
        text="first",
        token_roles={
            r"patch_embed\.text_proj": "mean",
            r".*\.attn1\..*": "joint",
            r".*\.ff\..*": "either",
        },
        modelspec="cogview4",
    ),
    Family(
        "cogvideox",
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        "patch_embed.proj",
        tokens="ncfhw",
        objective="v",
        row_layouts={r"patch_embed\.proj": "fold"},
        text="first",
        token_roles={r"patch_embed\.text_proj": "mean", r"transformer_blocks\..*": "joint"},
        modelspec="cogvideox",
    ),
    Family(
        "wan",
        "Wan 2.1 / 2.2",
        ("WanTransformer3DModel",),
        "patch_embedding",
        tokens="ncfhw",
        guidance="two_calls",
        token_roles={r"condition_embedder\..*": "mean"} | _CROSS_ATTENTION,
        modelspec="wan-2",
    ),
    Family(
        "ltx_video",
        "LTX-Video",
        ("LTXVideoTransformer3DModel",),
        "proj_in",
        tokens="packed_frames",
        patch=1,
        token_roles={r"time_embed\..*": "mean"} | _CROSS_ATTENTION,
        modelspec="ltx-video",
    ),
    Family(
        "hunyuan_video",
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        "x_embedder.proj",
        tokens="ncfhw",
        guidance="none",
        text="last",
        token_roles=_TEXT_STREAM | _SINGLE_BLOCKS,
        modelspec="hunyuan-video",
    ),
    Family(
        "chroma",
        "Chroma",
        ("ChromaTransformer2DModel",),
        "x_embedder",
        tokens="packed2",
        timestep_scale=1.0,
        guidance="two_calls",
        text="first",
        token_roles={r"distilled_guidance_layer\..*": "mean"} | _TEXT_STREAM | _SINGLE_BLOCKS,
        positions="ids",
        modelspec="chroma",
    ),
    Family(
        "hidream",
        "HiDream",
        ("HiDreamImageTransformer2DModel",),
        "x_embedder.proj",
        tokens="filled",
        patch_order="pqc",
        text="last",
        token_roles={
            # the tokens an expert gets do not say where in the picture they are
            r"caption_projection\..*|.*\.to_\w+_t|.*\.ff_t\..*|.*\.experts\..*": "mean",
            r"single_stream_blocks\..*": "joint",
        },
        modelspec="hidream-i1",
    ),
    Family(
        "unet2d_condition",
        "Stable Diffusion 1.x / 2.x / XL",
        ("UNet2DConditionModel",),
        "conv_in",
        objective="epsilon",
        token_roles={r"encoder_hid_proj(\..*)?": "mean"} | _CROSS_ATTENTION,
        class_tables="class_embedding",
        modelspec="stable-diffusion",
    ),
    Family(
        "unet2d",
        "unconditional U-Net",
        ("UNet2DModel",),
        "conv_in",
        objective="epsilon",
        guidance="none",
        class_tables="class_embedding",
        modelspec="unet",
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}


def family_of(class_name: str) -> Family:
    """Returns the family whose denoiser class has that name.

    Raises:
        UnknownNameError: No family has it; the message lists the classes there are.
    """
    for family in _ROWS:
        if class_name in family.classes:
            return family
    raise unknown("denoiser class", class_name, [c for f in _ROWS for c in f.classes])


def token_form(class_name: str) -> TokenForm | None:
    """Returns how the patch embedding of a denoiser class sees latents; None if nobody knows."""
    for family in _ROWS:
        if class_name in family.classes:
            return TokenForm(family.tokens, family.patch_order, family.patch)
    return None


def row_layout(class_name: str, target: str) -> str:
    """Returns how the batch lies in a target's leading dimensions: "batch", "fold" or "flat"."""
    for family in _ROWS:
        if class_name in family.classes:
            for pattern, layout in family.row_layouts.items():
                if re.fullmatch(pattern, target):
                    return layout
    return "batch"
