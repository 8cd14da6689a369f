"""A router: says from which part of the data a noisy picture comes. A small file, or a few layers.

It learns the posterior p(k | x_t, t) of `posterior.py` by cross entropy, as in "Decentralized
Diffusion Models" (arXiv:2501.05450), where it is a small transformer of its own. Ours reads what
the frozen base sees: the pooled output of one block, without any task and told nothing, and the
noise. So it is a linear map, or one hidden layer, and needs no second network. It is trained
without the experts (`router_training.py`) and knows them by name only.

The file is safetensors, with the header key `diffscaler.router`; beside the layers it may hold the
base's null prompt, which a host without text encoders could not tell it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic import write_whole
from ..blocks import MIDDLE, blocks_of
from ..errors import (
    MismatchError,
    TaskFileError,
    UnknownNameError,
    first_names,
    reason_of,
    shown,
)
from ..file_rules import check_finite
from ..files import safetensors_path
from ..header import parse_json, read_any_header
from ..targets import find_targets
from ..task import base_facts
from ..tensor_file import ChangedError, read_tensors

#: Key of the header's JSON, and its version.
HEADER, FORMAT = "diffscaler.router", "1"
#: Cosines of the noise level that it is told.
CLOCK = 8
MAX_PARTS, MAX_BYTES, MAX_NAME = 256, 256 * 2**20, 200
#: What a file can hold of the base's null prompt.
NULL = ("context", "pooled")
_DTYPES = ("F32", "F16", "BF16")
_MIDDLE = "middle"


@dataclass(frozen=True)
class Site:
    """Where a router reads.

    Attributes:
        block: "middle" (a U-Net's middle block), or a block's number from 0.
        blocks: How many blocks the base has.
        pool: Features are means over pool × pool parts of the picture.
        base: Family, class and fingerprint of the base.
    """

    block: int | str
    blocks: int
    pool: int
    base: Mapping[str, Any]

    def name_in(self, model: nn.Module) -> str:
        """Returns the block's name in a model, of diffusers or of ComfyUI.

        Raises:
            MismatchError: The model has no such block.
        """
        names = list(blocks_of(model))
        if self.block == _MIDDLE:
            found = next((name for name in names if name in MIDDLE), None)
        else:
            found = names[int(self.block)] if len(names) == self.blocks else None
        if found is None:
            raise MismatchError(
                f"the router reads block {self.block} of {self.blocks} of a "
                f"{self.base.get('class')}, and this {type(model).__name__} has {len(names)}: it "
                f"belongs to another base, or another host cuts this one into other blocks"
            )
        return found


def site_of(model: nn.Module, name: str, pool: int, shape_model: nn.Module | None = None) -> Site:
    """Returns where a router would read.

    Args:
        model: The base.
        name: A block's name in it.
        pool: See `Site`.
        shape_model: The module with diffusers' names, if that is another.
    """
    names = list(blocks_of(model))
    own = model if shape_model is None else shape_model
    facts = base_facts(own, find_targets(own, "blocks"))
    place = _MIDDLE if name in MIDDLE else names.index(name)
    return Site(place, len(names), pool, facts)


class Router(nn.Module):
    """Features and noise in, a probability for each part out.

    Args:
        parts: The parts' names, which are the experts'.
        site: Where it reads.
        width: How many features it reads, F.
        hidden: Units of the hidden layer; 0: none, a linear map.
        null: The base's null prompt, "context" (1, L, D) and "pooled" (1, P), or nothing.
        facts: What else its file says: how it was trained, how good it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        parts: Sequence[str],
        site: Site,
        width: int,
        hidden: int = 0,
        null: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.site, self.hidden = tuple(parts), site, hidden
        self.facts = dict(facts or {})
        self.null = {name: tensor.detach().cpu() for name, tensor in (null or {}).items()}
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        inputs = width + CLOCK
        self.first = nn.Linear(inputs, hidden) if hidden else None
        self.last = nn.Linear(hidden or inputs, len(self.parts))

    @property
    def width(self) -> int:
        """F."""
        return len(self.mean)

    @property
    def num_parameters(self) -> int:
        """Numbers it learned."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, features: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns logits (B, K).

        Args:
            features: Of x_t, (B, F), from the block of `site`.
            alpha: α, (B,).
            sigma: σ, (B,); (α, σ) may be scaled by any number: their ratio counts.
        """
        if features.shape[1] != self.width:
            raise MismatchError(
                f"the router reads {self.width} features and the block has {features.shape[1]}: it "
                f"belongs to another base"
            )
        x = torch.cat([(features - self.mean) / self.std, clock(alpha, sigma)], dim=1)
        if self.first is not None:
            x = F.silu(self.first(x))
        return self.last(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def posterior(self, features: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns p(k | x_t, t), (B, K), float32, on the CPU; see `forward`."""
        told = (one.to("cpu", torch.float32) for one in (features, alpha, sigma))
        return self(*told).softmax(1)  # type: ignore[no-any-return]

    def check_base(self, shape_model: nn.Module) -> None:
        """Refuses a base it was not trained on.

        Args:
            shape_model: The base, with diffusers' names.

        Raises:
            MismatchError: Its layers have other names or shapes.
        """
        facts = base_facts(shape_model, find_targets(shape_model, "blocks"))
        if facts["fingerprint"] != self.site.base.get("fingerprint"):
            raise MismatchError(
                f"the router for {first_names(self.parts)} was trained on a "
                f"{self.site.base.get('class')} ({self.site.base.get('fingerprint')}), and this is "
                f"a {facts['class']} ({facts['fingerprint']}): train one for it"
            )

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuses tasks that are not its experts.

        Raises:
            UnknownNameError: A part has no task.
        """
        missing = [part for part in self.parts if part not in names]
        if missing:
            raise UnknownNameError(
                f"the router's experts are {', '.join(map(shown, self.parts))}; no task is called "
                f"{first_names(missing)}, there are {', '.join(map(shown, names)) or 'none'}"
            )


def clock(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Returns the noise level as cosines, (B, CLOCK): cos(j θ), where θ = 2 atan(σ/α) in 0..π."""
    angle = 2 * torch.atan2(sigma.float(), alpha.float())
    steps = torch.arange(1, CLOCK + 1, device=angle.device)
    return torch.cos(angle.unsqueeze(1) * steps)


@dataclass(frozen=True)
class RouterFacts:
    """What a router's header says.

    Attributes:
        parts: Names of the experts.
        site: Where it reads.
        width: F.
        hidden: Units of the hidden layer.
        more: Whatever else.
    """

    parts: tuple[str, ...]
    site: Site
    width: int
    hidden: int
    more: Mapping[str, Any] = field(default_factory=dict)


def save_router(router: Router, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a router; the file is there whole or not at all.

    Args:
        router: The router.
        path: Must end in `.safetensors`.
        dtype: Of its numbers in the file.

    Raises:
        TaskFileError: Another ending, or NaN or Inf.
    """
    path = safetensors_path(path)
    tensors = {
        name: tensor.detach().to("cpu", dtype) for name, tensor in router.state_dict().items()
    }
    tensors |= {f"null.{name}": router.null[name].to(dtype) for name in NULL if name in router.null}
    check_finite(path.name, tensors)
    told = {
        "version": FORMAT,
        "parts": router.parts,
        "block": router.site.block,
        "blocks": router.site.blocks,
        "pool": router.site.pool,
        "base": dict(router.site.base),
        "width": router.width,
        "hidden": router.hidden,
        **{key: value for key, value in router.facts.items() if key not in _KEYS},
    }
    header = {"format": "pt", HEADER: json.dumps(told, ensure_ascii=False, sort_keys=True)}
    write_whole(path, save({n: t.contiguous() for n, t in tensors.items()}, header))
    return path


_KEYS = ("version", "parts", "block", "blocks", "pool", "base", "width", "hidden")


def load_router(path: str | Path) -> Router:
    """Returns the router of a file, float32, frozen. All or nothing.

    Raises:
        TaskFileError: The file is missing, broken, or holds no router.
    """
    path = safetensors_path(path)
    try:
        header = read_any_header(path)
        if HEADER not in header.metadata:
            raise TaskFileError(f"{path.name!r} holds no router (no {HEADER} in its header)")
        facts = _facts(path.name, parse_json(path.name, "router header", header.metadata[HEADER]))
        _check_entries(path.name, header.entries, facts)
        tensors = read_tensors(path, header)
    except FileNotFoundError as error:
        raise TaskFileError(f"no file {str(path)!r} of a router") from error
    except (SafetensorError, ChangedError, OSError) as error:
        raise TaskFileError(f"{path.name!r} cannot be read: {reason_of(error)}") from error
    check_finite(path.name, tensors)
    null = {name: tensors.pop(f"null.{name}").float() for name in NULL if f"null.{name}" in tensors}
    router = Router(facts.parts, facts.site, facts.width, facts.hidden, null, facts.more)
    router.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    if not bool((router.std > 0).all()):
        raise TaskFileError(f"{path.name!r} divides its features by numbers that are not above 0")
    router.eval().requires_grad_(False)
    middle = torch.full((1,), 0.5)
    if not bool(router(router.mean[None], middle, middle).isfinite().all()):
        raise TaskFileError(f"{path.name!r} holds numbers so large that its answer is not finite")
    return router


def _facts(file: str, told: Mapping[str, Any]) -> RouterFacts:
    if told.get("version") != FORMAT:
        raise TaskFileError(
            f"{file!r} is a router of version {shown(told.get('version'))}; this is {FORMAT}"
        )
    parts: Any = told.get("parts")
    block, base = told.get("block"), told.get("base")
    named = (
        isinstance(parts, list)
        and 2 <= len(parts) <= MAX_PARTS
        and all(isinstance(p, str) and p.isprintable() and 0 < len(p) <= MAX_NAME for p in parts)
        and len(set(parts)) == len(parts)
    )
    if not named:
        raise TaskFileError(
            f"{file!r} names its parts {shown(parts)}: two or more names, each once"
        )
    limits = {"blocks": (1, 4096), "pool": (1, 16), "width": (1, 2**22), "hidden": (0, 2**16)}
    wrong = [
        f"{key} {shown(told.get(key))}"
        for key, (low, high) in limits.items()
        if type(told.get(key)) is not int or not low <= told[key] <= high
    ]
    number = type(block) is int and not wrong and 0 <= block < told["blocks"]
    if not number and block != _MIDDLE:
        wrong.append(f"block {shown(block)}")
    words = base.values() if isinstance(base, Mapping) else [None]
    if not all(
        type(word) is int
        or (isinstance(word, str) and word.isprintable() and len(word) <= MAX_NAME)
        for word in words
    ):
        wrong.append(f"base {shown(base)}")
    if wrong:
        raise TaskFileError(f"{file!r} has a router header with {first_names(wrong)}")
    assert isinstance(base, Mapping)
    site = Site(block, told["blocks"], told["pool"], dict(base))  # type: ignore[arg-type]
    more = {key: value for key, value in told.items() if key not in _KEYS}
    return RouterFacts(tuple(parts), site, told["width"], told["hidden"], more)


def _check_entries(file: str, entries: Mapping[str, Mapping[str, Any]], facts: RouterFacts) -> None:
    """Checks names, shapes and dtypes before a tensor is read or a layer is made."""
    inputs, parts = facts.width + CLOCK, len(facts.parts)
    expected: dict[str, list[int]] = {"mean": [facts.width], "std": [facts.width]}
    if facts.hidden:
        expected |= {"first.weight": [facts.hidden, inputs], "first.bias": [facts.hidden]}
    expected |= {"last.weight": [parts, facts.hidden or inputs], "last.bias": [parts]}
    found = {name: entry["shape"] for name, entry in entries.items()}
    nulls = {f"null.{name}": ndim for name, ndim in zip(NULL, (3, 2), strict=True)}
    wrong = [n for n in {**expected, **found} if n not in nulls and expected.get(n) != found.get(n)]
    wrong += [
        n for n, d in nulls.items() if n in found and (len(found[n]) != d or found[n][0] != 1)
    ]
    wrong += [n for n, entry in entries.items() if entry["dtype"] not in _DTYPES]
    numbers = sum(math.prod(shape) for shape in found.values())
    if wrong or 4 * numbers > MAX_BYTES:
        raise TaskFileError(
            f"{file!r} has other tensors than its header says: {first_names(wrong)}"
            if wrong
            else f"{file!r} holds {numbers:,} numbers: no router has so many"
        )
