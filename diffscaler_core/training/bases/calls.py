"""CALLS: how each family's model is called; how its pipeline reads texts is in `family_texts`.

Read off diffusers' pipelines and compared with them call by call in tests/training/test_families.
All pictures come here as latents (B, C, h, w); what packs, folds or lists them does so in the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import DiffScalerError
from ...tokens import pack, unpack
from ..denoiser import Condition
from ..objective import shifted

#: What distilled models are told as their guidance: the default of the pipelines they run in.
GUIDANCE = 3.5


@dataclass(frozen=True)
class Site:
    """What a call needs to know of the pipeline besides the model.

    Attributes:
        pixels: Per latent, along a side.
        scheduler: Its scheduler's settings.
    """

    pixels: int = 8
    scheduler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilyCall:
    """One family.

    Attributes:
        predict: (model, x_t (B, C, h, w), timestep (B,), condition, site) -> output (B, C or 2C,
            h, w). x_t comes in the model's dtype.
        fields: What of the condition it reads.
    """

    predict: Callable[[Any, Tensor, Tensor, Condition, Site], Tensor]
    fields: tuple[str, ...] = ()


def _sizes(x: Tensor, pixels: int) -> Tensor:
    """Returns each picture's (height, width) in pixels, (B, 2), of x's dtype."""
    size = torch.tensor([x.shape[2] * pixels, x.shape[3] * pixels], dtype=x.dtype)
    return size.to(x.device).expand(len(x), 2)


def _guidance(model: Any, x: Tensor) -> Tensor | None:
    told = getattr(model.config, "guidance_embeds", False)
    return torch.full((len(x),), GUIDANCE, device=x.device) if told else None


def _mask(c: Condition) -> Tensor:
    """Returns the mask (B, L), all ones where the condition has none (prompts out of a file)."""
    mask = c.get("mask")
    if mask is not None:
        return mask
    return torch.ones(c["context"].shape[:2], dtype=torch.long, device=c["context"].device)


def _dit(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(x, timestep=t, class_labels=c["label"], return_dict=False)[0]  # type: ignore[no-any-return]


def _unet(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(x, t, return_dict=False)[0]  # type: ignore[no-any-return]


def _unet_classes(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(x, t, class_labels=c["label"], return_dict=False)[0]  # type: ignore[no-any-return]


def _unet_condition(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(x, t, encoder_hidden_states=c["context"].to(x.dtype), return_dict=False)[0]  # type: ignore[no-any-return]


def _sdxl(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    size = _sizes(x, site.pixels)  # as if no picture had been scaled or cropped
    told = model.config.addition_time_embed_dim * 6 + c["pooled"].shape[1]
    reads = model.config.projection_class_embeddings_input_dim
    if told != reads:
        raise DiffScalerError(
            f"this {type(model).__name__} reads {reads} numbers of text and sizes, and is given "
            f"{told}: it is no SDXL base (the refiner is told aesthetic scores), or its prompts "
            f"are another text encoder's"
        )
    return model(  # type: ignore[no-any-return]
        x,
        t,
        encoder_hidden_states=c["context"].to(x.dtype),
        added_cond_kwargs={
            "text_embeds": c["pooled"].to(x.dtype),
            "time_ids": torch.cat([size, torch.zeros_like(size), size], dim=1),
        },
        return_dict=False,
    )[0]


def _sd3(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=c["context"].to(x.dtype),
        pooled_projections=c["pooled"].to(x.dtype),
        return_dict=False,
    )[0]


def _pixart(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if getattr(model, "use_additional_conditions", False):  # PixArt-α at 1024 pixels
        size = _sizes(x, site.pixels)
        told = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    return model(  # type: ignore[no-any-return]
        x,
        encoder_hidden_states=c["context"].to(x.dtype),
        encoder_attention_mask=c.get("mask"),
        timestep=t,
        added_cond_kwargs=told,
        return_dict=False,
    )[0]


def _hunyuan_dit(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    patch = model.config.patch_size
    grid = (x.shape[2] // patch, x.shape[3] // patch)
    rotary = get_2d_rotary_pos_embed(
        model.inner_dim // model.num_heads,
        get_resize_crop_region_for_grid(grid, 512 // 8 // patch),
        grid,
        device=x.device,
        output_type="pt",
    )
    size = _sizes(x, site.pixels)
    original, corner = torch.full_like(size, 1024), torch.zeros_like(size)  # the pipeline's own
    return model(  # type: ignore[no-any-return]
        x,
        t.to(x.dtype),
        encoder_hidden_states=c["context"].to(x.dtype),
        text_embedding_mask=c["mask"],
        encoder_hidden_states_t5=c["context_2"].to(x.dtype),
        text_embedding_mask_t5=c["mask_2"],
        image_meta_size=torch.cat([original, size, corner], dim=1),
        style=torch.zeros(len(x), dtype=torch.long, device=x.device),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]


def _packed_ids(x: Tensor, tokens: int) -> dict[str, Tensor]:
    """Returns where picture tokens and text tokens lie: (0, row, column) and (0, 0, 0)."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    ids = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    ids[..., 1] += torch.arange(rows, device=x.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=x.device)
    return {"img_ids": ids.flatten(0, 1), "txt_ids": ids.new_zeros(tokens, 3)}


