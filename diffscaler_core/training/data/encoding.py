"""The mill: pictures go in one by one, are encoded a few at a time, and come out as training data.

Knows neither files nor models: pictures are `Item`s, the encoder a function. Each picture is
encoded once per view, or not at all if the cache has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import DiffScalerError, first_names
from ..denoiser import Encode
from .batches import Latents, TrainingData
from .cache import Cache, StoredLatents, digest_of
from .pixels import Size, View

#: (pictures done, pictures in all), called while they are encoded.
OnEncode = Callable[[int, int], None]
#: Latents (C, h, w) in memory, or their key in the cache.
Entry = Tensor | str
#: Bytes of latents that are held in memory where the others are in the cache.
MEMORY = 2 << 30


@dataclass(frozen=True, eq=False)
class Item:
    """One picture that can be used.

    Attributes:
        name: What messages call it.
        prompt: What it shows.
        digest: A hash of its content (hex).
        size: (H, W) it is cut to.
        kind: Whatever else decides its pixels, apart from the view.
        pixels: Views -> their pixels, (channels, H, W) each, in −1..1. Raises ValueError if the
            picture has gone or changed.
        crops: A hash that decides its random crops; a control picture has its picture's.
        control: Its control picture, cut alike.
        cropped: Share of its area that is cut away.
        cached: False: nobody can name what decides its pixels, so its latents are not kept.
    """

    name: str
    prompt: str
    digest: str
    size: Size
    kind: str
    pixels: Callable[[Sequence[View]], list[Tensor]]
    crops: str
    control: Item | None = None
    cropped: float = 0.0
    cached: bool = True


@dataclass(frozen=True, eq=False)
class Mill:
    """How pictures are encoded.

    Attributes:
        encode: Pixels (B, channels, H, W) in −1..1 -> latents (B, C, h, w).
        views: Of each picture.
        batch: Pictures encoded at a time.
        cache: Where latents are kept; None: nowhere.
        encoder_key: Names the encoder, if there is a cache.
        memory: Bytes of latents held in memory, where the others are in the cache.
        skip_bad: Leave out pictures that go or change in the meantime.
        on_encode: Told how far it is.
        each: How pictures are gone through: `map`, or that of a pool of threads, as decoding and
            resizing run side by side.
    """

    encode: Encode
    views: tuple[View, ...] = (View(),)
    batch: int = 16
    cache: Cache | None = None
    encoder_key: str | None = None
    memory: int = MEMORY
    skip_bad: bool = False
    on_encode: OnEncode | None = None
    each: Callable[..., Iterable[Any]] = map

    def key(self, item: Item, view: View) -> str:
        """Returns the name of a view's latents in the cache."""
        height, width = item.size
        crop = item.crops if view.crop else ""
        picture = digest_of(item.digest, item.kind, height, width, crop)
        return digest_of("latents", self.encoder_key, picture, view.crop, int(view.mirror))

    def has(self, item: Item) -> bool:
        """Returns whether all views of a picture are in the cache, going by their headers."""
        cache = self.cache
        return cache is not None and all(cache.shape(self.key(item, v)) for v in self.views)

    def grind(self, items: Sequence[Item], skipped: Sequence[str] = ()) -> TrainingData:
        """Returns pictures as training data, in buckets of one shape each.

        Args:
            items: The pictures; either all have a control picture or none.
            skipped: What could not be used and is only named.

        Raises:
            DiffScalerError: The encoder gives NaN or Inf; pictures have gone or changed.
        """
        run = _Run(self, len(items))
        sizes: dict[Size, list[Item]] = defaultdict(list)
        for item in items:
            sizes[item.size].append(item)
        buckets, controls, order = [], [], []
        for same in sizes.values():
            done = run.encoded(same)
            if done:
                buckets.append(run.latents([entries for _, entries, _ in done]))
                controls.append([entries for _, _, entries in done])
                order += [item for item, _, _ in done]
        if not order:
            raise run.refused()
        left = set(order)
        prompts = tuple(dict.fromkeys(item.prompt for item in items if item in left))
        has_control = items[0].control is not None
        return TrainingData(
            _one_or_all(buckets),
            torch.tensor([prompts.index(item.prompt) for item in order]),
            prompts,
            (*skipped, *run.bad),
            _one_or_all([run.latents(part) for part in controls]) if has_control else None,
            tuple(item.digest for item in order),
            sum(item.cropped for item in order) / len(order),
            tuple(
                digest_of(item.control.digest, item.control.kind)
                for item in order
                if item.control is not None
            ),
        )


