"""diffusers pipelines as denoisers: how each family is called, and how it turns texts into conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import DiffScalerError, unknown
from ..families import Family, family_of
from ..targets import component_of
from .data import vae_decode, vae_encode
from .denoiser import Condition, Denoiser
from .objective import Objective


def as_denoiser(base: Any) -> Denoiser:
    """Returns a diffusers pipeline as a denoiser (a Denoiser itself is passed through).

    Raises:
        DiffScalerError: The pipeline's family cannot be trained here yet.
    """
    if isinstance(base, Denoiser):
        return base
    model = getattr(base, "transformer", None)
    model = getattr(base, "unet", None) if model is None else model
    if model is None:
        raise DiffScalerError(f"{type(base).__name__} has neither a transformer nor a unet")
    family = family_of(type(model).__name__)
    if family.name not in _CALLS:
        raise unknown("family to train:", family.name, _CALLS)
    _refuse_extra_conditions(family, model)
    vae = getattr(base, "vae", None)
    call, fields = _CALLS[family.name]
    texts = _TEXTS.get(family.name)
    has_texts = texts is not None and _has_text_encoder(base)
    return Denoiser(
        model=model,
        predict=lambda x, t, condition: call(model, x.to(model.dtype), t, condition),
        objective=objective_of(family, model, getattr(base, "scheduler", None)),
        fields=fields,
        component=component_of(model),
        encode=None if vae is None else vae_encode(vae),
        decode=None if vae is None else vae_decode(vae),
        factor=_pixels_per_latent(vae) * int(getattr(model.config, "patch_size", None) or 1),
        size=_size(model, vae),
        null_label=_null_label(model) if "label" in fields else None,
        encode_text=(lambda words: texts(base, words)) if texts and has_texts else None,
        channels=3 if vae is not None else int(model.config.in_channels),
    )


def objective_of(family: Family, model: Any, scheduler: Any = None) -> Objective:
    """Returns a base's objective: the family's, unless the scheduler's own config says otherwise.

    Raises:
        DiffScalerError: A diffusion base without a scheduler to read its noise from.
    """
    if family.objective.startswith("flow"):
        return Objective(family.objective, family.timestep_scale)
    if scheduler is None:
        raise DiffScalerError(f"{family.title} needs its scheduler: how noise grows stands there")
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler.from_config(scheduler.config)
    said = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    kind = said.get(str(ddpm.config.prediction_type), family.objective)
    inputs, outputs = int(model.config.in_channels), int(model.config.out_channels or 0)
    learned_sigma = family.learned_sigma and outputs == 2 * inputs
    return Objective(kind, family.timestep_scale, ddpm.alphas_cumprod, learned_sigma)


def _refuse_extra_conditions(family: Family, model: Any) -> None:
    added = getattr(model.config, "addition_embed_type", None)  # SDXL's sizes and pooled text
    sized = getattr(model, "use_additional_conditions", False)  # PixArt-α at 1024 pixels
    if added or sized:
        raise DiffScalerError(
            f"this {type(model).__name__} ({family.title}) is told picture sizes as well, which "
            f"training here does not give it yet"
        )


def _sd3(model: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    context, pooled = c["context"].to(x.dtype), c["pooled"].to(x.dtype)
    return model(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def _dit(model: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return model(x, timestep=t, class_labels=c["label"], return_dict=False)[0]  # type: ignore[no-any-return]


def _pixart(model: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return model(  # type: ignore[no-any-return]
        x,
        encoder_hidden_states=c["context"].to(x.dtype),
        encoder_attention_mask=c.get("mask"),
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def _unet(model: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return model(x, t, return_dict=False)[0]  # type: ignore[no-any-return]


def _unet_condition(model: Any, x: Tensor, t: Tensor, c: Condition) -> Tensor:
    return model(x, t, encoder_hidden_states=c["context"].to(x.dtype), return_dict=False)[0]  # type: ignore[no-any-return]


#: Family -> (how its model is called, what of the condition it reads).
_CALLS: dict[str, tuple[Callable[[Any, Tensor, Tensor, Condition], Tensor], tuple[str, ...]]] = {
    "sd3": (_sd3, ("context", "pooled")),
    "dit": (_dit, ("label",)),
    "pixart": (_pixart, ("context", "mask")),
    "unet2d": (_unet, ()),
    "unet2d_condition": (_unet_condition, ("context",)),
}


def _sd3_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, _, pooled, _ = pipe.encode_prompt(
        words, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
    )
    return {"context": context, "pooled": pooled}


def _pixart_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, mask, _, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False)
    return {"context": context, "mask": mask}


def _sd_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    return {"context": pipe.encode_prompt(words, pipe.device, 1, False)[0]}


#: Family -> how its pipeline turns texts into a condition, one row each.
_TEXTS: dict[str, Callable[[Any, list[str]], dict[str, Tensor]]] = {
    "sd3": _sd3_texts,
    "pixart": _pixart_texts,
    "unet2d_condition": _sd_texts,
}


def _has_text_encoder(pipe: Any) -> bool:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return any(getattr(pipe, name, None) is not None for name in names)


def _pixels_per_latent(vae: Any) -> int:
    if vae is None:
        return 1
    blocks = getattr(vae.config, "block_out_channels", None) or ()
    tiny = getattr(vae.config, "encoder_block_out_channels", None)
    return int(2 ** (len(tiny or blocks) - 1)) if (tiny or blocks) else 8


def _size(model: Any, vae: Any) -> int | None:
    side = getattr(model.config, "sample_size", None)
    return side * _pixels_per_latent(vae) if isinstance(side, int) else None


def _null_label(model: Any) -> int:
    """DiT's "no class" is the entry after its last class (pipeline_dit.py uses 1000 of 1000)."""
    return int(model.config.num_embeds_ada_norm)
