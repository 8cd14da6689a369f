"""What encoders gave, kept on disk: latents of pictures, conditions of texts.

One small safetensors file per entry. Its name is a hash of all that decides what is in it, so a
changed picture, size or encoder finds nothing and is encoded anew; files are never out of date. The
folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ...atomic import write_whole
from ...errors import DiffScalerError

logger = logging.getLogger(__name__)

#: Of what is cached and how; another number finds none of the old files.
VERSION = 2
_MARK = "diffscaler.cache"
_SAMPLES = 256
_SUMMED = 2 << 30


def digest_of(*parts: str | bytes | int | None) -> str:
    """Returns a hash (hex) of parts; their borders matter."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part).encode()
        digest.update(f"{type(part).__name__} {len(data)} ".encode() + data)
    return digest.hexdigest()


def encoder_key(module: nn.Module) -> str | None:
    """Returns what tells an encoder and its weights from any other, or None if it cannot be told.

    From its class, its config, and of every tensor the name, shape, dtype and values: all of them,
    as a sum of their bits, up to 2 GiB of tensors; of larger encoders a sample of each tensor.
    It cannot be told of weights that are not there to be read (offloaded, on the meta device), or
    that are packed.
    """
    try:
        return _key_of(module)
    # Packed tensor classes refuse indexing and views, each with an error of its own kind.
    except (KeyError, NotImplementedError, RuntimeError, TypeError):
        return None


@torch.no_grad()
def _key_of(module: nn.Module) -> str | None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[str | bytes | int | None] = [type(module).__qualname__, _config_of(module)]
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
        parts += [name, str(tuple(tensor.shape)), str(tensor.dtype)]
        parts += [sample.view(torch.uint8).numpy().tobytes()]
        if total <= _SUMMED:
            parts.append(int(_bits(flat).sum(dtype=torch.int64)))
    return digest_of(*parts)


def _bits(flat: Tensor) -> Tensor:
    """Returns a tensor's bits as integers of its own width: their sum is exact on any device."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.contiguous().view(kinds[flat.element_size()])


def _config_of(module: nn.Module) -> str:
    config: Any = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        return str(type(config))
    # Private entries say where it was loaded from and by which version: no matter for its output.
    told = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
    return json.dumps(told, sort_keys=True, default=str)


class Cache:
    """A folder of tensors by key. Reading never fails: what is missing or broken is not there.

    Attributes:
        folder: Where; made when the first entry is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._writable = True

    def path(self, key: str) -> Path:
        """Returns the file of a key (hex)."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def shape(self, key: str) -> torch.Size | None:
        """Returns the shape of an entry's only tensor, or None; reads just the file's header."""
        try:
            with safe_open(self.path(key), "pt") as file:
                names = list(file.keys())
                if (file.metadata() or {}).get(_MARK) != f"{VERSION} {key}" or len(names) != 1:
                    return None
                return torch.Size(file.get_slice(names[0]).get_shape())
        except (OSError, SafetensorError):
            return None

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Returns an entry's tensors, or None if it is missing, broken, or not ours."""
        try:
            data = self.path(key).read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            marks = header["__metadata__"]
            if marks[_MARK] != f"{VERSION} {key}":
                return None
            if marks["crc32"] != _sum_of(header, data[8 + length :]):
                return None
            return load_tensors(data)
        # A foreign file may be anything at all.
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Writes an entry whole or not at all; returns whether it is there now.

        The first failure (a full or read-only disk) is warned about, and is the last try.
        """
        if not self._writable:
            return False
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        plain = save_tensors(held)
        start = 8 + int.from_bytes(plain[:8], "little")
        total = _sum_of(json.loads(plain[8:start]), plain[start:])
        marks = {_MARK: f"{VERSION} {key}", "crc32": total}
        try:
            write_whole(self.path(key), save_tensors(held, marks))
        except OSError as error:
            self._writable = False
            logger.warning(
                "nothing more is cached in %r: %s; training goes on from memory",
                str(self.folder),
                error.strerror or error,
            )
        return self._writable


def _sum_of(header: Mapping[str, Any], body: bytes) -> str:
    """Returns a checksum of tensors and of what the header says of them: dtype, shape, place."""
    told = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return str(zlib.crc32(json.dumps(told, sort_keys=True).encode(), zlib.crc32(body)))


class StoredLatents:
    """Latents (V, N, C, h, w) of which some lie on disk, and are read when a batch needs them.

    Attributes:
        cache: Where.
        entries: Per view, per picture: the latents (C, h, w), or their key in the cache.
        shape: (V, N, C, h, w).
    """

    def __init__(
        self, cache: Cache, entries: Sequence[Sequence[Tensor | str]], shape: Sequence[int]
    ) -> None:
        self.cache, self.entries = cache, entries
        self.shape = torch.Size((len(entries), len(entries[0]), *shape))

    def __getitem__(self, at: tuple[Tensor, Tensor]) -> Tensor:
        """Returns [views (B,), rows (B,)] -> (B, C, h, w), float32.

        Raises:
            DiffScalerError: A file that was there has gone or broken.
        """
        views, rows = at
        pairs = zip(views.tolist(), rows.tolist(), strict=True)
        return torch.stack([self._read(self.entries[view][row]) for view, row in pairs])

    def subset(self, rows: Tensor) -> StoredLatents:
        """Returns those of some pictures."""
        chosen = [[view[row] for row in rows.tolist()] for view in self.entries]
        return StoredLatents(self.cache, chosen, self.shape[2:])

    def _read(self, entry: Tensor | str) -> Tensor:
        if isinstance(entry, Tensor):
            return entry
        found = self.cache.get(entry)
        if found is None or "x0" not in found or found["x0"].shape != self.shape[2:]:
            path = self.cache.path(entry)
            raise DiffScalerError(
                f"the cached latents {path.name!r} in {str(self.cache.folder)!r} are gone or "
                f"broken; delete that file if it is there, and start again"
            )
        return found["x0"]


def cached_texts(
    encode_text: Callable[[list[str]], dict[str, Tensor]],
    texts: Sequence[str],
    key: str | None,
    folder: str | Path | None,
    *,
    batch: int = 64,
) -> dict[str, Tensor]:
    """Returns the texts' conditions on the CPU, one row each; only new ones are encoded.

    Args:
        encode_text: Texts -> "context" (B, L, D), …; as in `Denoiser`.
        texts: Which.
        key: Names the text encoder, from `encoder_key`; None: nothing is cached.
        folder: Where; None: nothing is cached.
        batch: Texts encoded at a time.
    """
    if key is None or folder is None or not texts:
        return encode_text(list(texts))
    cache = Cache(folder)
    keys = {text: digest_of("text", key, text) for text in texts}
    rows = {text: cache.get(name) for text, name in keys.items()}
    missing = [text for text, row in rows.items() if row is None]
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        encoded = encode_text(part)
        for i, text in enumerate(part):
            rows[text] = {
                name: tensor[i].detach().cpu().clone() for name, tensor in encoded.items()
            }
            cache.put(keys[text], rows[text] or {})
    found = [rows[text] or {} for text in texts]
    shapes = {tuple((name, row[name].shape) for name in sorted(row)) for row in found}
    if len(shapes) > 1:  # padded to the longest of a batch: rows of two batches do not fit
        return encode_text(list(texts))
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}
