"""LoRA files into tasks, exactly: kohya's, PEFT's and diffusers', and ComfyUI's naming.

A LoRA adds (alpha / rank) · U D x to a layer, which is a task's identity subspace. Its D and U are
kept bit for bit; alpha / rank becomes the task's gain, or goes into U where layers differ in it.
Only the file is read, never a model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import TaskFileError
from ..families import FAMILIES
from ..file_rules import check_in_memory
from ..foreign import read_foreign_header
from ..matching import match_layers
from ..targets import as_target, component_of
from ..task import TaskAdapter, base_facts, fingerprint, flat, parts_of
from .file import LoraFile, layers_per_block
from .keys import sort_keys
from .names import PREFIXES, split_prefix

logger = logging.getLogger(__name__)


def import_lora(
    path: str | Path,
    *,
    name: str | None = None,
    base: nn.Module | None = None,
    strict: bool = False,
) -> TaskAdapter:
    """Returns the task that does exactly what a LoRA file does to the denoiser.

    The family is recognised by the names of the layers. What was read, and what was left out, is
    in `info["imported"]`; `imported_text` says it in words.

    Args:
        path: A `.safetensors` file in kohya's, PEFT's, diffusers' or ComfyUI's naming. Beside an
            `adapter_model.safetensors` its `adapter_config.json` is read too.
        name: The task's name; None: the file's title, or its name.
        base: The denoiser it was made for, to check names and shapes against now. Needed only
            where the file alone does not tell (a U-Net whose levels are not two blocks deep, flat
            convolutions of an unknown U-Net).
        strict: True: a file that also changes the text encoder is refused; False: that part is
            left out with a warning, as a task adapts denoisers only.

    Raises:
        TaskFileError: No plain LoRA (LoHa, LoKr, OFT, DoRA, GLoRA, Tucker, whole weights, …), a
            layer nobody knows, NaN, or tensors that do not belong together; one line with reasons.
        MismatchError: It does not fit `base`.
        FileNotFoundError: No such file.
    """
    path = Path(path)
    header = read_foreign_header(path)
    if "diffscaler.format" in header.metadata:
        raise TaskFileError(f"{path.name!r} is a DiffScaler task already; load_task reads it")
    keys, left_out, endings = sort_keys(path.name, header.entries)
    if left_out and (strict or not keys):
        raise TaskFileError(
            f"{path.name!r} changes the text encoder ({left_out['text encoder']} tensors), which a "
            f"task does not" + ("; import it without strict to leave that out" if keys else "")
        )
    if not keys:
        raise TaskFileError(f"{path.name!r} holds no LoRA layer")
    file = LoraFile(path, header, layers_per_block(base))
    tensors = file.tensors(keys)
    keys = file.acting(keys, tensors)
    family, found = file.placed(keys)
    layers, gain = file.layers(found, family, base, tensors)
    if left_out:
        logger.warning(
            "%s: %d text-encoder tensors left out; a task adapts the denoiser only",
            *(path.name, left_out["text encoder"]),
        )
    facts = {"file": path.name, "naming": _naming(keys, endings), "left_out": left_out}
    task = _task(layers, gain, family, file.modelspec(), name or file.title(), facts)
    if base is not None:
        task = _checked(task, base)
    check_in_memory(path.name, flat(task.layers), task.info)
    return task


def is_task_file(path: str | Path) -> bool:
    """Says whether a safetensors file is a DiffScaler task.

    Raises:
        TaskFileError: It is no safetensors file.
        FileNotFoundError: No such file.
    """
    return "diffscaler.format" in read_foreign_header(Path(path)).metadata


def imported_text(task: TaskAdapter) -> str:
    """Returns what an imported task was made of, and what was left out, a fact a line."""
    facts = task.info.get("imported") or {}
    lines = [f"imported from {facts.get('file')} ({facts.get('naming')} naming)"]
    for what, count in (facts.get("left_out") or {}).items():
        lines.append(f"left out: {count} {what} tensors; a task adapts the denoiser only")
    return "\n".join(lines)


def _naming(keys: Mapping[str, Any], endings: list[str]) -> str:
    prefixes = {split_prefix(name)[0] for name in keys}
    if any(PREFIXES[prefix] == "flat" for prefix in prefixes):
        return "kohya"
    if any("diffusion_model." in prefix for prefix in prefixes):
        return "ComfyUI"
    return "diffusers" if any("lora" in ending for ending in endings) else "plain"


def _task(
    layers: Mapping[str, dict[str, Tensor]],
    gain: float,
    family: str,
    modelspec: dict[str, str],
    name: str,
    facts: dict[str, Any],
) -> TaskAdapter:
    parts = parts_of(layers)
    shapes = {
        layer.partition(".")[2]: (len(t["up"]), *t["down"].shape[1:])
        for layer, t in layers.items()
        if "down" in t
    }
    base: dict[str, Any] = {"family": family, "targets": len(layers)}
    if family in FAMILIES:
        base["class"] = FAMILIES[family].classes[0]
    if len(shapes) == len(layers):  # a shift alone does not show its layer's columns
        base["fingerprint"] = fingerprint(shapes)
    info = {
        "name": name,
        "method": "lora" if "subspace" in parts else "bitfit",
        "parts": parts,
        "activation": "identity",
        "gain": gain,
        "scale_includes_bias": False,
        "base": base,
        "naming": "diffusers",
        "imported": facts,
    }
    return TaskAdapter(layers, info, modelspec=modelspec)


def _checked(task: TaskAdapter, base: nn.Module) -> TaskAdapter:
    """Returns the task with the base's own facts, once every layer fits it."""
    own = task.component_layers(component_of(base))
    modules = match_layers(base, {task.name: task}, {task.name: own})
    targets = [as_target(name, module) for name, module in modules.items()]
    return task.with_info(base=base_facts(base, [t for t in targets if t is not None]))