def _flux(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    tokens = model(
        hidden_states=pack(x),
        timestep=t,
        guidance=_guidance(model, x),
        pooled_projections=c["pooled"].to(x.dtype),
        encoder_hidden_states=c["context"].to(x.dtype),
        **_packed_ids(x, c["context"].shape[1]),
        return_dict=False,
    )[0]
    return unpack(tokens, *x.shape[2:])


def _chroma(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    # As the pipeline does: a mask of floats, which is added to the scores (1 where seen, else 0).
    packed, mask = pack(x), _mask(c).to(x.dtype)
    tokens = model(
        hidden_states=packed,
        timestep=t,
        encoder_hidden_states=c["context"].to(x.dtype),
        attention_mask=torch.cat([mask, mask.new_ones(packed.shape[:2])], dim=1),
        **_packed_ids(x, c["context"].shape[1]),
        return_dict=False,
    )[0]
    return unpack(tokens, *x.shape[2:])


def _qwen_image(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    height, width = x.shape[2:]
    tokens = model(
        hidden_states=pack(x),
        timestep=t,
        guidance=_guidance(model, x),
        encoder_hidden_states_mask=c.get("mask"),
        encoder_hidden_states=c["context"].to(x.dtype),
        img_shapes=[[(1, height // 2, width // 2)]] * len(x),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


def _masked(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=c["context"].to(x.dtype),
        encoder_attention_mask=_mask(c),
        return_dict=False,
    )[0]


def _auraflow(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    return model(  # type: ignore[no-any-return]
        x, encoder_hidden_states=c["context"].to(x.dtype), timestep=t, return_dict=False
    )[0]


def _unshifted(model: Any, x: Tensor, t: Tensor, scheduler: Mapping[str, Any]) -> Tensor:
    """Returns CogView4's timestep: it is told the time as it was before the size's shift."""
    if not scheduler.get("use_dynamic_shifting"):
        return t
    tokens = x.shape[2] * x.shape[3] // model.config.patch_size**2
    small, large = scheduler.get("base_shift", 0.25), scheduler.get("max_shift", 0.75)
    shift = (tokens / scheduler.get("base_image_seq_len", 256)) ** 0.5 * large + small
    if scheduler.get("time_shift_type") == "exponential":
        shift = math.exp(shift)
    return 1000 * shifted(t / 1000, 1 / shift)


def _cogview4(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    size = _sizes(x, site.pixels)
    return model(  # type: ignore[no-any-return]
        hidden_states=x,
        encoder_hidden_states=c["context"].to(x.dtype),
        timestep=_unshifted(model, x, t, site.scheduler),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros_like(size),
        return_dict=False,
    )[0]


def _z_image(model: Any, x: Tensor, t: Tensor, c: Condition, site: Site) -> Tensor:
    texts = [row[kept.bool()] for row, kept in zip(c["context"].to(x.dtype), _mask(c), strict=True)]
    samples = list(x.unsqueeze(2).unbind(0))  # (C, 1 frame, h, w) each
    return torch.stack(model(samples, t, texts, return_dict=False)[0]).squeeze(2)


_TEXT = ("context", "mask")
_POOLED = ("context", "pooled")
#: Family -> how it is called. SDXL is a family of its own here, and so is a U-Net of classes.
CALLS: dict[str, FamilyCall] = {
    "sd3": FamilyCall(_sd3, _POOLED),
    "flux": FamilyCall(_flux, _POOLED),
    "chroma": FamilyCall(_chroma, _TEXT),
    "qwen_image": FamilyCall(_qwen_image, _TEXT),
    "z_image": FamilyCall(_z_image, _TEXT),
    "lumina2": FamilyCall(_masked, _TEXT),
    "sana": FamilyCall(_masked, _TEXT),
    "auraflow": FamilyCall(_auraflow, ("context",)),
    "cogview4": FamilyCall(_cogview4, ("context",)),
    "pixart": FamilyCall(_pixart, _TEXT),
    "hunyuan_dit": FamilyCall(_hunyuan_dit, (*_TEXT, "context_2", "mask_2")),
    "dit": FamilyCall(_dit, ("label",)),
    "sdxl": FamilyCall(_sdxl, _POOLED),
    "unet2d_condition": FamilyCall(_unet_condition, ("context",)),
    "unet2d": FamilyCall(_unet),
    "unet2d_classes": FamilyCall(_unet_classes, ("label",)),
}
