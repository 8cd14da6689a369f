"""What a safetensors file is, by its header alone: no tensor is read. Tables, and their readers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .families import FAMILIES, Family
from .header import MAX_ANY_HEADER, MAX_ANY_ITEMS, Header, read_any_header


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: Its short name.
        title: Its name for people.
        keys: Pattern that some tensor's name must contain.
        can: What can be done with it here.
    """

    name: str
    title: str
    keys: str
    can: str


_EXTRACT = (
    "no sum of low rank, so it cannot be converted; put it on its base in ComfyUI and take both to "
    "DiffScalerExtractTask, which reports what is lost"
)
#: The first whose pattern is found decides; a DoRA is a LoRA with something more, and so on.
KINDS: tuple[Kind, ...] = (
    Kind("dora", "DoRA", r"\.dora_scale$|lora_magnitude_vector", _EXTRACT),
    Kind("loha", "LoHa", r"\.hada_w1_a$", _EXTRACT),
    Kind("lokr", "LoKr", r"\.lokr_w1(_a)?$", _EXTRACT),
    Kind("oft", "OFT or BOFT", r"\.(oft_blocks|oft_diag|oft_R\b.*)", _EXTRACT),
    Kind("glora", "GLoRA", r"\.(a1|b1)\.weight$", _EXTRACT),
    Kind("ia3", "IA³", r"\.on_input$|ia3_l", _EXTRACT),
    Kind(
        "lora",
        "LoRA",
        r"lora[_.](down|up|A|B)(\.\w+)?(\.weight)?$",
        "diffscaler convert makes a task of it, exactly",
    ),
    Kind("diff", "differences of whole weights", r"\.diff(_b)?$", _EXTRACT),
    Kind(
        "control",
        "control network",
        r"controlnet_|^control_model\.|input_hint_block|^zero_convs",
        "a network of its own; a control task needs none (docs/control.md)",
    ),
    Kind("embedding", "textual inversion", r"^(emb_params|clip_[lg]|t5xxl|string_to_param\.\*)$",
         "a prompt for a text encoder; a task stores its own prompts"),
    Kind("vae", "VAE", r"^((taesd_)?(encoder|decoder)\.(conv_in|layers|(down|up)_blocks|down|1)\b)",
         "pictures to latents and back; tasks leave it as it is"),
    Kind("text_encoder", "text encoder",
         r"text_model\.encoder\.|\.SelfAttention\.|^model\.embed_tokens",
         "prompts to embeddings; tasks leave it as it is"),
)  # fmt: skip
_CHECKPOINT = Kind("checkpoint", "checkpoint", "", "a base; two of them: diffscaler extract")
_ORIGINAL = Kind(
    "checkpoint", "checkpoint", "", "a base in ComfyUI; two of them: DiffScalerExtractTask there"
)
_UNKNOWN = Kind("unknown", "safetensors file", "", "nothing here knows what it is")
_TASK = Kind("task", "DiffScaler task", "", "attach it, apply it, combine it")

