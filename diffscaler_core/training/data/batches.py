"""TrainingData: encoded pictures, and which of them are in batch number n. Knows no files.

V views, N pictures; latents are (C, h, w), or any other shape that a base works in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ...errors import DiffScalerError
from ..randomness import generator_for, mixed


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step trains on.

    Attributes:
        x0: Clean latents, (B, C, h, w), float32.
        index: Which prompt each has, (B,).
        control: Latents of the control pictures, (B, C, h, w); None without them.
        condition: What the base is told, one row per picture, in place of `index`: only where
            texts are encoded on the fly (see `streaming.StreamedData`).
        pictures: Each one's number, (B,), counted through all buckets; None of a stream.
    """

    x0: Tensor
    index: Tensor
    control: Tensor | None = None
    condition: Mapping[str, Tensor] | None = None
    pictures: Tensor | None = None


class Batches(Protocol):
    """What is trained on: `TrainingData`, or `streaming.StreamedData`."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts' names."""
        ...

    def __len__(self) -> int:
        """How many pictures there are; 0 if that is unknown, or if there are none."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of most pictures."""
        ...

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """Returns batch number `step` (from 0) of a seed."""
        ...

    def whole(self, size: int) -> Iterator[Batch]:
        """Yields every picture once, as is."""
        ...

    def split(self, share: float, seed: int = 0) -> tuple[Batches, Batches]:
        """Returns (pictures to train on, pictures to validate on)."""
        ...


