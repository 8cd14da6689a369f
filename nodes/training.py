"""A ComfyUI MODEL as the trainer's `Denoiser`: one call of `apply_model` for a whole batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..diffscaler_core import TaskAdapter
from ..diffscaler_core.training.denoiser import Condition, Denoiser, Encode
from .conditions import arguments_of, encoded, prompts_of
from .held_model import differentiably, held, load
from .keymap import component_of, diffusers_model
from .native_layout import native_layout
from .noise import noise_of
from .patching import refuse_compiled, refuse_tasks
from .pictures import preview_colours
from .trainable import TrainableTasks


def denoiser_of(
    model: ModelPatcher,
    vae: Any = None,
    clip: Any = None,
    facts: Mapping[str, Any] | None = None,
) -> Denoiser:
    """Returns a ComfyUI model as a denoiser; the model is neither copied nor changed.

    Args:
        model: Any diffusion model, with its LoRAs and patches, which stay in force.
        vae: For pictures in and out.
        clip: For texts.
        facts: What the model is told beside the prompts: guidance, sizes…

    Raises:
        DiffScalerError: The model is compiled, runs tasks already, or is no denoiser of noise.
    """
    _refuse(model)
    base, told = model.model, {} if facts is None else facts
    noise = noise_of(model.get_model_object("model_sampling"))
    options: dict[str, Any] = {}

    def predict(x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        x, sigma = noise.enter(x_t, timestep)
        output = differentiably(
            base.apply_model,
            x,
            sigma,
            transformer_options={**_options(model, options), "sigmas": sigma},
            **arguments_of(base, x, condition, told),
        )
        return output * noise.sign if noise.sign != 1 else output  # type: ignore[no-any-return]

    def attach(tasks: Mapping[str, TaskAdapter]) -> TrainableTasks:
        return TrainableTasks(base, tasks, component_of(base), model.load_device, noise.scale)

    def reload() -> None:
        if base.current_patcher is not None:  # a run is going on
            load(model)

    return Denoiser(
        model=base,
        predict=predict,
        objective=noise.objective,
        fields=("context", "pooled"),
        component=component_of(base),
        encode=None if vae is None else _encode(base, vae, noise.scale, reload),
        decode=_rough(base, noise.scale)
        if vae is None
        else _decode(base, vae, noise.scale, reload),
        factor=1 if vae is None else _factor(base, vae),
        encode_text=None if clip is None else lambda texts: encode_texts(clip, texts),
        shape_model=diffusers_model(base),
        attach_tasks=attach,
        hold=lambda checkpointing: held(model, checkpointing),
        encoder_key=None if vae is None else encoder_key(vae.first_stage_model),
        text_key=None if clip is None else encoder_key(clip.cond_stage_model),
        runs_on=model.load_device,
        lay_out=lambda size: native_layout(base, size),
        guided=not base.model_config.unet_config.get("guidance_embed", False),
    )


def encode_texts(clip: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Returns the condition of some texts, one row each, by ComfyUI's text encoders."""
    rows = encoded(clip, texts)
    prompts = prompts_of(tuple(texts), rows, rows[0])
    return {name: getattr(prompts, name).detach() for name in prompts.fields}


def _refuse(model: ModelPatcher) -> None:
    refuse_compiled(model, "compiled code ignores what is trained")
    refuse_tasks(model, "connect the model itself, and to go on from a task connect it to 'task'")


def _options(model: ModelPatcher, kept: dict[str, Any]) -> dict[str, Any]:
    """Returns the model's transformer options as a sampler would pass them, made once."""
    if not kept:
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
        kept.update(options["transformer_options"])
        kept["cond_or_uncond"], kept["uuids"] = [0], []
    return dict(kept)


def _encode(base: Any, vae: Any, scale: float, reload: Callable[[], None]) -> Encode:
    def encode(pixels: Tensor) -> Tensor:
        image = ((pixels + 1) / 2).movedim(1, -1)
        # a video VAE takes a batch for the frames of one video
        parts = image.split(1) if getattr(vae, "latent_dim", 2) == 3 else [image]
        with torch.no_grad():
            latents = torch.cat([vae.encode(part) for part in parts])
        reload()
        return base.process_latent_in(latents.float()) * scale  # type: ignore[no-any-return]

    return encode


def _decode(base: Any, vae: Any, scale: float, reload: Callable[[], None]) -> Encode:
    def decode(latents: Tensor) -> Tensor:
        latents = base.process_latent_out(latents / scale).to(vae.output_device)
        parts = latents.split(1) if getattr(vae, "latent_dim", 2) == 3 else [latents]
        with torch.no_grad():
            images = [vae.decode(part) for part in parts]
        reload()
        image = torch.cat([i.reshape(-1, *i.shape[-3:]) for i in images])
        return image.movedim(-1, 1).float().clamp(0, 1) * 2 - 1

    return decode


def _rough(base: Any, scale: float) -> Encode:
    """Returns a decoder without a VAE: the colours that ComfyUI's own previews show."""
    colours = preview_colours(base.latent_format)

    def decode(latents: Tensor) -> Tensor:
        latents = latents / scale
        if colours is None:
            flat = latents.reshape(len(latents), latents.shape[1], latents.shape[-2], -1)
            return flat[:, :1].expand(-1, 3, -1, -1).clamp(-1, 1)
        return colours(latents).clamp(-1, 1)

    return decode


def _factor(base: Any, vae: Any) -> int:
    patch = getattr(base.diffusion_model, "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[-1]
    return int(vae.spacial_compression_encode()) * patch


def base_key(model: ModelPatcher) -> str:
    """Returns what tells a base apart: its weights, and the LoRAs that patch it."""
    patches = {key: [float(patch[0]) for patch in own] for key, own in model.patches.items()}
    told = f"{encoder_key(model.model.diffusion_model, 'diffusion_model.', patches)}{patches}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def encoder_key(module: nn.Module, prefix: str = "", skip: Container[str] = ()) -> str:
    """Returns what tells a model apart: its class, and a few values of each of its weights.

    Args:
        module: The model.
        prefix: Of its names in `skip`.
        skip: Weights whose values change with what is loaded.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in module.named_parameters():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        plain = type(tensor) is nn.Parameter and tensor.is_floating_point() and not tensor.is_meta
        if plain and prefix + name not in skip:
            digest.update(str(tensor.detach().flatten()[:16].float().tolist()).encode())
    return digest.hexdigest()[:16]
