"""One task, one `.safetensors` file. The only place that knows keys and versions.

Header metadata: `diffscaler.format` (the version), `diffscaler.config` (JSON facts), `modelspec.*`
(Stability's ModelSpec 1.0.0). Tensors: `<component>.<module>.scale|shift|down|up`,
`conditioning.context|pooled`, and reserved `control.…`. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .affiner import ACTIVATIONS, TENSORS
from .errors import TaskFileError, first_names, shown
from .families import FAMILIES
from .methods import METHODS
from .task import TaskAdapter
from .version import __version__

FORMAT = "1"
COMPONENTS = ("transformer", "transformer_2", "unet")
EXTRAS = ("control",)
MAX_HEADER = 4 * 2**20  # bytes; a real header of 1,000 layers is 0.4 MiB
MAX_ITEMS = 2**18  # JSON values in a header; a real one has about 10 a tensor
MAX_CONFIG = 2**20
MAX_NAME = 512
_DTYPES = {"F32", "F16", "BF16"}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

AnyValue = TypeVar("AnyValue")


def save_task(task: TaskAdapter, path: str | Path) -> Path:
    """Writes a task; the file is there whole or not at all.

    Args:
        task: The task.
        path: Where to; must end in `.safetensors`. A file that is there is replaced only once the
            new one is complete on disk.

    Raises:
        TaskFileError: Another ending, a task that could not be loaded again (names, facts, shapes,
            dtypes, NaN, Inf), or the disk refuses; what was there before is then untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TaskFileError(f"{path.name!r} must end in .safetensors")
    tensors = _flatten(task)
    _check_in_memory(path.name, tensors, task.info)
    try:
        _write_whole(path, _encode(task, tensors))
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
    header = read_header(path)
    config = _read_config(path.name, header)
    names = [name for name in header if name != "__metadata__"]
    try:
        with torch.inference_mode(False), safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise TaskFileError(f"{path.name!r} is broken: {reason}; download it again") from error
    _check_finite(path.name, tensors)
    return _build(tensors, config, header["__metadata__"])


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
    _check_in_memory(label, own, config)
    return _build(own, dict(config), {})


def read_info(path: str | Path) -> dict[str, Any]:
    """Returns a task file's facts without reading a tensor: config, modelspec entries, counts.

    Raises:
        TaskFileError: As in `load_task`.
    """
    path = Path(path)
    header = read_header(path)
    config = _read_config(path.name, header)
    layered = [n for n in header if n.partition(".")[0] in COMPONENTS]
    count = sum(math.prod(header[n]["shape"]) for n in layered)
    return {
        **config,
        "modelspec": _modelspec(header["__metadata__"]),
        "layers": len({n.rpartition(".")[0] for n in layered}),
        "parameters": count,
        "bytes": path.stat().st_size,
    }


def read_header(path: str | Path) -> dict[str, Any]:
    """Returns a safetensors header as a dict, read with bounded memory.

    Raises:
        TaskFileError: Not safetensors, cut short, or a header no task has.
    """
    path = Path(path)
    header = _parse_json(path.name, "header", _raw_header(path))
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TaskFileError(f"{path.name!r} has header metadata that is not text")
    if "diffscaler.format" not in metadata:
        raise TaskFileError(
            f"{path.name!r} is no DiffScaler task (no 'diffscaler.format' in its header); "
            f"a LoRA file goes through import first"
        )
    return header


