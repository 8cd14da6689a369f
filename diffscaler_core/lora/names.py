"""LORA_NAMES: what LoRA files call the layers of each family. Data, and how it is looked up.

A file names layers as diffusers does or as the model's first code (and ComfyUI) does, with dots or
with underscores throughout, behind a prefix. Checked layer by layer against ComfyUI's own key maps
and diffusers' conversions in `tests/comfy/test_lora_names.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Names = str | tuple[str, ...]

#: How high a block's number may be, where a pattern says `*`.
MOST_BLOCKS = 100
#: Residual blocks a level of every published Stable Diffusion U-Net; distilled ones have fewer.
LAYERS_PER_BLOCK = 2


@dataclass(frozen=True)
class LoraNames:
    """One family's names.

    Attributes:
        family: A name in FAMILIES.
        native: Native name -> diffusers name, or the names of the parts that lie in it one after
            the other; `*` is the block's number.
        swapped: Native names whose two halves change places (see `layouts.Placement`).
        swapped_if_two: The same, if the layer has twice as many rows as columns: SD3's last block
            keeps a continuous norm where the others have six rows a column.
        kernels: Pattern of diffusers names -> kernel of the convolution there, for files that
            store a convolution's D flat.
        biasless: Pattern of diffusers names of layers without a bias.
        hints: How `modelspec.architecture` or `ss_base_model_version` in a header begins.
    """

    family: str
    native: Mapping[str, Names]
    swapped: tuple[str, ...] = ()
    swapped_if_two: tuple[str, ...] = ()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    biasless: str = ""
    hints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A native layer, as a file may hold it.

    Attributes:
        native: Its native name.
        names: Diffusers' names of the parts in it, first rows first.
        sizes: Rows of each part, as multiples of the narrowest.
        swap: "always", "if_two" (as many rows as two columns) or "never".
    """

    native: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    swap: str = "never"


def _qkv(prefix: str, *leaves: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{leaf}" for leaf in leaves or ("to_q", "to_k", "to_v"))


def _embedders(*pairs: str) -> dict[str, Names]:
    """Returns Flux's and SD3's embedders: native stem, its two layers, diffusers' stem."""
    rows: dict[str, Names] = {}
    for pair in pairs:
        native, first, second, name = pair.split()
        rows[f"{native}.{first}"] = f"time_text_embed.{name}.linear_1"
        rows[f"{native}.{second}"] = f"time_text_embed.{name}.linear_2"
    return rows


_FINAL: dict[str, Names] = {
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_SD3: dict[str, Names] = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    **_embedders(
        "t_embedder mlp.0 mlp.2 timestep_embedder", "y_embedder mlp.0 mlp.2 text_embedder"
    ),
    **_FINAL,
    "joint_blocks.*.x_block.attn2.qkv": _qkv("transformer_blocks.*.attn2"),
    "joint_blocks.*.x_block.attn2.proj": "transformer_blocks.*.attn2.to_out.0",
}
for _stream, _leaves, _out, _tail in (
    ("x_block", (), "to_out.0", ""),
    ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "_context"),
):
    _block = f"joint_blocks.*.{_stream}"
    _SD3 |= {
        f"{_block}.attn.qkv": _qkv("transformer_blocks.*.attn", *_leaves),
        f"{_block}.attn.proj": f"transformer_blocks.*.attn.{_out}",
        f"{_block}.adaLN_modulation.1": f"transformer_blocks.*.norm1{_tail}.linear",
        f"{_block}.mlp.fc1": f"transformer_blocks.*.ff{_tail}.net.0.proj",
        f"{_block}.mlp.fc2": f"transformer_blocks.*.ff{_tail}.net.2",
    }
#: What Flux.1 and Chroma share.
_FLUX_BLOCKS: dict[str, Names] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "single_blocks.*.linear1": (
        *_qkv("single_transformer_blocks.*.attn"),
        "single_transformer_blocks.*.proj_mlp",
    ),
    "single_blocks.*.linear2": "single_transformer_blocks.*.proj_out",
}
for _stream, _leaves, _out, _tail in (
    ("img", (), "to_out.0", ""),
    ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "_context"),
):
    _block = f"double_blocks.*.{_stream}"
    _FLUX_BLOCKS |= {
        f"{_block}_attn.qkv": _qkv("transformer_blocks.*.attn", *_leaves),
        f"{_block}_attn.proj": f"transformer_blocks.*.attn.{_out}",
        f"{_block}_mlp.0": f"transformer_blocks.*.ff{_tail}.net.0.proj",
        f"{_block}_mlp.2": f"transformer_blocks.*.ff{_tail}.net.2",
    }
