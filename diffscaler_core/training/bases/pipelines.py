"""diffusers pipelines as denoisers: which model, which objective, which sizes.

How each family is called stands in `calls.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...autoencoder import vae_decode, vae_encode
from ...classes import class_tables
from ...errors import DiffScalerError, unknown
from ...families import Family, family_of
from ...targets import component_of
from ..data.cache import digest_of, encoder_key
from ..denoiser import Denoiser
from ..objective import Objective
from .calls import CALLS, FamilyCall, Site
from .texts import TEXTS

#: Sides in latents that a token of these spans, where the model's own patch size does not say it.
_PACKED = {"packed2": 2}
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def as_denoiser(base: Any) -> Denoiser:
    """Returns a diffusers pipeline as a denoiser (a Denoiser itself is passed through).

    Raises:
        DiffScalerError: The pipeline's family cannot be trained here.
    """
    if isinstance(base, Denoiser):
        return base
    model = getattr(base, "transformer", None)
    model = getattr(base, "unet", None) if model is None else model
    if model is None:
        raise DiffScalerError(f"{type(base).__name__} has neither a transformer nor a unet")
    family = family_of(type(model).__name__)
    name, call = _call_of(family, model)
    texts = TEXTS.get(name) if _has_text_encoder(base) else None
    vae = getattr(base, "vae", None)
    pixels = _pixels_per_latent(base, vae)
    tables = class_tables(model) if "label" in call.fields else ()
    unguided = bool(tables) and tables[0].null is None
    scheduler, side = getattr(base, "scheduler", None), _side(base, model)
    site = Site(pixels, {} if scheduler is None else dict(scheduler.config))
    return Denoiser(
        model=model,
        predict=lambda x, t, condition: call.predict(model, x.to(model.dtype), t, condition, site),
        objective=objective_of(family, model, scheduler),
        fields=call.fields,
        component=component_of(model),
        encode=None if vae is None else vae_encode(vae),
        decode=None if vae is None else vae_decode(vae),
        factor=(1 if vae is None else pixels) * _patch(family, model),
        size=None if side is None else side * (1 if vae is None else pixels),
        null_label=tables[0].null if tables else None,
        class_count=tables[0].size if tables else 0,
        class_names=dict(getattr(base, "labels", None) or {}),
        encode_text=None if texts is None else lambda words: texts(base, words),
        channels=3 if vae is not None else _channels(family, model),
        encoder_key=encoder_key(vae) if isinstance(vae, nn.Module) else None,
        text_key=None if texts is None else _text_key(base),
        guided=not getattr(model.config, "guidance_embeds", False) and not unguided,
    )


def objective_of(family: Family, model: Any, scheduler: Any = None) -> Objective:
    """Returns a base's objective: the family's, unless the scheduler's own config says otherwise.

    Raises:
        DiffScalerError: A diffusion base without a scheduler to read its noise from.
    """
    if family.objective.startswith("flow"):
        scale = float(getattr(model.config, "timestep_scale", None) or 1.0)  # Sana's own
        return Objective(family.objective, family.timestep_scale * scale)
    if scheduler is None:
        raise DiffScalerError(f"{family.title} needs its scheduler: how noise grows stands there")
    if not {"beta_start", "trained_betas"} & set(scheduler.config):
        raise DiffScalerError(
            f"{type(scheduler).__name__} does not say how {family.title}'s noise grows (it has no "
            f"betas): give the pipeline the scheduler that the base was trained with"
        )
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler.from_config(scheduler.config)
    said = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    kind = said.get(str(ddpm.config.prediction_type), family.objective)
    inputs, outputs = int(model.config.in_channels), _outputs(model)
    learned_sigma = family.learned_sigma and outputs == 2 * inputs
    return Objective(kind, family.timestep_scale, ddpm.alphas_cumprod, learned_sigma)


def _call_of(family: Family, model: Any) -> tuple[str, FamilyCall]:
    """Returns how a model of that family is called, and what that is listed as.

    Raises:
        DiffScalerError: It is told something that is not known here, or nothing is known of it.
    """
    name, config = family.name, model.config
    added = getattr(config, "addition_embed_type", None)
    if name == "unet2d_condition" and added == "text_time":
        name = "sdxl"
    elif name == "unet2d_condition":
        _refuse(added is not None, model, f"{added!r} conditions")
        told = getattr(config, "class_embed_type", None) or getattr(config, "num_class_embeds", 0)
        _refuse(bool(told), model, "class conditions")
    elif name == "unet2d":
        _refuse(bool(getattr(config, "class_embed_type", None)), model, "class conditions")
        name += "_classes" if getattr(config, "num_class_embeds", None) else ""
    elif name == "sana":
        _refuse(bool(getattr(config, "guidance_embeds", False)), model, "a TrigFlow clock (Sprint)")
    if name not in CALLS:
        raise unknown("family to train:", name, CALLS)
    return name, CALLS[name]


def _refuse(really: bool, model: Any, what: str) -> None:
    if really:
        raise DiffScalerError(
            f"this {type(model).__name__} is told {what}, which training here does not give it"
        )


def _has_text_encoder(pipe: Any) -> bool:
    return any(getattr(pipe, name, None) is not None for name in _ENCODERS)


def _text_key(pipe: Any) -> str | None:
    """Returns what tells a pipeline's reading of texts from any other's, or None if it cannot."""
    parts: list[str | int | None] = [type(pipe).__qualname__]
    for name in _ENCODERS:
        encoder = getattr(pipe, name, None)
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        key = encoder_key(encoder) if isinstance(encoder, nn.Module) else None
        if encoder is not None and key is None:
            return None
        length = getattr(tokenizer, "model_max_length", None)
        parts += [key, type(tokenizer).__qualname__, str(length)]
    return digest_of(*parts)


def _outputs(model: Any) -> int:
    said = getattr(model.config, "out_channels", None)
    return int(said or getattr(model, "out_channels", None) or model.config.in_channels)


def _channels(family: Family, model: Any) -> int:
    """Returns how many channels latents have; a packed model's inputs are 2×2 of them."""
    return int(model.config.in_channels) // _PACKED.get(family.tokens, 1) ** 2


def _patch(family: Family, model: Any) -> int:
    """Returns the side of a token, in latents."""
    known = _PACKED.get(family.tokens)
    patch = getattr(model.config, "patch_size", None) or max(
        getattr(model.config, "all_patch_size", None) or (1,)
    )
    return known or int(patch)


def _pixels_per_latent(pipe: Any, vae: Any) -> int:
    """Returns what the pipeline itself reckons with, else reads it off the VAE."""
    said = getattr(pipe, "vae_scale_factor", None)
    if isinstance(said, int):
        return said
    if vae is None:
        return 1
    blocks = getattr(vae.config, "block_out_channels", None) or ()
    tiny = getattr(vae.config, "encoder_block_out_channels", None)
    return int(2 ** (len(tiny or blocks) - 1)) if (tiny or blocks) else 8


def _side(pipe: Any, model: Any) -> int | None:
    """Returns the side of the base's own pictures, in latents, if it says so."""
    for side in (
        getattr(model.config, "sample_size", None),
        getattr(pipe, "default_sample_size", None),
    ):
        if isinstance(side, int):
            return side
    return None
