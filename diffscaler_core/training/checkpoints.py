"""A run's state on disk: one safetensors file per checkpoint, whole or not there at all.

Nothing random is stored: a batch follows from the seed and its number alone (`randomness.py`), so
the step is the data cursor.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..atomic import PART, write_whole
from ..errors import DiffScalerError, reason_of, shown

logger = logging.getLogger(__name__)

VERSION = 1
_KEY = "diffscaler.checkpoint"
_NAME = re.compile(r"step-\d{9}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        step: Steps done.
        tensors: Parameters, their running mean, the optimisers' state, the losses so far.
        facts: The rest, as JSON: settings, the optimisers' numbers, validation losses.
        path: Where it was read from.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    path: Path


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes a checkpoint; once it is on the disk, all go but the `keep` latest up to this step.

    (A later step's can only be an earlier run's, which this one has replaced.)

    Raises:
        OSError: The disk refuses; all older checkpoints are still there.
    """
    path = folder / f"step-{step:09}.safetensors"
    own = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    # as JSON has it; Prodigy keeps an Infinity
    told = json.loads(json.dumps({"version": VERSION, "step": step, **facts}))
    note = json.dumps({**told, "crc32": _sum_of(own, told)})
    write_whole(path, save(own, {_KEY: note}))
    mine = [p for p in _checkpoints(folder) if p.name <= path.name]
    for old in set(_checkpoints(folder)) - set(mine[-keep:]):
        _delete(old)
    for left in folder.glob(f".*{PART}"):  # by a crash while writing
        _delete(left)
    return path


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Returns the newest checkpoint that can be read, or None; says which ones could not."""
    for path in reversed(_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except DiffScalerError as error:
            logger.warning("%s; going on from an older checkpoint", error)
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        DiffScalerError: Broken, or of another version; one line.
    """
    try:
        with torch.inference_mode(False), safe_open(str(path), "pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            # copies: of a file that is mapped into memory nobody can get rid on Windows
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise DiffScalerError(
            f"checkpoint {path.name!r} cannot be read: {reason_of(error)}"
        ) from error
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        version = facts.get("version") if isinstance(facts, dict) else None
        raise DiffScalerError(
            f"checkpoint {path.name!r} is of version {shown(version)}, this is {VERSION}"
        )
    total = facts.pop("crc32", None)  # an older release's has none
    if total is not None and total != _sum_of(tensors, facts):
        raise DiffScalerError(f"checkpoint {path.name!r} was damaged: its checksum is another")
    step = facts.get("step")
    if type(step) is not int or step < 0:
        raise DiffScalerError(f"checkpoint {path.name!r} cannot be of step {shown(step)}")
    return Checkpoint(step, tensors, facts, path)


def _sum_of(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
    """Returns a checksum of all that a checkpoint holds."""
    total = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns an optimiser's state as tensors, "<number>/<key>", and JSON; never a pickle."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for i, own in state["state"].items():
        for key, value in own.items():
            if isinstance(value, Tensor):
                tensors[f"{i}/{key}"] = value
            else:
                numbers.setdefault(str(i), {})[key] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Puts a state from `optimizer_state` back."""
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in facts["numbers"].items()}
    for name, tensor in tensors.items():
        i, _, key = name.partition("/")
        state.setdefault(int(i), {})[key] = tensor
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in facts["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints there are, by step."""
    return sorted(path for path in folder.glob("*.safetensors") if _NAME.fullmatch(path.name))


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not delete %s: %s", path, error.strerror or error)
