"""A latent of one model's making drawn anew by another, by ComfyUI's own guiders and samplers.

The two ways of `systems/translate.py` are two sampler functions: one finds the picture's noise
under the source model, one samples from it under the target. So LoRAs, tasks, ControlNets, areas,
previews and the stop button work as in any sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.systems.translate import CLEAN, Code, Level, Predict, check, decode, encode
from ..diffscaler_core.training.randomness import generator_for
from .noise import is_mix, starts_from_noise

#: The least strength: a schedule of steps/strength steps is made, of which the last are taken.
LEAST = 0.01
#: Noise there and back, as the two samplers share it.
Held = list[Code]


def translated(
    source: ModelPatcher,
    target: ModelPatcher,
    prompts: tuple[list[Any], list[Any], list[Any]],
    latent: dict[str, Any],
    *,
    seed: int,
    steps: int,
    cfg: float,
    scheduler: str,
    strength: float,
    eta: float,
) -> dict[str, Any]:
    """Returns the LATENT that the target makes of the source's.

    Args:
        source: The model that the pictures are of: with its tasks, LoRAs and so on.
        target: The same base with others.
        prompts: What they show, what they are to show, and the negative one for the latter.
        latent: LATENT of pictures; under its noise mask, if it has one, it may change.
        seed: Of the noise.
        steps: There, and as many back.
        cfg: Guidance of the target; the source's is 1.
        scheduler: ComfyUI's name of one.
        strength: How far back into noise.
        eta: See `systems/translate.py`.

    Raises:
        DiffScalerError: The two cannot share noise, or the latent is of no picture.
    """
    check(steps, eta, strength)
    if strength < LEAST:
        raise DiffScalerError(f"strength is from {LEAST} to 1, got {strength:g}")
    _check_pair(source, target)
    samples = _samples(target, latent)
    sampler = comfy.samplers.KSampler(
        target, steps, target.load_device, "euler", scheduler, strength, target.model_options
    )
    levels = levels_of(target.get_model_object("model_sampling"), sampler.sigmas)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    held: Held = []
    shows, to_show, negative = prompts
    ways = (
        (source, shows, 1.0, _encoder(held, levels, eta)),
        (target, to_show, cfg, _decoder(held, levels, eta)),
    )
    show = latent_preview.prepare_callback(target, 2 * steps)
    for i, (model, positive, scale, function) in enumerate(ways):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(scale)
        found = guider.sample(
            noise, samples, comfy.samplers.KSAMPLER(function), sampler.sigmas,
            denoise_mask=latent.get("noise_mask"), callback=_later(show, i * steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
        )  # fmt: skip
    kept = {k: v for k, v in latent.items() if not k.startswith("downscale_ratio")}
    return {**kept, "samples": found.to(comfy.model_management.intermediate_device())}


def levels_of(sampling: Any, sigmas: Tensor) -> list[Level]:
    """Returns (α, σ) of samples as ComfyUI's samplers hold them; the last is `CLEAN`."""
    mix = is_mix(sampling)
    return [(1 - s if mix else 1.0, s) for s in sigmas[:-1].tolist()] + [CLEAN]


def _encoder(held: Held, levels: list[Level], eta: float) -> Callable[..., Tensor]:
    """Returns the sampler that finds the latent's noise and gives the latent back."""

    def diffscaler_encode(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        **_: Any,
    ) -> Tensor:
        first, random = [model.noise], generator_for(extra_args["seed"], "translate")

        def draw() -> Tensor:
            return first.pop() if first else torch.randn(x.shape, generator=random).to(x)

        predict = _predictor(model, sigmas, levels, extra_args, callback)
        held[:] = [encode(predict, model.latent_image, levels, eta, draw)]
        return model.latent_image  # type: ignore[no-any-return]

    return diffscaler_encode


def _decoder(held: Held, levels: list[Level], eta: float) -> Callable[..., Tensor]:
    """Returns the sampler that goes back from that noise."""

    def diffscaler_decode(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        **_: Any,
    ) -> Tensor:
        predict = _predictor(model, sigmas, levels, extra_args, callback)
        return decode(predict, held.pop(), levels, eta, extra_args.get("denoise_mask"))

    return diffscaler_decode


def _predictor(
    model: Any, sigmas: Tensor, levels: list[Level], extra_args: dict[str, Any], callback: Any
) -> Predict:
    # The mask is ours to keep; ComfyUI's own way would put other noise outside it.
    extra = {**extra_args, "denoise_mask": None}

    def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra)
        if callback is not None:
            now = {"sigma": sigmas[i], "sigma_hat": sigmas[i]}
            callback({"i": i, "x": x, "denoised": denoised, **now})
        alpha, sigma = levels[i]
        return denoised, (x - alpha * denoised) / sigma

    return predict


def _later(show: Callable[..., None], done: int) -> Callable[..., None]:
    """Returns a callback of one half of the way that counts the whole."""

    def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        show(step + done, x0, x, 2 * total)

    return callback


def _samples(model: ModelPatcher, latent: dict[str, Any]) -> Tensor:
    samples = latent["samples"]
    if samples.is_nested:
        raise DiffScalerError("a latent of pictures with sound cannot be translated")
    if not bool(torch.count_nonzero(samples)):
        raise DiffScalerError("this latent is empty: connect that of a picture (VAE Encode)")
    if samples.ndim == 4:  # a model of videos takes a picture for a video of one frame
        samples = comfy.sample.fix_empty_latent_channels(model, samples)
    form = model.get_model_object("latent_format")
    if samples.ndim != 2 + form.latent_dimensions or samples.shape[1] != form.latent_channels:
        raise DiffScalerError(
            f"this latent, {tuple(samples.shape)}, is of another model: this one's have "
            f"{form.latent_channels} channels and {form.latent_dimensions} dimensions"
        )
    mask = latent.get("noise_mask")
    if mask is not None and (mask.ndim < 2 or not mask.numel()):
        raise DiffScalerError(f"the latent's noise mask is (B, H, W), got {tuple(mask.shape)}")
    return samples  # type: ignore[no-any-return]


def _check_pair(source: ModelPatcher, target: ModelPatcher) -> None:
    samplings = [model.get_model_object("model_sampling") for model in (source, target)]
    if not all(map(starts_from_noise, samplings)):
        raise DiffScalerError("a model that makes no pictures from noise cannot translate")
    alike = len({is_mix(one) for one in samplings}) == 1
    formats = {type(model.get_model_object("latent_format")) for model in (source, target)}
    if not alike or len(formats) > 1:
        raise DiffScalerError(
            "the two models have other latents or another noise: translate between tasks of one "
            "base, or models that share both"
        )
