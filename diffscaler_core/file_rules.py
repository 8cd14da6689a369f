"""What a task file may hold: its keys, dtypes, shapes and facts. Rules only; reads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .affiner import ACTIVATIONS, TENSORS
from .classes import CLASSES, ROWS
from .errors import DiffScalerError, TaskFileError, first_names, shown
from .methods import METHODS
from .task import CONTROL_EMBEDDINGS
from .windows import read_windows

COMPONENTS = ("transformer", "transformer_2", "unet")
EXTRAS = ("control", "classes")
MAX_NAME = 512
MAX_WORD = 200
_DTYPES = {"F32", "F16", "BF16"}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

AnyValue = TypeVar("AnyValue")


def check_config(
    file: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks the facts, and that they agree with the tensors there are."""
    wanted: dict[str, Any] = {
        "name": str,
        "method": str,
        "activation": str,
        "gain": (int, float),
        "scale_includes_bias": bool,
        "base": Mapping,
        "prompts": (list, tuple),
        "layers": int,
        "parts": (list, tuple),
        "extracted": Mapping,
        "training": (Mapping, type(None)),  # a combined task had no training of its own
    }
    for key, kind in wanted.items():
        value = config.get(key)
        is_number = isinstance(value, (int, float)) and kind is not bool
        if key in config and (
            not isinstance(value, kind)
            or (is_number and (isinstance(value, bool) or not math.isfinite(value)))
        ):
            raise TaskFileError(f"{file!r}: config entry {key!r} must not be {shown(value)}")
    _check_words(file, config)
    _check_sources(file, config)
    if "name" not in config or str(config.get("method")) not in METHODS:
        raise TaskFileError(
            f"{file!r}: method {shown(config.get('method'))} and name {shown(config.get('name'))}: "
            f"a task has a name and one of the methods {', '.join(METHODS)}"
        )
    if not all(isinstance(part, str) for part in config.get("parts", ())):
        raise TaskFileError(f"{file!r}: config entry 'parts' must not be {shown(config['parts'])}")
    if config.get("activation", "relu") not in ACTIVATIONS:
        raise TaskFileError(
            f"{file!r}: activation {shown(config['activation'])}; known: {', '.join(ACTIVATIONS)}"
        )
    count = len(grouped(shapes))
    if config.get("layers", count) != count:
        raise TaskFileError(
            f"{file!r} says it has {config['layers']} layers but holds {count}; download it again"
        )
    _check_prompts(file, config.get("prompts", ()), shapes)
    _check_control(file, config.get("control"), grouped(shapes, "control."))
    _check_windows(file, config.get("windows"), grouped(shapes))
    rows = {name: shape for name, shape in shapes.items() if name.startswith(CLASSES)}
    _check_classes(file, config.get("classes"), config.get("class_table"), rows)


def _check_words(file: str, config: Mapping[str, Any]) -> None:
    """Checks what messages quote of a file: short words on one line."""
    for key, names in (("base", ("family", "class", "fingerprint")), ("control", ("kind",))):
        facts = config.get(key) or {}
        told = {n: facts[n] for n in names if n in facts} if isinstance(facts, Mapping) else {}
        for name, value in told.items():
            if value is not None and not (
                isinstance(value, str) and value.isprintable() and len(value) <= MAX_WORD
            ):
                raise TaskFileError(
                    f"{file!r}: config entry {key!r} must not be of {name} {shown(value)}"
                )


def _check_sources(file: str, config: Mapping[str, Any]) -> None:
    """Checks what the file says it was combined from: tasks' names and strengths."""
    for key in ("combined_from", "averaged_from"):
        sources = config.get(key) or ()
        if not isinstance(sources, (list, tuple)) or not all(
            isinstance(one, Mapping) and type(one.get("weight", 1)) in (int, float)
            for one in sources
        ):
            raise TaskFileError(f"{file!r}: config entry {key!r} must not be {shown(sources)}")


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
    if not counts and not any(name.partition(".")[0] in (*COMPONENTS, *EXTRAS) for name in shapes):
        raise TaskFileError(f"{file!r} is empty: no layer, no stored prompt and no new class")