#: Prefixes of a denoiser in a file of several models.
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
    "net.",
)
#: Other models in such a file.
_OTHERS = {
    "VAE": ("first_stage_model.", "vae."),
    "text encoders": ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder"),
}
#: Family -> tensors that only its denoiser has, by diffusers' names. The first that fits decides.
_DIFFUSERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("flux2", ("double_stream_modulation_img.linear.weight",)),
    ("chroma", ("distilled_guidance_layer.in_proj.weight", "x_embedder.weight")),
    ("hunyuan_video",
     ("context_embedder.proj_in.weight", "single_transformer_blocks.0.proj_mlp.weight")),
    ("flux", ("context_embedder.weight", "single_transformer_blocks.0.proj_mlp.weight")),
    ("auraflow", ("register_tokens", "context_embedder.weight")),
    ("sd3", ("pos_embed.proj.weight", "transformer_blocks.0.attn.add_k_proj.weight")),
    ("dit", ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",)),
    ("pixart", ("adaln_single.linear.weight", "pos_embed.proj.weight")),
    ("sana", ("patch_embed.proj.weight", "caption_norm.weight")),
    ("ltx_video", ("time_embed.linear.weight", "proj_in.weight", "scale_shift_table")),
    ("lumina2", ("time_caption_embed.caption_embedder.1.weight",)),
    ("z_image", ("all_x_embedder.2-1.weight",)),
    ("qwen_image", ("img_in.weight", "transformer_blocks.0.img_mod.1.weight")),
    ("hunyuan_dit", ("time_extra_emb.timestep_embedder.linear_1.weight",)),
    ("cogview4",
     ("patch_embed.text_proj.weight", "time_condition_embed.timestep_embedder.linear_1.weight")),
    ("cogvideox", ("patch_embed.text_proj.weight",)),
    ("wan", ("condition_embedder.time_proj.weight", "patch_embedding.weight")),
    ("hidream", ("caption_projection.0.linear.weight",)),
    ("unet2d_condition",
     ("conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")),
    ("unet2d",
     ("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight")),
)  # fmt: skip
#: The same by the names of the original code, which ComfyUI keeps.
_ORIGINALS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sd3", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    ("flux2", ("double_stream_modulation_img.lin.weight",)),
    ("chroma", ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight")),
    ("hunyuan_video", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    ("flux", ("double_blocks.0.img_attn.qkv.weight", "img_in.weight")),
    ("pixart", ("t_block.1.weight",)),
    ("hunyuan_dit", ("mlp_t5.0.weight",)),
    ("wan", ("head.modulation", "patch_embedding.weight")),
    ("z_image", ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "x_pad_token")),
    ("lumina2", ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")),
    ("auraflow", ("cond_seq_linear.weight", "positional_encoding")),
    ("unet2d_condition", ("input_blocks.0.0.weight", "out.2.weight")),
)  # fmt: skip
_LAYER = re.compile(
    r"(\.lora[_.](down|up|A|B)(\.\w+)?(\.weight)?|\.(alpha|dora_scale|diff|diff_b)|\.hada_\w+|"
    r"\.lokr_\w+|\.oft_\w+.*|\.lora_magnitude_vector.*|\.(scale|shift|down|up))$"
)


@dataclass(frozen=True)
class FileFacts:
    """What a header tells.

    Attributes:
        name: The file's name.
        kind: What it is.
        family: Its family's name, "" if nobody knows.
        naming: Whose names its tensors have.
        layers: How many layers it adapts; of a checkpoint 0.
        tensors, parameters, bytes: Counts; `bytes` of the whole file.
        dtypes: dtype -> share of the parameters.
        ranks: Layer -> rank, for adapters.
        parts: What else is in the file: "VAE", "text encoders".
        metadata: What the file says of itself.
    """

    name: str
    kind: Kind
    family: str
    naming: str
    layers: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, float]
    ranks: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def family_title(self) -> str:
        """The family's name for people, "" if nobody knows it."""
        return FAMILIES[self.family].title if self.family in FAMILIES else self.family


def read_foreign_header(path: str | Path) -> Header:
    """Returns the header of any safetensors file, read with bounded memory.

    Raises:
        TaskFileError: Not safetensors, or cut short.
        FileNotFoundError: No such file.
    """
    return read_any_header(Path(path), MAX_ANY_HEADER, MAX_ANY_ITEMS)


def file_facts(path: str | Path) -> FileFacts:
    """Returns what a safetensors file's header tells.

    Raises:
        TaskFileError: Not safetensors, or cut short.
        FileNotFoundError: No such file.
    """
    path = Path(path)
    entries, metadata = read_foreign_header(path)
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[str(entry.get("dtype"))] += math.prod(entry["shape"])
    total = sum(counts.values())
    kind, family, naming = _what(entries, metadata)
    ranks = _ranks(entries)
    adapted = {_LAYER.sub("", name) for name in entries if _LAYER.search(name)}
    return FileFacts(
        path.name,
        kind,
        family,
        naming,
        0 if kind.name == "checkpoint" else len(adapted),
        len(entries),
        total,
        path.stat().st_size,
        {dtype: count / (total or 1) for dtype, count in counts.most_common()},
        ranks,
        tuple(w for w, starts in _OTHERS.items() if any(n.startswith(starts) for n in entries)),
        metadata,
    )


