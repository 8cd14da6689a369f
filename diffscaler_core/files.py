"""One task, one `.safetensors` file. The only place that knows keys and versions.

Header metadata: `diffscaler.format` (the version), `diffscaler.config` (JSON facts), `modelspec.*`
(Stability's ModelSpec 1.0.0). Tensors: `<component>.<module>.scale|shift|down|up`,
`conditioning.context|pooled`, and reserved `control.…`. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .affiner import ACTIVATIONS, TENSORS
from .errors import TaskFileError, first_names
from .families import FAMILIES
from .methods import METHODS
from .task import TaskAdapter
from .version import __version__

FORMAT = "1"
COMPONENTS = ("transformer", "transformer_2", "unet")
EXTRAS = ("control",)
MAX_HEADER = 8 * 2**20  # bytes; a real header of 1,000 layers is 0.4 MiB
MAX_CONFIG = 2**20
_DTYPES = {"F32", "F16", "BF16"}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def save_task(task: TaskAdapter, path: str | Path) -> Path:
    """Writes a task; the file is there whole or not at all.

    Args:
        task: The task.
        path: Where to; must end in `.safetensors`. A file that is there is replaced only once the
            new one is complete on disk.

    Raises:
        TaskFileError: Another ending, tensors that could not be loaded again (wrong shapes,
            NaN, Inf), or the disk refuses; what was there before is then untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise TaskFileError(f"{path.name!r} must end in .safetensors")
    tensors = _flatten(task)
    _check_layers(path.name, tensors)
    _check_finite(path.name, tensors)
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
    _check_names(path.name, {name: header[name] for name in names})
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TaskFileError(f"{path.name!r} is broken: {error}; download it again") from error
    _check_layers(path.name, tensors)
    _check_finite(path.name, tensors)
    return _build(path.name, tensors, config, header["__metadata__"])


