"""Which folder a training node's run lives in: the same settings find their run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import folder_paths
from torch import Tensor

from ..diffscaler_core.file_names import harmless
from ..diffscaler_core.training.conditioning import Prompts
from ..diffscaler_core.training.config import TrainingConfig
from ..diffscaler_core.training.data.batches import TrainingData
from ..diffscaler_core.training.facts import plain_settings
from ..diffscaler_core.training.run_folder import RunFolder
from .training import base_key

#: Settings that do not change what is learned: with others a run goes on in its folder.
_LOOKS = (
    *("steps", "validate_every", "validation_times", "sample_every", "sample_steps", "guidance"),
    *("save_every", "keep", "precision", "checkpointing", "accumulate"),
)


def run_folder(
    inputs: Mapping[str, Any], config: TrainingConfig, data: TrainingData, prompts: Prompts
) -> tuple[RunFolder, str]:
    """Returns a run's folder, and how to show it.

    What is trained on what gives the folder's name its ending: the same settings find their run
    again, others never meet it.
    """
    settings = {k: v for k, v in plain_settings(config).items() if k not in _LOOKS}
    if not config.control:
        settings = {k: v for k, v in settings.items() if "control" not in k}
    start = inputs.get("task")
    facts = [
        settings,
        list(data.image_ids),
        data.index.tolist(),
        _digest(dict(prompts.named_parameters())),
        None if start is None else [_digest(tensors) for tensors in start.layers.values()],
        base_key(inputs["model"]),
        *([list(data.control_ids)] if config.control else ()),
        *([_digest(start.extras)] if start is not None and start.is_control else ()),
    ]
    ending = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    name = f"{harmless(config.name)}-{ending}"
    root = os.path.join(folder_paths.get_output_directory(), "diffscaler", "runs")
    return RunFolder(os.path.join(root, name)), f"diffscaler/runs/{name}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