def class_of(names: Iterable[str]) -> str | None:
    """Returns diffusers' class of a denoiser with tensors of these names, None if nobody knows."""
    family = _first(_DIFFUSERS, set(names))
    return family.classes[0] if family else None


def names_of_original(names: Iterable[str]) -> str | None:
    """Returns the family whose original code names its tensors so, None for diffusers' names."""
    family = _first(_ORIGINALS, _denoiser(names))
    return None if family is None else f"{family.title} as its authors wrote it"


def _first(table: tuple[tuple[str, tuple[str, ...]], ...], names: set[str]) -> Family | None:
    return next((FAMILIES[f] for f, keys in table if names.issuperset(keys)), None)


def _denoiser(names: Iterable[str]) -> set[str]:
    """Returns the denoiser's names without the prefix they have in a file of several models."""
    names = list(names)
    for prefix in _PREFIXES:
        own = {name[len(prefix) :] for name in names if name.startswith(prefix)}
        if own:
            return own | (
                {n for n in names if not n.startswith(prefix)} if prefix == "model." else set()
            )
    return set(names)


def _what(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Kind, str, str]:
    """Returns (kind, family, naming)."""
    if "diffscaler.format" in metadata:
        return _TASK, "", "diffusers"
    for kind in KINDS:
        if any(re.search(kind.keys, name) for name in entries):
            adapter = kind.name not in ("control", "embedding", "vae", "text_encoder")
            if not adapter and _denoiser_family(entries):
                continue  # a checkpoint that holds one as well
            return kind, _family_told(metadata), _naming(entries) if adapter else ""
    names = _denoiser(entries)
    for table, kind, naming in (
        (_DIFFUSERS, _CHECKPOINT, "diffusers"),
        (_ORIGINALS, _ORIGINAL, "original"),
    ):
        family = _first(table, names)
        if family is not None:
            return kind, family.name, naming
    return _UNKNOWN, _family_told(metadata), ""


def _denoiser_family(entries: Mapping[str, Any]) -> Family | None:
    names = _denoiser(entries)
    return _first(_DIFFUSERS, names) or _first(_ORIGINALS, names)


def _naming(entries: Mapping[str, Any]) -> str:
    """Returns which tool's names an adapter's tensors have."""
    first = next(iter(entries))
    if first.startswith(("lora_unet", "lora_te", "lora_transformer", "oft_unet", "lycoris_")):
        return "kohya"
    if any(name.startswith("base_model.model.") for name in entries):
        return "PEFT"
    if any(name.startswith("diffusion_model.") for name in entries):
        return "ComfyUI"
    return "diffusers"


_TOLD = ("modelspec.architecture", "ss_base_model_version", "diffscaler.base")


def _family_told(metadata: Mapping[str, str]) -> str:
    """Returns what an adapter's file says of its base, in the words of the tool that wrote it."""
    for key in _TOLD:
        if metadata.get(key):
            return metadata[key].partition("/")[0][:60]
    return ""


def _ranks(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Returns the rank of each layer of an adapter."""
    ranks: dict[str, int] = {}
    for name, entry in entries.items():
        shape = entry["shape"]
        if re.search(r"(lora[_.](down|A)(\.\w+)?(\.weight)?|\.down)$", name) and shape:
            ranks[_LAYER.sub("", name)] = shape[0]
        elif re.search(r"\.(hada_w1_b|lokr_w2_b)$", name) and shape:
            ranks[_LAYER.sub("", name)] = shape[0]
    return ranks