def _raw_header(path: Path) -> bytes:
    """Returns the header's bytes, once they are known to be few and to be one JSON object."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise TaskFileError(f"{path.name!r} is a folder or a device, not a task file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if start[8:] == b"{" and MAX_HEADER < length <= size - 8:
                raise TaskFileError(f"{path.name!r} has a header of {length} bytes: no task has it")
            if start[8:] != b"{" or length > size - 8:
                raise TaskFileError(_what_else(path.name, start, size))
            raw = start[8:] + file.read(length - 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TaskFileError(f"could not read {str(path)!r}: {error.strerror or error}") from error
    if sum(map(raw.count, (b"{", b"[", b","))) > MAX_ITEMS:
        raise TaskFileError(f"{path.name!r} has more than {MAX_ITEMS} header items: no task has it")
    return raw


def _what_else(file: str, start: bytes, size: int) -> str:
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        return (
            f"{file!r} is a pickle or zip file (.ckpt, .pt), which can run code when loaded; "
            f"DiffScaler reads .safetensors only"
        )
    return f"{file!r} is no safetensors file or is cut short ({size} bytes); download it again"


def _parse_json(file: str, what: str, raw: bytes | str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        doubled = [key for key, count in counts.items() if count > 1]
        if doubled:
            raise TaskFileError(f"{file!r} names {first_names(doubled)} twice in its {what}")
        return dict(pairs)

    try:
        parsed = json.loads(
            raw, object_pairs_hook=unique, parse_constant=_finite, parse_float=_finite
        )
    except TaskFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise TaskFileError(f"{file!r} has a {what} that is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise TaskFileError(f"{file!r} has a {what} that is no JSON object")
    return parsed


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no number")
    return value


def _read_config(file: str, header: Mapping[str, Any]) -> dict[str, Any]:
    metadata = header["__metadata__"]
    version = metadata["diffscaler.format"]
    if version != FORMAT:
        raise TaskFileError(
            f"{file!r} has format version {shown(version)}; this release reads {FORMAT!r}: "
            f"update DiffScaler ({__version__}), or save the task again with an older one"
        )
    raw = metadata.get("diffscaler.config", "")
    if len(raw) > MAX_CONFIG:
        raise TaskFileError(f"{file!r} has a config of {len(raw)} characters; no task has that")
    config = _parse_json(file, "config", raw)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    _check_entries(file, entries)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    _check_layers(file, shapes)
    _check_config(file, config, shapes)
    return config


def _check_in_memory(file: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks what is no file yet by the rules for files."""
    entries = {
        name: {"dtype": _dtype_name(t), "shape": list(getattr(t, "shape", ()))}
        for name, t in tensors.items()
    }
    _check_entries(file, entries)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    _check_layers(file, shapes)
    _check_config(file, {**config, "layers": len(_grouped(shapes))}, shapes)
    _check_finite(file, tensors)


def _dtype_name(tensor: Any) -> str:
    names: dict[object, str] = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    dtype = getattr(tensor, "dtype", type(tensor))
    return names.get(dtype, str(dtype))