_FLUX: dict[str, Names] = {
    **_FLUX_BLOCKS,
    **_FINAL,
    **_embedders(
        "time_in in_layer out_layer timestep_embedder",
        "vector_in in_layer out_layer text_embedder",
        "guidance_in in_layer out_layer guidance_embedder",
    ),
    "double_blocks.*.img_mod.lin": "transformer_blocks.*.norm1.linear",
    "double_blocks.*.txt_mod.lin": "transformer_blocks.*.norm1_context.linear",
    "single_blocks.*.modulation.lin": "single_transformer_blocks.*.norm.linear",
}
_CHROMA: dict[str, Names] = {
    **_FLUX_BLOCKS,
    "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    "distilled_guidance_layer.layers.*.in_layer": "distilled_guidance_layer.layers.*.linear_1",
    "distilled_guidance_layer.layers.*.out_layer": "distilled_guidance_layer.layers.*.linear_2",
}
_QWEN: dict[str, Names] = {
    name: name
    for name in (
        "img_in",
        "txt_in",
        "norm_out.linear",
        "proj_out",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        *(
            f"transformer_blocks.*.{layer}"
            for layer in (
                *_qkv("attn", "to_q", "to_k", "to_v", "to_out.0", "to_add_out"),
                *_qkv("attn", "add_q_proj", "add_k_proj", "add_v_proj"),
                *("img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2"),
                *("txt_mlp.net.0.proj", "txt_mlp.net.2"),
            )
        ),
    )
}
_WAN: dict[str, Names] = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
    "blocks.*.cross_attn.k_img": "blocks.*.attn2.add_k_proj",
    "blocks.*.cross_attn.v_img": "blocks.*.attn2.add_v_proj",
    "blocks.*.ffn.0": "blocks.*.ffn.net.0.proj",
    "blocks.*.ffn.2": "blocks.*.ffn.net.2",
}
for _native, _name in (("self_attn", "attn1"), ("cross_attn", "attn2")):
    for _short, _long in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True):
        _WAN[f"blocks.*.{_native}.{_short}"] = f"blocks.*.{_name}.{_long}"
_Z_IMAGE: dict[str, Names] = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{name: name for name in ("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2")},
}
for _stage in ("layers.*", "context_refiner.*", "noise_refiner.*"):
    _Z_IMAGE |= {
        f"{_stage}.attention.qkv": _qkv(f"{_stage}.attention"),
        f"{_stage}.attention.out": f"{_stage}.attention.to_out.0",
        **{f"{_stage}.feed_forward.w{i}": f"{_stage}.feed_forward.w{i}" for i in (1, 2, 3)},
    }
    if _stage != "context_refiner.*":
        _Z_IMAGE[f"{_stage}.adaLN_modulation.0"] = f"{_stage}.adaLN_modulation.0"

#: Native name -> diffusers name inside a U-Net's residual block, and inside its attention.
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = (
    "proj_in",
    "proj_out",
    *(
        f"transformer_blocks.*.{layer}"
        for layer in (
            *_qkv("attn1", "to_q", "to_k", "to_v", "to_out.0"),
            *_qkv("attn2", "to_q", "to_k", "to_v", "to_out.0"),
            "ff.net.0.proj",
            "ff.net.2",
        )
    ),
)