class Latents(Protocol):
    """Latents of one shape, (V, N, C, h, w): a tensor, or `cache.StoredLatents` on disk."""

    @property
    def shape(self) -> torch.Size:
        """(V, N, C, h, w)."""
        ...

    def __getitem__(self, at: tuple[Tensor, Tensor], /) -> Tensor:
        """Returns [views (B,), rows (B,)] -> (B, C, h, w), float32."""
        ...


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Clean samples and their prompts, ready to train on.

    Pictures of equal shape lie together, in buckets; picture numbers run through all buckets.

    Attributes:
        latents: x0 in the model's own space, (V, N, C, h, w): V views (as is, mirrored, random
            crops) of N pictures. Several shapes: a tuple of such, one per bucket.
        index: Which prompt each picture has, (N,), of all buckets.
        prompts: The prompts' names.
        skipped: Files that could not be used, with the reason.
        control: Latents of the control pictures, bucketed as `latents`; view for view the same
            crops. None without them.
        ids: What tells pictures apart whatever their order: a hash of each one's content, hex.
            Default: of their latents.
        cropped: Mean share of the pictures' area that was cropped away.
        control_ids: What tells control pictures apart, as `ids`; empty if nobody says.
    """

    latents: Latents | tuple[Latents, ...]
    index: Tensor
    prompts: tuple[str, ...]
    skipped: tuple[str, ...] = field(default=())
    control: Latents | tuple[Latents, ...] | None = None
    ids: tuple[str, ...] = ()
    cropped: float = 0.0
    control_ids: tuple[str, ...] = ()
    _plans: dict[tuple[int, int, int], list[tuple[int, Tensor]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Refuses parts that do not belong together."""
        counts = [int(bucket.shape[1]) for bucket in self.buckets]
        if sum(counts) != len(self.index):
            raise DiffScalerError(f"{sum(counts)} pictures but {len(self.index)} prompt indices")
        if self.control is not None and [int(b.shape[1]) for b in self.controls] != counts:
            raise DiffScalerError(f"each of the {len(self)} pictures needs one control picture")
        if self.ids and len(self.ids) != len(self):
            raise DiffScalerError(f"{len(self)} pictures but {len(self.ids)} ids")

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.index)

    @property
    def buckets(self) -> tuple[Latents, ...]:
        """The latents, one entry per shape."""
        return self.latents if isinstance(self.latents, tuple) else (self.latents,)

    @property
    def controls(self) -> tuple[Latents, ...]:
        """The control's latents, one entry per shape; empty without control pictures."""
        if self.control is None:
            return ()
        return self.control if isinstance(self.control, tuple) else (self.control,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w) of the bucket with most pictures."""
        return tuple(max(self.buckets, key=lambda bucket: int(bucket.shape[1])).shape[2:])

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """One id per picture (see `ids`)."""
        return self.ids or tuple(
            hashlib.sha256(x0.contiguous().numpy().tobytes()).hexdigest()
            for batch in self.whole(64)
            for x0 in batch.x0
        )

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """Returns batch number `step` (from 0) of a seed: the same whenever it is asked for.

        In each epoch every picture comes up once, in an order of that epoch's own; all of a batch
        have one shape. A bucket's last batch is filled up from the start of its order, so a bucket
        with fewer pictures than `size` repeats them within the batch.

        Raises:
            DiffScalerError: There are no pictures.
        """
        if not len(self):
            raise DiffScalerError("there are no pictures to train on")
        per_epoch = sum(-(-int(bucket.shape[1]) // size) for bucket in self.buckets)
        number, rows = self._plan(size, seed, step // per_epoch)[step % per_epoch]
        views = torch.randint(
            int(self.buckets[number].shape[0]),
            (size,),
            generator=generator_for(seed, "views", step),
        )
        return self._rows(number, views, rows)

    def whole(self, size: int) -> Iterator[Batch]:
        """Yields every picture once, as is, in order; at most `size` of one shape at a time."""
        for number, bucket in enumerate(self.buckets):
            for rows in torch.arange(int(bucket.shape[1])).split(size):
                if len(rows):
                    yield self._rows(number, torch.zeros_like(rows), rows)

    def select(self, pictures: Sequence[int]) -> TrainingData:
        """Returns some of the pictures, in their old order; the prompts' names stay all there."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[list(pictures)] = True
        ids = tuple(self.image_ids[i] for i in chosen.nonzero().flatten().tolist())
        sides = chosen.split([int(bucket.shape[1]) for bucket in self.buckets])
        kept = [i for i, side in enumerate(sides) if side.any()] or [0]

        def of(buckets: tuple[Latents, ...]) -> tuple[Latents, ...]:
            return tuple(_subset(buckets[i], sides[i].nonzero().flatten()) for i in kept)

        return replace(
            self,
            latents=_one_or_all(of(self.buckets)),
            index=self.index[chosen],
            control=None if self.control is None else _one_or_all(of(self.controls)),
            ids=ids,
            control_ids=tuple(
                own for own, side in zip(self.control_ids, chosen.tolist(), strict=False) if side
            ),
        )

    def split(self, share: float, seed: int = 0) -> tuple[TrainingData, TrainingData]:
        """Returns (pictures to train on, pictures to validate on).

        Each picture's side follows from its own id and the seed, so it stays there when others
        come or go, and copies of one picture land on one side. The share is met on average; of two
        or more pictures at least one is on either side.
        """
        if share <= 0 or len(self) < 2:
            return self, self.select([])
        draws = [mixed(seed, "split", name) / 2**64 for name in self.image_ids]
        order = sorted(range(len(self)), key=lambda i: draws[i])
        count = sum(draw < share for draw in draws)
        count = min(max(count, 1), len(self) - 1)
        return self.select(order[count:]), self.select(order[:count])

    def _plan(self, size: int, seed: int, epoch: int) -> list[tuple[int, Tensor]]:
        """Returns an epoch's batches: (bucket, rows (size,)); the last one asked for is kept."""
        key = (size, seed, epoch)
        plan = self._plans.get(key)
        if plan is None:
            plan = []
            for number, bucket in enumerate(self.buckets):
                count = int(bucket.shape[1])
                order = torch.randperm(count, generator=generator_for(seed, "order", epoch, number))
                filled = order[torch.arange(-(-count // size) * size) % max(count, 1)]
                plan += [(number, rows) for rows in filled.split(size) if len(rows)]
            turns = torch.randperm(len(plan), generator=generator_for(seed, "turns", epoch))
            plan = [plan[i] for i in turns.tolist()]
            self._plans.clear()
            self._plans[key] = plan
        return plan

    def _rows(self, number: int, views: Tensor, rows: Tensor) -> Batch:
        start = sum(int(bucket.shape[1]) for bucket in self.buckets[:number])
        control = self.controls[number][views, rows] if self.controls else None
        own = rows + start
        return Batch(self.buckets[number][views, rows], self.index[own], control, pictures=own)


def with_one_table(
    data: TrainingData, validation: TrainingData
) -> tuple[TrainingData, TrainingData]:
    """Returns both with one list of prompts: the first's, then what only the second has."""
    names = tuple(dict.fromkeys((*data.prompts, *validation.prompts)))
    moved = [names.index(name) for name in validation.prompts]
    index = validation.index.new_tensor(moved)[validation.index]
    return (
        replace(data, prompts=names),
        replace(validation, prompts=names, index=index),
    )


def _subset(latents: Latents, rows: Tensor) -> Latents:
    """Returns the latents of some pictures, all views."""
    if isinstance(latents, Tensor):
        return latents[:, rows]
    return latents.subset(rows)  # type: ignore[attr-defined, no-any-return]


def _one_or_all(buckets: tuple[Latents, ...]) -> Latents | tuple[Latents, ...]:
    return buckets[0] if len(buckets) == 1 else buckets