def read_info(path: str | Path) -> dict[str, Any]:
    """Returns a task file's facts without reading a tensor: config, modelspec entries, counts.

    Raises:
        TaskFileError: As in `load_task`.
    """
    path = Path(path)
    header = read_header(path)
    config = _read_config(path.name, header)
    layered = [n for n in header if n.partition(".")[0] in COMPONENTS]
    count = sum(_numel(header[n]["shape"]) for n in layered)
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
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise TaskFileError(
                f"{path.name!r} is a pickle or zip file (.ckpt, .pt), which can run code when "
                f"loaded; DiffScaler reads .safetensors only"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise TaskFileError(
                f"{path.name!r} is no safetensors file or is cut short ({size} bytes); "
                f"download it again"
            )
        if length > MAX_HEADER:
            raise TaskFileError(f"{path.name!r} has a header of {length} bytes; no task has that")
        raw = file.read(length)
    header = _parse_json(path.name, "header", raw)
    if not all(isinstance(entry, dict) for entry in header.values()):
        raise TaskFileError(f"{path.name!r} is no safetensors file: its header is malformed")
    metadata = header.setdefault("__metadata__", {})
    if "diffscaler.format" not in metadata:
        raise TaskFileError(
            f"{path.name!r} is no DiffScaler task (no 'diffscaler.format' in its header); "
            f"a LoRA file goes through import first"
        )
    return header


def _parse_json(file: str, what: str, raw: bytes | str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        doubled = [key for key, count in counts.items() if count > 1]
        if doubled:
            raise TaskFileError(f"{file!r} names {first_names(doubled)} twice in its {what}")
        return dict(pairs)

    try:
        parsed = json.loads(raw, object_pairs_hook=unique, parse_constant=_no_constant)
    except TaskFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise TaskFileError(f"{file!r} has a {what} that is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise TaskFileError(f"{file!r} has a {what} that is no JSON object")
    return parsed


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _read_config(file: str, header: Mapping[str, Any]) -> dict[str, Any]:
    metadata = header["__metadata__"]
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TaskFileError(f"{file!r} has header metadata that is not text")
    version = metadata["diffscaler.format"]
    if version != FORMAT:
        raise TaskFileError(
            f"{file!r} has format version {version!r}; this release reads {FORMAT!r}: "
            f"update DiffScaler ({__version__}), or save the task again with an older one"
        )
    raw = metadata.get("diffscaler.config", "")
    if len(raw) > MAX_CONFIG:
        raise TaskFileError(f"{file!r} has a config of {len(raw)} characters; no task has that")
    config = _parse_json(file, "config", raw)
    _check_config(file, config)
    return config


def _check_config(file: str, config: Mapping[str, Any]) -> None:
    wanted: dict[str, Any] = {
        "name": str,
        "method": str,
        "activation": str,
        "gain": (int, float),
        "base": dict,
        "prompts": list,
    }
    for key, kind in wanted.items():
        if key in config and (not isinstance(config[key], kind) or config[key] is True):
            raise TaskFileError(f"{file!r}: config entry {key!r} is {config[key]!r:.60}")
    if "name" not in config or config.get("method") not in METHODS:
        raise TaskFileError(
            f"{file!r}: method {config.get('method')!r} and name {config.get('name')!r}: a task has "
            f"a name and one of the methods {', '.join(METHODS)}"
        )
    if config.get("activation", "relu") not in ACTIVATIONS:
        raise TaskFileError(
            f"{file!r}: activation {config['activation']!r}; known: {', '.join(ACTIVATIONS)}"
        )


def _check_names(file: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks names and dtypes before a tensor is read."""
    foreign = [name for name in entries if not _NAME.fullmatch(name) or not _is_ours(name)]
    if foreign:
        raise TaskFileError(f"{file!r} holds tensors no task has: {first_names(foreign)}")
    odd = [f"{n} ({e.get('dtype')})" for n, e in entries.items() if e.get("dtype") not in _DTYPES]
    if odd:
        raise TaskFileError(
            f"{file!r} holds {first_names(odd)}; tasks are stored as {', '.join(sorted(_DTYPES))}"
        )


def _is_ours(name: str) -> bool:
    head, _, rest = name.partition(".")
    if head in COMPONENTS:
        return "." in rest and name.rpartition(".")[2] in TENSORS
    return name in ("conditioning.context", "conditioning.pooled") or (
        head in EXTRAS and bool(rest)
    )


def _check_layers(file: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks that each layer's tensors fit each other, collecting what does not."""
    problems = []
    for layer, own in _grouped(tensors).items():
        widths = {t.shape[0] for n, t in own.items() if n != "down" and t.ndim}
        down, up = own.get("down"), own.get("up")
        ranks = {"scale": 1, "shift": 1, "up": 2}
        if any(t.ndim != ranks.get(n, t.ndim) for n, t in own.items()) or len(widths) > 1:
            problems.append(f"{layer} (shapes do not fit each other)")
        elif (down is None) != (up is None):
            problems.append(f"{layer} (down and up come together)")
        elif down is not None and up is not None and not _is_subspace(down, up):
            problems.append(f"{layer} (down {tuple(down.shape)}, up {tuple(up.shape)})")
    for name, ndim in (("conditioning.context", 3), ("conditioning.pooled", 2)):
        if name in tensors and tensors[name].ndim != ndim:
            problems.append(f"{name} ({tensors[name].ndim} dimensions, not {ndim})")
    if problems:
        raise TaskFileError(f"{file!r} has {len(problems)} bad layers: {first_names(problems)}")


def _is_subspace(down: Tensor, up: Tensor) -> bool:
    return 2 <= down.ndim <= 5 and up.shape[1] == down.shape[0] and 0 not in down.shape


def _check_finite(file: str, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TaskFileError(
            f"{file!r} has NaN or Inf in {len(bad)} tensors: {first_names(bad)}; "
            f"its training went wrong, use an earlier checkpoint"
        )


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if name.partition(".")[0] in COMPONENTS:
            layers.setdefault(layer, {})[part] = tensor
    return layers


def _build(
    file: str, tensors: Mapping[str, Tensor], config: dict[str, Any], metadata: Mapping[str, str]
) -> TaskAdapter:
    conditioning = {
        name.partition(".")[2]: t for name, t in tensors.items() if name.startswith("conditioning.")
    }
    prompts = config.get("prompts") or []
    counts = {len(t) for t in conditioning.values()}
    if counts - {len(prompts)} or not all(isinstance(prompt, str) for prompt in prompts):
        raise TaskFileError(
            f"{file!r} names {len(prompts)} prompts but stores {sorted(counts) or 'none'} of them"
        )
    layers = _grouped(tensors)
    if not layers and not conditioning:
        raise TaskFileError(f"{file!r} is empty: no layer and no stored prompt")
    extras = {n: t for n, t in tensors.items() if n.partition(".")[0] in EXTRAS}
    return TaskAdapter(layers, config, conditioning, _modelspec(metadata), extras)


def _modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    prefix = "modelspec."
    return {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}


def _flatten(task: TaskAdapter) -> dict[str, Tensor]:
    tensors = {f"{layer}.{n}": t for layer, own in task.layers.items() for n, t in own.items()}
    tensors |= {f"conditioning.{name}": tensor for name, tensor in task.conditioning.items()}
    tensors |= dict(task.extras)
    return {name: t.detach().to("cpu").contiguous() for name, t in sorted(tensors.items())}


def _encode(task: TaskAdapter, tensors: dict[str, Tensor]) -> bytes:
    config = {**task.info, "prompts": list(task.prompts), "ranks": _ranks(task)}
    family = FAMILIES.get(str((task.info.get("base") or {}).get("family")))
    architecture = family.modelspec if family else "unknown"
    metadata = {
        "format": "pt",
        "diffscaler.format": FORMAT,
        "diffscaler.config": json.dumps(config, sort_keys=True, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/diffscaler",
        "modelspec.implementation": "diffscaler",
        "modelspec.title": task.name,
        **{f"modelspec.{key}": value for key, value in sorted(task.modelspec.items())},
    }
    plain = save(tensors, metadata)
    data = plain[8 + int.from_bytes(plain[:8], "little") :]
    metadata["modelspec.hash_sha256"] = "0x" + hashlib.sha256(data).hexdigest()
    return save(tensors, metadata)


def _ranks(task: TaskAdapter) -> dict[str, int]:
    """Returns the commonest rank as "default", and the layers that have another."""
    own = {n.partition(".")[2]: len(t["down"]) for n, t in task.layers.items() if "down" in t}
    default = Counter(own.values()).most_common(1)[0][0] if own else 0
    return {"default": default, **{n: rank for n, rank in own.items() if rank != default}}


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _numel(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
