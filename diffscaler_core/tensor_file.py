"""The tensors of a small safetensors file, in memory of their own.

safetensors maps a file into memory instead of reading it. Whoever writes into the file later then
changes what was loaded, whoever cuts it short ends the process (SIGBUS), and Windows lets nobody
replace it. Tasks stay loaded for long and their files are overwritten, so they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from .header import MAX_ANY_HEADER, Header

_WIDEST = 16  # bytes of a complex128


class ChangedError(ValueError):
    """A file is another one than the header that was read of it said."""


def read_tensors(
    path: Path, header: Header, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Returns tensors of a file as its header told them.

    Args:
        path: The file.
        header: From `read_any_header`.
        names: Which tensors; None: all.

    Raises:
        SafetensorError: The file is broken.
        OSError: It cannot be read, or has gone.
        ValueError: It is far larger than its header says, or holds what nobody knows.
        ChangedError: Another file took its place since its header was read.
    """
    entries = header.entries
    most = 8 + MAX_ANY_HEADER + _WIDEST * sum(math.prod(e["shape"]) for e in entries.values())
    if path.stat().st_size > most:
        raise ValueError("it is larger than its header says")
    try:
        with torch.inference_mode(False):
            data = path.read_bytes()
            found = load(data)
    except (AssertionError, KeyError) as error:
        raise ValueError(f"tensors of a kind nobody knows ({error})") from error
    told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if told.pop("__metadata__", {}) != header.metadata or told != entries:
        raise ChangedError("it changed while it was read")
    return {name: found[name] for name in (entries if names is None else names)}