def _check_control(
    file: str, facts: Any, layers: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    """Checks that a control task says what it is, and that no other does."""
    if bool(facts) != bool(layers):
        raise TaskFileError(
            f"{file!r} {'says it takes a control' if facts else 'says nothing of a control'}, but "
            f"holds {len(layers)} control affiners; download it again"
        )
    if not facts:
        return
    if not isinstance(facts, Mapping) or not isinstance(facts.get("kind", ""), str):
        raise TaskFileError(f"{file!r}: config entry 'control' must not be {shown(facts)}")
    for key, known in (("activation", (*ACTIVATIONS,)), ("embedding", CONTROL_EMBEDDINGS)):
        if facts.get(key, known[0]) not in known:
            raise TaskFileError(
                f"{file!r}: the control's {key} {shown(facts[key])}; known: {', '.join(known)}"
            )
    gain = facts.get("gain", 1.0)
    if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not math.isfinite(gain):
        raise TaskFileError(f"{file!r}: the control's gain must not be {shown(gain)}")
    components = [name.split(".")[1] for name in layers]
    if len(set(components)) < len(components):
        raise TaskFileError(f"{file!r} has two control affiners for one model; a task has one")


def _check_windows(
    file: str, facts: Any, layers: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    """Checks that there is a window for each hidden unit, and none for any other."""
    if facts is None:
        return
    try:
        windows = read_windows(facts)
    except DiffScalerError as error:
        raise TaskFileError(f"{file!r}: config entry 'windows': {error}") from error
    ranks = {name: own["down"][0] for name, own in layers.items() if "down" in own}
    odd = [name for name, rank in ranks.items() if windows.of(name).rank != rank]
    odd += [name for name in windows.runs if name != "default" and name not in ranks]
    if odd or not ranks:
        raise TaskFileError(
            f"{file!r}: config entry 'windows' tells of other hidden units than there are, in "
            f"{len(odd)} layers: {first_names(odd) or 'it has no subspace'}"
        )


def _check_classes(
    file: str, classes: Any, table: Any, rows: Mapping[str, tuple[int, ...]]
) -> None:
    """Checks that new classes have names and numbers, and that there are rows for just these."""
    for key, value in (("classes", classes), ("class_table", table)):
        if value and not (
            isinstance(value, Mapping)
            and all(isinstance(name, str) and _is_count(number) for name, number in value.items())
        ):
            raise TaskFileError(f"{file!r}: config entry {key!r} must not be {shown(value)}")
    if bool(rows) != bool(table):
        raise TaskFileError(
            f"{file!r} {'says it brings classes' if table else 'says nothing of new classes'}, but "
            f"holds {len(rows)} tables of them; download it again"
        )
    if not rows:
        return
    size, start = table.get("size", 0), table.get("start", -1)
    new = sorted(number for number in (classes or {}).values() if number >= size)
    held = sorted({shape[0] for shape in rows.values()})
    if len(held) > 1 or new != list(range(size, size + held[0])) or not 0 <= start < size:
        raise TaskFileError(
            f"{file!r} numbers {len(new)} new classes {first_names(new)} after the base's {size}, "
            f"from class {start}, but holds rows for {' or '.join(map(str, held))}"
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def check_entries(file: str, entries: Mapping[str, Any]) -> None:
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
    if name.startswith(CLASSES):
        return rest.partition(".")[0] in COMPONENTS and rest.endswith(f".{ROWS}")
    if head in EXTRAS:
        return rest.partition(".")[0] in COMPONENTS and _is_ours(rest)
    return name in ("conditioning.context", "conditioning.pooled")


def check_layers(file: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that each layer's tensors fit each other, collecting what does not."""
    problems = []
    for layer, own in (grouped(shapes) | grouped(shapes, "control.")).items():
        widths = {shape[:1] for name, shape in own.items() if name != "down"}
        down, up = own.get("down"), own.get("up")
        ndims = {"scale": 1, "shift": 1, "up": 2}
        if any(len(s) != ndims.get(n, len(s)) for n, s in own.items()) or len(widths) > 1:
            problems.append(f"{layer} (shapes do not fit each other)")
        elif (down is None) != (up is None):
            problems.append(f"{layer} (down and up come together)")
        elif down is not None and up is not None and not _is_subspace(down, up):
            problems.append(f"{layer} (down {down}, up {up})")
    ndims = {"conditioning.context": 3, "conditioning.pooled": 2}
    ndims |= {name: 2 for name in shapes if name.startswith(CLASSES)}
    for name, ndim in ndims.items():
        if name in shapes and len(shapes[name]) != ndim:
            problems.append(f"{name} ({len(shapes[name])} dimensions, not {ndim})")
    if problems:
        raise TaskFileError(f"{file!r} has {len(problems)} bad layers: {first_names(problems)}")


def _is_subspace(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    return 2 <= len(down) <= 5 and up[1] == down[0]


def check_finite(file: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuses NaN and Inf."""
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise TaskFileError(
            f"{file!r} has NaN or Inf in {len(bad)} tensors: {first_names(bad)}; "
            f"its training went wrong, use an earlier checkpoint"
        )


def check_in_memory(file: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks what is no file yet by the rules for files."""
    entries = {
        name: {"dtype": _dtype_name(t), "shape": list(getattr(t, "shape", ()))}
        for name, t in tensors.items()
    }
    check_entries(file, entries)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    check_layers(file, shapes)
    check_config(file, {**config, "layers": len(grouped(shapes))}, shapes)
    check_finite(file, tensors)


def _dtype_name(tensor: Any) -> str:
    names: dict[object, str] = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    dtype = getattr(tensor, "dtype", type(tensor))
    return names.get(dtype, str(dtype))


def grouped(tensors: Mapping[str, AnyValue], prefix: str = "") -> dict[str, dict[str, AnyValue]]:
    """Returns what belongs to layers: layer -> part -> value.

    Args:
        tensors: Name -> value.
        prefix: "" or "control.", for the control affiners.
    """
    layers: dict[str, dict[str, AnyValue]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if name.startswith(prefix) and name[len(prefix) :].partition(".")[0] in COMPONENTS:
            layers.setdefault(layer, {})[part] = tensor
    return layers