class _Run:
    """One pass: what is held in memory so far, what was bad, how far it is."""

    def __init__(self, mill: Mill, total: int) -> None:
        self.mill, self.total = mill, total
        self.done, self.held = 0, 0
        self.bad: list[str] = []

    def encoded(self, items: Sequence[Item]) -> list[tuple[Item, list[Entry], list[Entry]]]:
        """Returns (picture, its views' latents, its control's) of those that could be read."""
        found = []
        for start in range(0, len(items), self.mill.batch):
            part = items[start : start + self.mill.batch]
            views = self._views(part)
            good = [item for item in part if item in views]
            controls = self._views([item.control for item in good if item.control is not None])
            for item in good:
                control = controls.get(item.control, []) if item.control else []
                if item.control is None or control:
                    found.append((item, views[item], control))
            self.done += len(part)
            if self.bad and not self.mill.skip_bad:
                raise self.refused()
            if self.mill.on_encode is not None:
                self.mill.on_encode(self.done, self.total)
        return found

    def refused(self) -> DiffScalerError:
        """Returns the error for pictures that have gone or changed."""
        bad = first_names(self.bad)
        return DiffScalerError(f"{len(self.bad)} of {self.total} pictures cannot be used: {bad}")

    def latents(self, entries: Sequence[Sequence[Entry]]) -> Latents:
        """Returns N pictures' V views as (V, N, C, h, w), in memory if all are."""
        views = [list(view) for view in zip(*entries, strict=True)]
        flat = [entry for view in views for entry in view]
        tensors = [entry for entry in flat if isinstance(entry, Tensor)]
        if len({tensor.shape for tensor in tensors}) > 1:
            raise DiffScalerError(
                "the encoded pictures have different shapes"
                + (f"; delete the cache {str(self.mill.cache.folder)!r}" if self.mill.cache else "")
            )
        if len(tensors) == len(flat):
            together: Tensor = torch.stack(tensors)
            return together.view(len(views), -1, *together.shape[1:])
        cache = self.mill.cache
        assert cache is not None  # only what is in the cache is not in memory
        shape = (
            tensors[0].shape
            if tensors
            else cache.shape(next(e for e in flat if isinstance(e, str)))
        )
        return StoredLatents(cache, views, shape or ())

    def _views(self, items: Sequence[Item]) -> dict[Item, list[Entry]]:
        """Returns the latents of all views of those pictures that could be read."""
        views = self.mill.views
        entries: dict[tuple[Item, View], Entry | None] = {
            (item, view): self._cached(item, view) for item in items for view in views
        }
        pixels: dict[tuple[Item, View], Tensor] = {}
        bad = set()
        missing = [[view for view in views if entries[item, view] is None] for item in items]
        for item, lacks, cut in zip(
            items, missing, self.mill.each(_pixels, items, missing), strict=True
        ):
            if isinstance(cut, ValueError):
                self.bad.append(f"{item.name} ({cut})")
                bad.add(item)
            else:
                pixels |= {(item, view): part for view, part in zip(lacks, cut, strict=True)}
        for view in views:  # one view at a time: as many pixels as `batch` says
            self._encode([at for at in pixels if at[1] == view], pixels, entries)
        return {
            item: [entry for view in views if (entry := entries[item, view]) is not None]
            for item in items
            if item not in bad
        }

    @torch.no_grad()
    def _encode(
        self,
        missing: Sequence[tuple[Item, View]],
        pixels: dict[tuple[Item, View], Tensor],
        entries: dict[tuple[Item, View], Entry | None],
    ) -> None:
        if not missing:
            return
        latents = self.mill.encode(torch.stack([pixels[at] for at in missing])).float().cpu()
        for (item, view), x0 in zip(missing, latents, strict=True):
            if not bool(torch.isfinite(x0).all()):
                raise DiffScalerError(
                    f"the VAE gave NaN or Inf for {item.name}; load it in float32"
                )
            entries[item, view] = self._kept(item, view, x0)

    def _cached(self, item: Item, view: View) -> Entry | None:
        cache = self.mill.cache
        if cache is None or not item.cached:
            return None
        key = self.mill.key(item, view)
        if self.held >= self.mill.memory:
            return key if cache.shape(key) is not None else None
        found = cache.get(key)
        x0 = None if found is None else found.get("x0")
        if x0 is None or not bool(torch.isfinite(x0).all()):
            return None
        self.held += x0.nbytes
        return x0

    def _kept(self, item: Item, view: View, x0: Tensor) -> Entry:
        """Returns what was encoded: itself, or its key if memory is full and the cache has it."""
        cache, key = self.mill.cache if item.cached else None, self.mill.key(item, view)
        stored = cache is not None and cache.put(key, {"x0": x0})
        if stored and self.held >= self.mill.memory:
            return key
        self.held += x0.nbytes
        return x0.clone()  # not a view of its whole batch


def _pixels(item: Item, views: Sequence[View]) -> list[Tensor] | ValueError:
    """Returns a picture's views, or why they cannot be had; an error would end a whole pool."""
    try:
        return item.pixels(views) if views else []
    except DiffScalerError:  # not the picture's fault
        raise
    except ValueError as error:
        return error


def _one_or_all(buckets: Sequence[Latents]) -> Latents | tuple[Latents, ...]:
    return buckets[0] if len(buckets) == 1 else tuple(buckets)