def _check_config(
    file: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    wanted: dict[str, Any] = {
        "name": str,
        "method": str,
        "activation": str,
        "gain": (int, float),
        "scale_includes_bias": bool,
        "base": Mapping,
        "prompts": (list, tuple),
        "layers": int,
    }
    for key, kind in wanted.items():
        value = config.get(key)
        is_number = isinstance(value, (int, float)) and kind is not bool
        if key in config and (
            not isinstance(value, kind)
            or (is_number and (isinstance(value, bool) or not math.isfinite(value)))
        ):
            raise TaskFileError(f"{file!r}: config entry {key!r} must not be {shown(value)}")
    if "name" not in config or config.get("method") not in METHODS:
        raise TaskFileError(
            f"{file!r}: method {shown(config.get('method'))} and name {shown(config.get('name'))}: "
            f"a task has a name and one of the methods {', '.join(METHODS)}"
        )
    if config.get("activation", "relu") not in ACTIVATIONS:
        raise TaskFileError(
            f"{file!r}: activation {shown(config['activation'])}; known: {', '.join(ACTIVATIONS)}"
        )
    count = len(_grouped(shapes))
    if config.get("layers", count) != count:
        raise TaskFileError(
            f"{file!r} says it has {config['layers']} layers but holds {count}; download it again"
        )
    _check_prompts(file, config.get("prompts", ()), shapes)


def _check_prompts(
    file: str, prompts: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    counts = {shape[0] for name, shape in shapes.items() if name.startswith("conditioning.")}
    if counts - {len(prompts)} or (prompts and not counts):
        raise TaskFileError(
            f"{file!r} names {len(prompts)} prompts but stores {sorted(counts) or 'none'} of them"
        )
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise TaskFileError(f"{file!r} names prompts by something that is not text")
    if not counts and not _grouped(shapes):
        raise TaskFileError(f"{file!r} is empty: no layer and no stored prompt")


def _check_entries(file: str, entries: Mapping[str, Any]) -> None:
    """Checks names, dtypes and that there is a shape, before a tensor is read."""
    if not all(
        isinstance(entry, dict) and _is_shape(entry.get("shape")) for entry in entries.values()
    ):
        raise TaskFileError(f"{file!r} is no safetensors file: its header is malformed")
    foreign = [
        name
        for name in entries
        if len(name) > MAX_NAME or not _NAME.fullmatch(name) or not _is_ours(name)
    ]
    if foreign:
        raise TaskFileError(f"{file!r} holds tensors no task has: {first_names(foreign)}")
    odd = [
        f"{name} ({entry.get('dtype')})"
        for name, entry in entries.items()
        if str(entry.get("dtype")) not in _DTYPES
    ]
    if odd:
        raise TaskFileError(
            f"{file!r} holds {first_names(odd)}; tasks are stored as {', '.join(sorted(_DTYPES))}"
        )


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(length) is int and length > 0 for length in shape)


def _is_ours(name: str) -> bool:
    head, _, rest = name.partition(".")
    if head in COMPONENTS:
        return "." in rest and name.rpartition(".")[2] in TENSORS
    return name in ("conditioning.context", "conditioning.pooled") or (
        head in EXTRAS and bool(rest)
    )


def _check_layers(file: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that each layer's tensors fit each other, collecting what does not."""
    problems = []
    for layer, own in _grouped(shapes).items():
        widths = {shape[:1] for name, shape in own.items() if name != "down"}
        down, up = own.get("down"), own.get("up")
        ndims = {"scale": 1, "shift": 1, "up": 2}
        if any(len(s) != ndims.get(n, len(s)) for n, s in own.items()) or len(widths) > 1:
            problems.append(f"{layer} (shapes do not fit each other)")
        elif (down is None) != (up is None):
            problems.append(f"{layer} (down and up come together)")
        elif down is not None and up is not None and not _is_subspace(down, up):
            problems.append(f"{layer} (down {down}, up {up})")
    for name, ndim in (("conditioning.context", 3), ("conditioning.pooled", 2)):
        if name in shapes and len(shapes[name]) != ndim:
            problems.append(f"{name} ({len(shapes[name])} dimensions, not {ndim})")
    if problems:
        raise TaskFileError(f"{file!r} has {len(problems)} bad layers: {first_names(problems)}")


def _is_subspace(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    return 2 <= len(down) <= 5 and up[1] == down[0]


def _check_finite(file: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TaskFileError(
            f"{file!r} has NaN or Inf in {len(bad)} tensors: {first_names(bad)}; "
            f"its training went wrong, use an earlier checkpoint"
        )


def _grouped(tensors: Mapping[str, AnyValue]) -> dict[str, dict[str, AnyValue]]:
    layers: dict[str, dict[str, AnyValue]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if name.partition(".")[0] in COMPONENTS:
            layers.setdefault(layer, {})[part] = tensor
    return layers


def _build(
    tensors: Mapping[str, Tensor], config: dict[str, Any], metadata: Mapping[str, str]
) -> TaskAdapter:
    conditioning = {
        name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("conditioning.")
    }
    layers = _grouped(tensors)
    extras = {n: t for n, t in tensors.items() if n.partition(".")[0] in EXTRAS}
    return TaskAdapter(layers, config, conditioning, _modelspec(metadata), extras)


def _modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    prefix = "modelspec."
    return {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}


def _flatten(task: TaskAdapter) -> dict[str, Tensor]:
    tensors = {f"{layer}.{n}": t for layer, own in task.layers.items() for n, t in own.items()}
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
        "ranks": _ranks(task),
        "layers": len(task.layers),
    }
    family = FAMILIES.get(str((task.info.get("base") or {}).get("family")))
    architecture = family.modelspec if family else "unknown"
    metadata = {
        "format": "pt",
        "diffscaler.format": FORMAT,
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


def _ranks(task: TaskAdapter) -> dict[str, int]:
    """Returns the commonest rank as "default", and the layers that have another."""
    own = {n.partition(".")[2]: len(t["down"]) for n, t in task.layers.items() if "down" in t}
    default = Counter(own.values()).most_common(1)[0][0] if own else 0
    return {"default": default, **{n: rank for n, rank in own.items() if rank != default}}


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
