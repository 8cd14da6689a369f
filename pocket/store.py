"""Reads and writes the pocket base's files, in the key names that both hosts load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from diffscaler_core import TaskAdapter, save_task
from diffscaler_core.pocket import CONFIG, TRANSFORMER, VAE, WORDS
from diffscaler_core.task import base_facts

# SD3's latent format, the same in both hosts: model space = (latent - SHIFT) * SCALE.
SCALE, SHIFT = 1.5305, 0.0609
LICENSE = "Apache-2.0"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary neighbour, then renames: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.chmod(temporary, 0o644)  # safetensors writes for the owner alone
    os.replace(temporary, path)


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to(torch.float16).contiguous() for name, t in tensors.items()}


def save_vae(model: AutoencoderTiny, folder: Path) -> None:
    """ComfyUI's single TAESD file; its decoder counts the clamp as layer 0, diffusers does not."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.encoder.layers.state_dict().items():
        tensors[f"taesd_encoder.{name}"] = tensor
    for name, tensor in model.decoder.layers.state_dict().items():
        index, rest = name.split(".", 1)
        tensors[f"taesd_decoder.{int(index) + 1}.{rest}"] = tensor
    tensors = _half(tensors)
    # float32: half precision would round these two to 1.5303 and 0.0609.
    tensors |= {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
    metadata = {"format": "pt", "modelspec.title": "DiffScaler pocket VAE"}
    replace_file(folder / VAE, lambda path: save_file(tensors, path, metadata))


def save_transformer(model: SD3Transformer2DModel, state: dict[str, Tensor], folder: Path) -> None:
    """Weights (any values for the model's own names) under diffusers' names, and the config."""
    metadata = {"format": "pt", "modelspec.title": "DiffScaler pocket base"}
    tensors = _half(state)
    replace_file(folder / TRANSFORMER, lambda path: save_file(tensors, path, metadata))
    text = model.to_json_string()
    replace_file(folder / CONFIG, lambda path: path.write_text(text))


def save_words(
    model: SD3Transformer2DModel, words: list[str], context: Tensor, pooled: Tensor, folder: Path
) -> None:
    """Words (first the null word ""), context (N, L, D) and pooled (N, P), as a task of prompts."""
    info = {
        "name": "words",
        "method": "prompts",
        "parts": [],
        "prompts": words,
        "base": base_facts(model, []),
        "license": LICENSE,
    }
    spec = {
        "title": "Words",
        "description": 'Every word the pocket base knows, as stored prompts; "" is the null one.',
        "license": LICENSE,
    }
    tensors = {"context": context.detach().float(), "pooled": pooled.detach().float()}
    save_task(TaskAdapter({}, info, tensors, spec), folder / WORDS)
