"""The masks of tasks as one call of the model needs them: its size, its rows, their areas."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffscaler_core.regions import Regions
from .control_conds import in_window
from .entries import Entry
from .native_layout import native_layout
from .region_mask import RegionMask
from .row_conds import RowsOfCall


class CallRegions:
    """What a call's regions are made of. Cheap: made at every call, to ask whether they are known.

    Args:
        entries: The K tasks that the call runs.
        rows: Where its rows come from; None: nobody told, so each row is a latent by itself.
        shape: Of its latents, (B, C, …, h, w).
        references: How many reference pictures it embeds.
        text: How many text tokens it is given.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        rows: RowsOfCall | None,
        shape: Sequence[int],
        references: int,
        text: int,
    ) -> None:
        self._regions = {i: e.region for i, e in enumerate(entries) if e.region is not None}
        self._count = len(entries)
        self._size = (shape[-2], shape[-1])
        known = rows is not None and rows.size_sampled is not None
        self._sampled = rows.size_sampled if known else self._size
        self._windows = rows.windows if known else ((None, shape[0]),)
        self._layout = (tuple(shape[2:]), references, text if references else 0)

    @property
    def key(self) -> Hashable:
        """The same for calls with the same regions."""
        return (
            tuple(self._regions.items()),
            self._count,
            self._sampled,
            self._windows,
            self._layout,
        )

    def made(self, model: Any) -> Regions:
        """Returns the regions, for this `BaseModel`."""
        layout = native_layout(model, *self._layout)
        masks = {slot: self._mask(region) for slot, region in self._regions.items()}
        return Regions(masks, layout, self._count)

    def _mask(self, region: RegionMask) -> Tensor:
        """Returns one task's masks, (1 or B, 1, h, w)."""
        whole = region.at(*self._sampled)
        own = [in_window(whole, window) for window, _ in self._windows]
        if len(whole) == 1 and len({window for window, _ in self._windows}) == 1:
            return own[0]
        parts = zip(own, self._windows, strict=True)
        return torch.cat([mask.expand(rows, -1, -1, -1) for mask, (_, rows) in parts])