@functools.cache
def _unet(layers: int) -> dict[str, Names]:
    """Returns a U-Net's names; which level a native block is on depends on its layers per block."""
    rows: dict[str, Names] = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
    }

    def resnet(native: str, name: str) -> None:
        rows.update({f"{native}.{n}": f"{name}.{d}" for n, d in _RESNET.items()})

    def attention(native: str, name: str) -> None:
        rows.update({f"{native}.{n}": f"{name}.{n}" for n in _ATTENTION})

    for level in range(4):
        for i in range(layers):
            block = 1 + (layers + 1) * level + i
            resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}")
            attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}")
        down = 1 + (layers + 1) * level + layers
        rows[f"input_blocks.{down}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for i in range(layers + 1):
            block = (layers + 1) * level + i
            resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{i}")
            attention(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{i}")
        for place in (1, 2):  # behind the attention, where there is one
            up = (layers + 1) * level + layers
            rows[f"output_blocks.{up}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    return rows


_ROWS = (
    LoraNames(
        "sd3",
        _SD3,
        swapped=("final_layer.adaLN_modulation.1",),
        swapped_if_two=("joint_blocks.*.context_block.adaLN_modulation.1",),
        kernels={r"pos_embed\.proj": (2, 2)},
        hints=("stable-diffusion-v3", "sd3", "sd35"),
    ),
    LoraNames(
        "flux",
        _FLUX,
        swapped=("final_layer.adaLN_modulation.1",),
        hints=("flux-1", "flux1"),
    ),
    LoraNames("chroma", _CHROMA, hints=("chroma",)),
    LoraNames("qwen_image", _QWEN, hints=("qwen-image",)),
    LoraNames("wan", _WAN, kernels={"patch_embedding": (1, 2, 2)}, hints=("wan",)),
    LoraNames(
        "z_image",
        _Z_IMAGE,
        biasless=r".*\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w\d)",
        hints=("z-image",),
    ),
    LoraNames(
        "unet2d_condition",
        {},  # `_unet` makes them
        kernels={
            r".*\.(conv|conv1|conv2)|conv_in|conv_out": (3, 3),
            r".*\.conv_shortcut": (1, 1),
        },
        biasless=r".*\.attn\d\.to_[qkv]",
        hints=("stable-diffusion-v1", "stable-diffusion-v2", "stable-diffusion-xl", "sd_", "sdxl"),
    ),
)
LORA_NAMES: dict[str, LoraNames] = {row.family: row for row in _ROWS}

#: Prefix of a layer's name in a file -> how the name behind it is spelt. The longest that fits
#: counts; "" is the name alone, as DiffSynth and `save_lora_adapter` write it.
PREFIXES: dict[str, str] = {
    "lora_unet_": "flat",
    "lora_unet__": "flat",
    "lora_transformer_": "flat",
    "lycoris_": "flat",
    "diffusion_model.": "dotted",
    "model.diffusion_model.": "dotted",
    "transformer.": "dotted",
    "transformer_2.": "dotted",
    "unet.": "dotted",
    "base_model.model.": "dotted",
    "unet.base_model.model.": "dotted",
    "transformer.base_model.model.": "dotted",
    "": "dotted",
}
#: How names of text encoders' tensors begin, in any naming; a task does not adapt text encoders.
TEXT_ENCODERS = re.compile(
    r"(lora_te\d?|lora_prior_te|lycoris_te\d?)_|text_encoders?(_\d)?\.|te\d?\.|cond_stage_model\."
    r"|conditioner\.|text_model\."
)


def split_prefix(name: str) -> tuple[str, str]:
    """Returns a layer's name in a file as (a key of PREFIXES, the rest)."""
    prefix = max((p for p in PREFIXES if name.startswith(p)), key=len)
    return prefix, name[len(prefix) :]


def flat(name: str) -> str:
    """Returns a name as kohya's files spell it."""
    return name.replace(".", "_")


@functools.cache
def native_places(family: str, layers_per_block: int = LAYERS_PER_BLOCK) -> dict[str, Place]:
    """Returns every native layer a family may have, by its native name."""
    row = LORA_NAMES[family]
    table = _unet(layers_per_block) if family == "unet2d_condition" else row.native
    return {
        place.native: place
        for native, names in table.items()
        for place in _each(row, native, names)
    }


@functools.cache
def own_places(family: str, layers_per_block: int = LAYERS_PER_BLOCK) -> dict[str, Place]:
    """Returns the place of every layer a family may have, by its diffusers name."""
    return {
        name: place
        for place in native_places(family, layers_per_block).values()
        for name in place.names
    }


@functools.cache
def places(family: str, spelt: str, layers_per_block: int = LAYERS_PER_BLOCK) -> dict[str, Place]:
    """Returns what each name in a file means: of native layers, and of diffusers' ones.

    Args:
        family: A name in LORA_NAMES.
        spelt: "dotted" or "flat".
        layers_per_block: Of a U-Net.
    """
    spell = flat if spelt == "flat" else str
    own = {spell(name): Place(name, (name,), (1,)) for name in own_places(family, layers_per_block)}
    # a name that both use means the native layer only if that one holds something else
    native = native_places(family, layers_per_block)
    return own | {spell(n): p for n, p in native.items() if p.names != (n,)}


def _each(row: LoraNames, native: str, names: Names) -> Iterator[Place]:
    names = (names,) if isinstance(names, str) else names
    sizes = (1, 1, 1, 4) if len(names) == 4 else (1,) * len(names)  # q, k, v and the MLP
    swap = "always" if native in row.swapped else "never"
    swap = "if_two" if native in row.swapped_if_two else swap
    numbers = range(MOST_BLOCKS) if "*" in native else (0,)
    for number in map(str, numbers):
        own = tuple(name.replace("*", number) for name in names)
        yield Place(native.replace("*", number), own, sizes, swap)
