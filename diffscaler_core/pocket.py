"""The pocket base in diffusers: a real, small SD3 pipeline that works offline.

The files are those that ComfyUI loads. With the same seed, steps and guidance both hosts make the
same picture: `pipe(num_inference_steps=n)` is ComfyUI's KSampler with "euler" and "normal", and
`pipe(sigmas=comfy_sigmas(n))` is "euler" and "simple".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import DiffScalerError, unknown
from .files import load_task

CONFIG = "transformer/config.json"
TRANSFORMER = "diffusion_models/diffscaler_pocket.safetensors"
VAE = "vae/diffscaler_pocket_vae.safetensors"
WORDS = "diffscaler/words.safetensors"
SHIFT = 3.0  # how far SD3 moves its timesteps towards noise

Prompt = tuple[Tensor, Tensor]


def load_pipeline(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> StableDiffusion3Pipeline:
    """Returns the pocket base as a stock SD3 pipeline without text encoders.

    Its prompts are embeddings: from `load_words(folder)`, or those a task stores
    (`TaskAdapter.prompt`); see `prompt_inputs`.

    Args:
        folder: The folder `assets/pocket`.
        dtype: What to compute in; the files hold float16.

    Raises:
        DiffScalerError: A file of the folder is missing or broken.
    """
    folder = Path(folder)
    config = json.loads(_existing(folder / CONFIG).read_text(encoding="utf-8"))
    transformer = SD3Transformer2DModel.from_config(config)
    _fill(transformer, _tensors(folder / TRANSFORMER))
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=load_vae(folder),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def load_vae(folder: str | Path) -> AutoencoderTiny:
    """Returns the pocket base's autoencoder, float32.

    Raises:
        DiffScalerError: The file is missing or broken.
    """
    tensors = _diffusers_vae(_tensors(Path(folder) / VAE))
    channels = tensors["decoder.layers.0.weight"].shape[1]
    # Its latents are the model's own space already, so there is nothing to scale or shift.
    vae = AutoencoderTiny(latent_channels=channels, scaling_factor=1.0, shift_factor=0.0)
    _fill(vae, tensors)
    return vae


def load_words(folder: str | Path) -> dict[str, Prompt]:
    """Returns what the base can draw: word -> (context (1, L, D), pooled (1, P)).

    The word "" is the empty prompt, for guidance.

    Raises:
        DiffScalerError: The file is missing or broken, or stores no prompts.
    """
    task = load_task(_existing(Path(folder) / WORDS))
    found = {word: task.prompt(word) for word in task.prompts}
    return {
        word: (context, pooled) for word, (context, pooled) in found.items() if pooled is not None
    }


def prompt_inputs(
    words: Mapping[str, Prompt], *prompts: str, negative: str = ""
) -> dict[str, Tensor]:
    """Returns the arguments of a pipeline call for these words, one picture each.

    Args:
        words: From `load_words`.
        prompts: One or more words.
        negative: What guidance leads away from.

    Raises:
        UnknownNameError: No such word.
    """
    for word in (*prompts, negative):
        if word not in words:
            raise unknown("word", word, words)
    context, pooled = zip(*(words[word] for word in prompts), strict=True)
    empty, empty_pooled = words[negative]
    return {
        "prompt_embeds": torch.cat(context),
        "pooled_prompt_embeds": torch.cat(pooled),
        "negative_prompt_embeds": empty.repeat(len(prompts), 1, 1),
        "negative_pooled_prompt_embeds": empty_pooled.repeat(len(prompts), 1),
    }


def comfy_sigmas(steps: int) -> list[float]:
    """Returns `sigmas` for a pipeline call that give ComfyUI's "simple" schedule.

    ComfyUI takes every (1000 / steps)-th entry of its table of 1000 noise levels. The scheduler
    shifts what it is given, so these are the levels before the shift; "normal" needs none, as it
    is what the scheduler does by itself.
    """
    if steps < 1:
        raise DiffScalerError(f"steps must be at least 1, got {steps}")
    return [(1000 - int(i * 1000 / steps)) / 1000 for i in range(steps)]


def _fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise DiffScalerError(
            f"the pocket base's files do not fit each other: {problem}"
        ) from error
    model.eval()


def _diffusers_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a TAESD file's tensors under diffusers' names.

    ComfyUI counts the decoder's clamp as layer 0, diffusers does not count it; its scale and shift
    cancel its latent format's, and diffusers is told 1 and 0.
    """
    renamed = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        index, _, leaf = rest.partition(".")
        if part == "taesd_encoder":
            renamed[f"encoder.layers.{rest}"] = tensor
        elif part == "taesd_decoder":
            renamed[f"decoder.layers.{int(index) - 1}.{leaf}"] = tensor
    return renamed


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(_existing(path))
    except SafetensorError as error:
        raise DiffScalerError(f"{str(path)!r} is broken ({error}); fetch it again") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DiffScalerError(f"no file {str(path)!r}; the pocket base is the folder assets/pocket")
    return path
