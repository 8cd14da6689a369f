"""A base at k times its own resolution, its positions stretched: PEₖ[k·i, k·j] = PE[i, j], exactly.

DiffFit (arXiv:2304.06648) moves a base to twice its resolution by halving the index in its sin-cos
positions: every place in the picture keeps the position that the base was trained with, and new
places lie between. Left alone, a base meets positions that it was never shown. For rotary positions
the same is done by dividing them by k (position interpolation, arXiv:2306.15595).

Nothing of the model's weights is touched, and all of it is undone by `remove`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DiffScalerError
from .families import FAMILIES

#: How far a stored table may be from the one computed here: what 16 bits round.
_ROUNDING = 5e-3


class Resolution:
    """Stretched positions on a model, until `remove()`. A context manager; from `at_resolution`.

    Attributes:
        factor: k.
    """

    def __init__(self, factor: float, undo: Callable[[], None]) -> None:
        self.factor, self._undo = factor, undo
        self._is_on = True

    def remove(self) -> None:
        """Gives the model its own positions back; idempotent."""
        if self._is_on:
            self._is_on = False
            self._undo()

    def __enter__(self) -> Resolution:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def at_resolution(model: nn.Module, factor: float) -> Resolution:
    """Makes a model see pictures of `factor` times its own size as it saw its own, but finer.

    The model's `config.sample_size`, which pipelines take their default size from, follows.

    Args:
        model: A diffusers transformer of a family whose `Family.positions` says how.
        factor: k, such as 2; 1 changes nothing.

    Raises:
        DiffScalerError: Nobody knows how to stretch this model's positions, they are stretched
            already, or the factor is no positive number.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise DiffScalerError(f"a resolution is a positive multiple of the base's, got {factor}")
    name = type(model).__name__
    kinds = {c: f.positions for f in FAMILIES.values() for c in f.classes if f.positions}
    if factor == 1:
        return Resolution(factor, lambda: None)
    if name not in kinds:
        raise DiffScalerError(
            f"the positions of {name} cannot be stretched to {factor:g} times its resolution; this "
            f"is known for {', '.join(kinds)}"
        )
    embedding: Any = model.pos_embed
    if any(isinstance(held, _Stretched) for held in _held(embedding)):
        raise DiffScalerError(f"the positions of this {name} are stretched already")
    if kinds[name] == "ids":
        handle = embedding.register_forward_pre_hook(_Ids(factor))
        return Resolution(factor, handle.remove)
    if embedding.pos_embed_max_size is not None:
        embedding.cropped_pos_embed = _Table(embedding, factor)
    before = _with_size(model, factor)

    def undo() -> None:
        embedding.__dict__.pop("cropped_pos_embed", None)
        embedding.__dict__.pop(_MARK, None)
        model.__dict__["_internal_dict"] = before

    embedding.__dict__[_MARK] = _Stretched(factor)
    return Resolution(factor, undo)


_MARK = "_diffscaler_resolution"


class _Stretched:
    """How far a model's positions are stretched.

    A table without `pos_embed_max_size` (DiT, PixArt) needs no more than this mark: diffusers
    computes it for the size that comes, from 0 to the trained size, which is the same thing.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor


class _Ids(_Stretched):
    """Runs before rotary positions: rows and columns are divided; text lies at 0 and stays."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Called by torch; what it returns takes the arguments' place."""
        ids, *others = args
        ids = ids.float()
        divisor = torch.ones(ids.shape[-1], device=ids.device)
        divisor[1:3] = self.factor
        return ids / divisor, *others


class _Table(_Stretched):
    """SD3's positions, which are cropped from the middle of a table, at other places of it.

    Attributes:
        step: From one entry of the table to the next: as the model's configuration says, or 1, as
            in a table that ComfyUI computes too.
    """

    def __init__(self, embedding: Any, factor: float) -> None:
        super().__init__(factor)
        self.embedding = embedding
        size = embedding.pos_embed_max_size
        every, gaps = torch.arange(size), {}
        for step in (embedding.base_size / size / embedding.interpolation_scale, 1.0):
            own = _sincos(embedding, every, every, step).to(self._stored())
            gaps[float((own - self._stored()).abs().max())] = step
        if min(gaps) > _ROUNDING:
            raise DiffScalerError(
                f"this model's table of positions is not a sin-cos one (it differs by "
                f"{min(gaps):.2g}), so what lies between its entries is not known"
            )
        self.step = gaps[min(gaps)]
        self._last: tuple[object, Tensor] | None = None

    def __call__(self, height: int, width: int) -> Tensor:
        """Returns the positions of latents of that height and width, (1, N, D).

        Raises:
            DiffScalerError: The picture is larger than the stretched table.
        """
        patch, size = self.embedding.patch_size, self.embedding.pos_embed_max_size
        sides, stored = (height // patch, width // patch), self._stored()
        asked = (sides, stored.device, stored.dtype)
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        if max(sides) > size * self.factor:
            raise DiffScalerError(
                f"{sides[0]} x {sides[1]} tokens are more than this model has positions for: "
                f"{size} stretched {self.factor:g} times"
            )
        rows, columns = (
            (size - side / self.factor) // 2 + torch.arange(side) / self.factor for side in sides
        )
        table = _sincos(self.embedding, rows, columns, self.step).to(stored)
        # where the table has an entry, that very one, as it was stored (in fewer bits perhaps)
        there = [(own == own.floor()).nonzero().flatten() for own in (rows, columns)]
        known = stored[rows[there[0]].long()][:, columns[there[1]].long()]
        table[there[0][:, None], there[1]] = known
        self._last = asked, table.flatten(0, 1).unsqueeze(0)
        return self._last[1]

    def _stored(self) -> Tensor:
        """Returns the model's own table, (size, size, D)."""
        size = self.embedding.pos_embed_max_size
        return self.embedding.pos_embed.reshape(size, size, -1)  # type: ignore[no-any-return]


def _sincos(embedding: Any, rows: Tensor, columns: Tensor, step: float) -> Tensor:
    """Returns positions at places of a table, (rows, columns, D), by diffusers' own function."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid

    places = [places.float() * step for places in (columns, rows)]
    grid = torch.stack(torch.meshgrid(*places, indexing="xy"))  # (2, rows, columns), width first
    width = embedding.pos_embed.shape[-1]
    table: Tensor = get_2d_sincos_pos_embed_from_grid(width, grid, output_type="pt")
    return table.float().view(len(rows), len(columns), width)


def _held(embedding: Any) -> list[Any]:
    return [embedding.__dict__.get(_MARK), *embedding._forward_pre_hooks.values()]


def _with_size(model: Any, factor: float) -> Any:
    """Says the new size in the model's configuration; returns what it was."""
    before = model.__dict__["_internal_dict"]
    if isinstance(before.get("sample_size"), int):
        size = round(before["sample_size"] * factor)
        model.__dict__["_internal_dict"] = type(before)({**before, "sample_size": size})
    return before
