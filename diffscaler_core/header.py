"""A safetensors header from an untrusted file, read with bounded memory. Knows no key of ours."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from .errors import TaskFileError, first_names, reason_of, shown

MAX_HEADER = 4 * 2**20  # bytes; a real header of 1,000 layers is 0.4 MiB
MAX_ITEMS = 2**18  # JSON values in a header; a real one has about 10 a tensor
#: The same of other tools' files, which may hold whole tag tables; a real one is below 8 MiB.
MAX_ANY_HEADER, MAX_ANY_ITEMS = 16 * 2**20, 2**20
_MOST_DIMENSIONS, _MOST_NUMBERS = 64, 2**56  # of a tensor, whose bytes torch counts in 63 bits
_MOST_DIGITS = 21  # of a whole number: every 64-bit one has fewer
_HALVES = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


class Header(NamedTuple):
    """A safetensors header.

    Attributes:
        entries: Tensor name -> {"dtype", "shape", …}.
        metadata: What the file says of itself.
    """

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]


def read_any_header(path: Path, most: int = MAX_HEADER, items: int = MAX_ITEMS) -> Header:
    """Returns the header of any safetensors file, read with bounded memory.

    Args:
        path: The file.
        most: Bytes the header may have.
        items: JSON values it may have.

    Raises:
        TaskFileError: Not safetensors, cut short, or larger than that.
        FileNotFoundError: No such file.
    """
    header = parse_json(path.name, "header", raw_header(path, most, items))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TaskFileError(f"{path.name!r} has header metadata that is not text")
    if not all(
        isinstance(entry, dict) and "dtype" in entry and _is_shape(entry.get("shape"))
        for entry in header.values()
    ):
        raise TaskFileError(f"{path.name!r} is no safetensors file: its header is malformed")
    return Header(header, metadata)


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(length) is int and length >= 0 for length in shape)
        and math.prod(shape) < _MOST_NUMBERS
    )


def raw_header(path: Path, most: int = MAX_HEADER, items: int = MAX_ITEMS) -> bytes:
    """Returns the header's bytes, once they are known to be few and to be one JSON object.

    Args:
        path: The file.
        most: The most bytes it may have.
        items: The most JSON values.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise TaskFileError(f"{path.name!r} is a folder or a device, not a task file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if start[8:] == b"{" and most < length <= size - 8:
                raise TaskFileError(f"{path.name!r} has a header of {length} bytes: no task has it")
            if start[8:] != b"{" or length > size - 8:
                raise TaskFileError(_what_else(path.name, start, size))
            raw = start[8:] + file.read(length - 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TaskFileError(f"could not read {str(path)!r}: {error.strerror or error}") from error
    if sum(map(raw.count, (b"{", b"[", b","))) > items:
        raise TaskFileError(f"{path.name!r} has more than {items} header items: no task has it")
    return raw


def _what_else(file: str, start: bytes, size: int) -> str:
    if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        return (
            f"{file!r} is a pickle or zip file (.ckpt, .pt), which can run code when loaded; "
            f"DiffScaler reads .safetensors only"
        )
    return f"{file!r} is no safetensors file or is cut short ({size} bytes); download it again"


def parse_json(file: str, what: str, raw: bytes | str) -> dict[str, Any]:
    """Returns a JSON object in which no key stands twice and every number is finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        doubled = [key for key, count in counts.items() if count > 1]
        if doubled:
            raise TaskFileError(f"{file!r} names {first_names(doubled)} twice in its {what}")
        return dict(pairs)

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        parsed = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=_whole,
        )
        if _HALVES.search(text):  # half a character can be neither printed nor written
            json.dumps(parsed, ensure_ascii=False).encode()
    except TaskFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise TaskFileError(f"{file!r} has a {what} that is no JSON: {reason_of(error)}") from error
    if not isinstance(parsed, dict):
        raise TaskFileError(f"{file!r} has a {what} that is no JSON object")
    return parsed


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{shown(text)} is too large a number")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is no number")
    return value
