"""ComfyUI in this process, for benchmarks: starting it, sampling, a LoRA for its own loaders."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from train_both_hosts import POCKET, comfyui_base, script
from variants import random_task


class Host:
    """ComfyUI with the pack, started in this process.

    Args:
        base: A folder for its inputs and outputs.
        device: "cpu" or "cuda".

    Attributes:
        nodes: ComfyUI's `nodes`.
        pack: This repository as ComfyUI loads it.
    """

    def __init__(self, base: Path, device: str = "cpu") -> None:
        script("comfy_http")
        host, launch = script("comfy_host"), script("comfy_launch")
        flags = ["--cpu"] if device == "cpu" else []
        self.nodes: ModuleType = launch.boot(host.comfyui(), [*flags, *host.base_directory(base)])
        self.pack: ModuleType = launch.load_pack(base / "custom_nodes" / "diffscaler")
        sys.modules["comfy.utils"].set_progress_bar_enabled(False)

    def part(self, name: str) -> Any:
        """Returns a module of the pack, "nodes.…" or "diffscaler_core.…"."""
        return importlib.import_module(f"{self.pack.__name__}.{name}")

    def node(self, name: str) -> Any:
        """Returns one of the pack's node classes by its id."""
        return {node.__name__: node for node in self.part("nodes").NODES}[name]

    def base(self) -> Any:
        """Returns the pocket base, as a loader node gives it."""
        return comfyui_base()[0]

    def prompt(self, *names: str) -> list[Any]:
        """Returns a CONDITIONING of one entry per word that the pocket base was trained on."""
        words = self.part("diffscaler_core").load_task(POCKET / "diffscaler" / "words.safetensors")
        made = []
        for name in names:
            context, pooled = words.prompt(name)
            made.append([context, {"pooled_output": pooled}])
        return made

    def random_tasks(self, model: Any, count: int, rank: int = 8) -> list[Any]:
        """Returns tasks for every Linear of a MODEL's blocks whose parts all do something."""
        core, hollow = self.part("diffscaler_core"), self.part("nodes.keymap")
        like = hollow.diffusers_model(model.model)
        made = (random_task(like, rank=rank, seed=seed) for seed in range(count))
        return [core.TaskAdapter(task.layers, task.info) for task in made]

    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        *,
        batch: int,
        steps: int,
        cfg: float = 3.5,
        row: int | None = None,
    ) -> Tensor:
        """Runs KSampler on 128x128 pictures and returns their latents.

        Args:
            model: A MODEL.
            positive: A CONDITIONING.
            negative: A CONDITIONING.
            batch: How many pictures.
            steps: How many steps.
            cfg: Guidance.
            row: None; or of one picture, the row of a batch whose noise it gets.
        """
        latent: dict[str, Any] = {"samples": torch.zeros(batch, 16, 16, 16)}
        if row is not None:
            latent["batch_index"] = [row]
        node = self.nodes.KSampler()
        sampled = node.sample(model, 0, steps, cfg, "euler", "normal", positive, negative, latent)
        return sampled[0]["samples"]  # type: ignore[no-any-return]

    def with_lora(self, model: Any, lora: Mapping[str, Tensor], strength: float) -> Any:
        """Returns the model as ComfyUI's LoraLoader gives it, the file being read already."""
        sd = sys.modules["comfy.sd"]
        return sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)[0]


def lora_file(task: Any) -> dict[str, Tensor]:
    """Returns a task's subspaces as a LoRA file of diffusers' format, which ComfyUI's nodes read.

    Of the same rank on the same layers; what is no subspace, and the activation, a LoRA has not.
    """
    tensors = {}
    for layer, own in task.layers.items():
        tensors[f"{layer}.lora_A.weight"] = own["down"].clone()
        tensors[f"{layer}.lora_B.weight"] = own["up"].clone()
    return tensors
