"""By what PEFT multiplies U D: read from a LoRA file's header or the configuration beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TaskFileError, reason_of, shown
from ..header import parse_json

#: Where diffusers' `save_lora_weights` keeps PEFT's configuration, and where PEFT itself does.
METADATA_KEY = "lora_adapter_metadata"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_CONFIG = 2**20  # bytes
_NAME = re.compile(r"\^?[\w.\-]+\$?")


@dataclass(frozen=True)
class Scaling:
    """PEFT's alpha / rank of each layer.

    Attributes:
        label: What messages call the configuration.
        configs: Prefix in the file -> PEFT's configuration of what is behind it; "" is all.
    """

    label: str
    configs: Mapping[str, Mapping[str, Any]]

    def of(self, prefix: str, layer: str, rank: int) -> float:
        """Returns what multiplies a layer's U D; 1 if nobody says, as every loader has it.

        Raises:
            TaskFileError: A configuration that is not of a plain LoRA, or a pattern of names that
                is more than a name.
        """
        config = self.configs.get(prefix, self.configs.get(""))
        if config is None:
            return 1.0
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise TaskFileError(f"{self.label}: alpha_pattern must not be {shown(patterns)}")
        alpha = next(
            (value for pattern, value in patterns.items() if self._means(pattern, layer)),
            config.get("lora_alpha", rank),
        )
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TaskFileError(f"{self.label}: lora_alpha must not be {shown(alpha)}")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _means(self, pattern: str, layer: str) -> bool:
        """Says whether a name of PEFT's patterns means a layer: the whole name, or its end."""
        if not _NAME.fullmatch(pattern):
            raise TaskFileError(
                f"{self.label}: alpha_pattern {shown(pattern)} is a regular expression, which is "
                f"not run from a foreign file"
            )
        whole = pattern.startswith("^")
        name = pattern.removeprefix("^").removesuffix("$")
        return layer == name or (not whole and layer.endswith("." + name))


def scalings(path: Path, metadata: Mapping[str, str]) -> Scaling:
    """Returns what PEFT's configuration says about a file, from its header or from beside it.

    Raises:
        TaskFileError: It cannot be read, or is not of a plain LoRA.
    """
    beside = path.with_name(PEFT_CONFIG)
    if METADATA_KEY in metadata:
        label = f"{path.name!r}, {METADATA_KEY} in its header"
        flat = parse_json(path.name, METADATA_KEY, metadata[METADATA_KEY][: _MAX_CONFIG + 1])
        configs = _by_prefix(flat)
    elif path.name == PEFT_FILE and beside.is_file():
        label = repr(beside.name)
        try:
            with beside.open("rb") as file:
                raw = file.read(_MAX_CONFIG + 1)
        except OSError as error:
            raise TaskFileError(f"could not read {label}: {reason_of(error)}") from error
        configs = {"": parse_json(beside.name, "configuration", raw)}
    else:
        return Scaling("", {})
    for config in configs.values():
        _check(label, config)
    return Scaling(label, configs)


def _by_prefix(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns prefix -> configuration from keys such as "transformer.lora_alpha"."""
    configs: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        head, dot, rest = key.rpartition(".")
        configs.setdefault(head + dot, {})[rest] = value
    return configs


def _check(label: str, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA"))
    others = {
        "use_dora": "DoRA",
        "modules_to_save": "whole modules",
        "layer_replication": "replicated layers",
        "target_parameters": "parameters that are no layers",
        "fan_in_fan_out": "transposed weights",
    }
    odd = [what for key, what in others.items() if config.get(key)]
    if not kind.endswith("LORA") or odd:
        raise TaskFileError(
            f"{label}: no plain LoRA but {shown(kind)}" + "".join(f", {o}" for o in odd)
        )
