"""Good files to be spoiled: small, and together with everything a file may hold."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from diffscaler_core import TaskAdapter, save_task
from diffscaler_core.windows import expert_windows, planned

from .mutations import File

CONFIG = "diffscaler.config"
_THUMBNAIL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwAD"
    "hgGAWjR9awAAAABJRU5ErkJggg=="
)


def random(seed: int, *shape: int) -> Tensor:
    """Returns small numbers that are the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def layers(count: int = 2, width: int = 8, rank: int = 2) -> dict[str, dict[str, Tensor]]:
    """Returns a task's layers."""
    return {
        f"transformer.transformer_blocks.{i}.attn.{name}": {
            "scale": random(i, width),
            "shift": random(i + 9, width),
            "down": random(i + 19, rank, width),
            "up": random(i + 29, width, rank),
        }
        for i in range(count)
        for name in ("to_q", "to_k")
    }


def task(**more: object) -> TaskAdapter:
    """Returns a plain task."""
    info = {
        "name": "good",
        "method": "diffscaler",
        "activation": "relu",
        "gain": 1.0,
        "parts": ["scale", "shift", "subspace"],
        "scale_includes_bias": False,
        "naming": "diffusers",
        "base": {"family": "sd3", "class": "SD3Transformer2DModel", "fingerprint": "ab" * 8},
        "training": {"steps": 10, "lr": 0.001, "images": 3, "objective": {"kind": "flow"}},
        "combined_from": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 1.0}],
        "license": "CC0",
        "trigger": "ink",
        "resolution": 2.0,
        "created": "2024-01-01",
    }
    return TaskAdapter(layers(), {**info, **more}, modelspec={"title": "Good", "author": "me"})


def rich_task() -> TaskAdapter:
    """Returns a task with a control, stored prompts, new classes and a picture."""
    control = {
        "control.transformer.pos_embed.proj.down": random(1, 4, 4, 2, 2),
        "control.transformer.pos_embed.proj.up": random(2, 8, 4),
        "control.transformer.pos_embed.proj.scale": random(3, 8),
    }
    rows = {"classes.transformer.transformer_blocks.0.norm1.emb.rows": random(4, 2, 8)}
    facts = {
        "control": {"kind": "edges", "embedding": "affiner", "activation": "relu", "rank": 4},
        "classes": {"old": 1, "new": 10, "newer": 11},
        "class_table": {"size": 10, "start": 3},
        "prompts": ["", "a cat"],
        "extracted": {"energy": 0.9, "ranks": {"default": 2}},
    }
    return task(**facts).replace(
        extras={**control, **rows},
        conditioning={"context": random(5, 2, 3, 4), "pooled": random(6, 2, 4)},
        modelspec={"title": "Rich", "thumbnail": _THUMBNAIL, "description": "Two\nlines"},
    )


def timed_task() -> TaskAdapter:
    """Returns a task whose hidden units act at some noise levels alone."""
    own = {
        layer: {part: tensor for part, tensor in tensors.items() if part in ("down", "up")}
        for layer, tensors in layers().items()
    }
    plan = planned(expert_windows(2), dict.fromkeys(own, 2))
    plain = task(method="lora", parts=["subspace"], windows=plan.facts)
    return plain.replace(layers=own)


def _file(one: TaskAdapter) -> File:
    with tempfile.TemporaryDirectory() as folder:
        return File(save_task(one, Path(folder) / "t.safetensors").read_bytes(), [CONFIG])


@functools.cache
def task_files() -> tuple[File, ...]:
    """Returns good task files."""
    return _file(task()), _file(rich_task()), _file(timed_task())


@functools.cache
def lora_files() -> tuple[File, ...]:
    """Returns good LoRA files, one of each naming, with PEFT's facts in a header."""

    def pair(name: str, down: str, up: str, seed: int, wide: int = 64) -> dict[str, Tensor]:
        return {f"{name}{down}": random(seed, 4, wide), f"{name}{up}": random(seed + 1, wide, 4)}

    kohya: dict[str, Tensor] = {}
    diffusers: dict[str, Tensor] = {}
    native: dict[str, Tensor] = {}
    for i in range(2):
        flat = f"lora_unet_joint_blocks_{i}_x_block_attn_proj"
        kohya |= pair(flat, ".lora_down.weight", ".lora_up.weight", i)
        kohya[f"{flat}.alpha"] = torch.tensor(2.0)
        dotted = f"transformer.transformer_blocks.{i}.attn.to_q"
        diffusers |= pair(dotted, ".lora_A.weight", ".lora_B.weight", i + 5)
        own = f"diffusion_model.joint_blocks.{i}.x_block.attn.proj"
        native |= pair(own, ".lora_A.weight", ".lora_B.weight", i + 7)
        native[f"{own}.diff_b"] = random(i, 64)
    fused = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    kohya |= {f"{fused}.lora_down.weight": random(3, 4, 64)}
    kohya |= {f"{fused}.lora_up.weight": random(4, 192, 4), f"{fused}.alpha": torch.tensor(4.0)}
    kohya["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = random(4, 8, 4)
    peft = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.use_rslora": False,
        "transformer.alpha_pattern": {"attn.to_q": 4},
        "transformer.peft_type": "LORA",
    }
    told = {"lora_adapter_metadata": json.dumps(peft), "modelspec.title": "Ink"}
    half = {name: tensor.half() for name, tensor in native.items()}
    return (
        File(save(kohya, {"ss_output_name": "ink", "ss_base_model_version": "sd3"})),
        File(save(diffusers, told), ["lora_adapter_metadata"]),
        File(save(half, {"modelspec.architecture": "stable-diffusion-v3-medium/lora"})),
    )


@functools.cache
def other_files() -> tuple[File, ...]:
    """Returns files of other kinds, as `diffscaler info` meets them."""
    loha = {f"lora_unet_x.hada_w{i}_{s}": random(i, 4, 4) for i in (1, 2) for s in "ab"}
    base = {
        "pos_embed.proj.weight": random(1, 8, 4, 2, 2),
        "transformer_blocks.0.attn.add_k_proj.weight": random(2, 8, 8),
        "transformer_blocks.0.attn.add_k_proj.bias": random(2, 8).half(),
        "first_stage_model.x": random(3, 2),
    }
    told = {"modelspec.title": "Base", "modelspec.architecture": "sd3/x", "ss_output_name": "o"}
    return File(save(loha, {"format": "pt"})), File(save(base, told)), File(save({}, told))
