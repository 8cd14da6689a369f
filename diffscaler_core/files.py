"""One task, one `.safetensors` file. The only place that knows keys and versions.

Header metadata: `diffscaler.format` (the version), `diffscaler.config` (JSON facts), `modelspec.*`
(Stability's ModelSpec 1.0.0). Tensors: `<component>.<module>.scale|shift|down|up`,
`conditioning.context|pooled`, `control.…` and `classes.…`. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from .atomic import write_whole
from .errors import TaskFileError, reason_of, shown
from .families import FAMILIES
from .file_rules import (
    COMPONENTS,
    EXTRAS,
    check_config,
    check_entries,
    check_finite,
    check_in_memory,
    check_layers,
    grouped,
)
from .header import Header, parse_json, read_any_header
from .task import TaskAdapter, flat, rank_facts
from .tensor_file import ChangedError, read_tensors
from .version import __version__

FORMAT = "1"
#: Of a task whose hidden units act by noise level: a reader that runs them all would be wrong.
FORMAT_WINDOWS = "2"
MAX_CONFIG = 2**20
_TRIES = 20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_task(task: TaskAdapter, path: str | Path, *, replace: bool = True) -> Path:
    """Writes a task; the file is there whole or not at all.

    Args:
        task: The task.
        path: Where to; must end in `.safetensors`. A file that is there is replaced only once the
            new one is complete on disk.
        replace: False: a file that is there is not replaced.

    Raises:
        FileExistsError: There is one, and it may not be replaced.
        TaskFileError: Another ending, a task that could not be loaded again (names, facts, shapes,
            dtypes, NaN, Inf), or the disk refuses; what was there before is then untouched.
    """
    path = safetensors_path(path)
    tensors = _flatten(task)
    check_in_memory(path.name, tensors, task.info)
    return write_file(path, _encode(task, tensors), replace=replace)


def safetensors_path(path: str | Path) -> Path:
    """Returns where a file is to go.

    Raises:
        TaskFileError: Another ending than `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TaskFileError(f"{path.name!r} must end in .safetensors")
    return path


def write_file(path: Path, data: bytes, *, replace: bool = True) -> Path:
    """Writes a file whole or not at all, and returns its path.

    Raises:
        FileExistsError: There is one, and it may not be replaced.
        TaskFileError: The disk refuses; what was there before is untouched.
    """
    try:
        write_whole(path, data, replace=replace)
    except FileExistsError:
        raise
    except OSError as error:
        raise TaskFileError(
            f"could not write {str(path)!r}: {error.strerror or error}; nothing was changed there"
        ) from error
    return path


def load_task(path: str | Path) -> TaskAdapter:
    """Reads a task file; all or nothing, and the header is checked before any tensor is read.

    Raises:
        TaskFileError: Not a task file, broken, an unknown version, or tensors that cannot be right;
            one line that says which and what to do.
        FileNotFoundError: No such file.
    """
    path = Path(path)
    for _ in range(_TRIES):
        with contextlib.suppress(ChangedError):  # somebody saved it just now
            return _loaded(path)
    raise TaskFileError(f"{path.name!r} changed while it was read, again and again; load it later")


def _loaded(path: Path) -> TaskAdapter:
    """Returns the task of a file, all of it as the file was at one moment.

    Raises:
        ChangedError: Somebody replaced it meanwhile.
    """
    header = read_header(path)
    config = _read_config(path.name, header)
    try:
        tensors = read_tensors(path, header)
    except ChangedError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TaskFileError(
            f"{path.name!r} is broken: {reason_of(error)}; download it again"
        ) from error
    check_finite(path.name, tensors)
    return _build(tensors, config, header.metadata)


def task_from_tensors(tensors: Mapping[str, Any], label: str) -> TaskAdapter:
    """Returns the task of a file's tensors held in memory, with its facts under "config".

    Args:
        tensors: A task file's keys and tensors, and "config": the facts, as `TaskAdapter.info`.
        label: What messages call it.

    Raises:
        TaskFileError: As in `load_task`.
    """
    config = tensors.get("config")
    if not isinstance(config, Mapping):
        raise TaskFileError(
            f"{label} has no facts: put the task's info (name, method, activation …) under 'config'"
        )
    own = {name: tensor for name, tensor in tensors.items() if name != "config"}
    check_in_memory(label, own, config)
    return _build(own, dict(config), {})


def read_info(path: str | Path) -> dict[str, Any]:
    """Returns a task file's facts without reading a tensor: config, modelspec entries, counts.

    Raises:
        TaskFileError: As in `load_task`.
    """
    path = Path(path)
    header = read_header(path)
    config = _read_config(path.name, header)
    layered = [n for n in header.entries if n.partition(".")[0] in COMPONENTS]
    count = sum(math.prod(header.entries[n]["shape"]) for n in layered)
    return {
        **config,
        "modelspec": _modelspec(header.metadata),
        "layers": len({n.rpartition(".")[0] for n in layered}),
        "parameters": count,
        "bytes": path.stat().st_size,
    }


def outline_task(path: str | Path) -> TaskAdapter:
    """Returns a task as its header tells it: its facts, and tensors that have shapes but no values.

    Raises:
        TaskFileError: As in `load_task`, for what a header can show.
        FileNotFoundError: No such file.
    """
    path = Path(path)
    header = read_header(path)
    config = _read_config(path.name, header)
    hollow = {
        name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
        for name, entry in header.entries.items()
    }
    return _build(hollow, config, header.metadata)


def read_header(path: str | Path) -> Header:
    """Returns a task file's header, read with bounded memory.

    Raises:
        TaskFileError: Not safetensors, cut short, or a header no task has.
    """
    path = Path(path)
    header = read_any_header(path)
    if "diffscaler.format" not in header.metadata:
        raise TaskFileError(
            f"{path.name!r} is no DiffScaler task (no 'diffscaler.format' in its header); "
            f"a LoRA file becomes one by import_lora(path), or by: diffscaler convert "
            f"{path.name} task.safetensors"
        )
    return header


def _read_config(file: str, header: Header) -> dict[str, Any]:
    entries, metadata = header
    version = metadata["diffscaler.format"]
    if version not in (FORMAT, FORMAT_WINDOWS):
        raise TaskFileError(
            f"{file!r} has format version {shown(version)}; this release reads {FORMAT!r} and "
            f"{FORMAT_WINDOWS!r}: update DiffScaler ({__version__}), or save the task again with "
            f"an older one"
        )
    raw = metadata.get("diffscaler.config", "")
    if len(raw) > MAX_CONFIG:
        raise TaskFileError(f"{file!r} has a config of {len(raw)} characters; no task has that")
    config = parse_json(file, "config", raw)
    check_entries(file, entries)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    check_layers(file, shapes)
    check_config(file, config, shapes)
    if (config.get("windows") is not None) != (version == FORMAT_WINDOWS):
        raise TaskFileError(
            f"{file!r} has format version {version!r}, which is that of tasks "
            f"{'without' if version == FORMAT else 'with'} windows; download it again"
        )
    return config


def _build(
    tensors: Mapping[str, Tensor], config: dict[str, Any], metadata: Mapping[str, str]
) -> TaskAdapter:
    conditioning = {
        name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("conditioning.")
    }
    layers = grouped(tensors)
    extras = {n: t for n, t in tensors.items() if n.partition(".")[0] in EXTRAS}
    return TaskAdapter(layers, config, conditioning, _modelspec(metadata), extras)


def _modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    prefix = "modelspec."
    return {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}


def _flatten(task: TaskAdapter) -> dict[str, Tensor]:
    tensors = flat(task.layers)
    tensors |= {f"conditioning.{name}": tensor for name, tensor in task.conditioning.items()}
    tensors |= dict(task.extras)
    # copies, as safetensors refuses tensors that share memory, and those of one task may
    return {
        name: t.detach().to("cpu", copy=True).contiguous() for name, t in sorted(tensors.items())
    }


def _encode(task: TaskAdapter, tensors: dict[str, Tensor]) -> bytes:
    config = {
        **task.info,
        "prompts": list(task.prompts),
        "ranks": rank_facts(task.layers),
        "layers": len(task.layers),
    }
    family = FAMILIES.get(str((task.info.get("base") or {}).get("family")))
    architecture = family.modelspec if family else "unknown"
    metadata = {
        "format": "pt",
        "diffscaler.format": FORMAT_WINDOWS if task.is_timed else FORMAT,
        "diffscaler.config": _to_json(config),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/diffscaler",
        "modelspec.implementation": "diffscaler",
        "modelspec.title": task.name,
        **{f"modelspec.{key}": str(value) for key, value in task.modelspec.items()},
    }
    plain = save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    metadata["modelspec.hash_sha256"] = "0x" + hashlib.sha256(plain[start:]).hexdigest()
    # safetensors writes metadata in random order; written here, the same task is the same bytes
    entries = {"__metadata__": dict(sorted(metadata.items())), **json.loads(plain[8:start])}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[start:]


def _to_json(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TaskFileError(f"the task's info cannot be written as JSON: {error}") from error
