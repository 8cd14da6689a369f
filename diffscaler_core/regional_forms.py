"""The tasks of a model whose effect differs by place: `regional.py`'s forms, kept between calls."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import Affiner, ConvGeometry
from .regional import Factors, RegionalFold, factors_for, fold_regional
from .regions import Regions
from .windows import NoiseLevel, joined

Place = tuple[torch.device, torch.dtype]


class Question(NamedTuple):
    """A layer's output, as far as regions ask for it.

    Attributes:
        name: The layer's name.
        shape: Of its output.
        place: Its device and dtype.
        geometry: The convolution's geometry, None for a Linear.
        row_layout: As in `stack.AffinerStack`.
        row_repeats: As in `regional.factors_for`.
    """

    name: str
    shape: tuple[int, ...]
    place: Place
    geometry: ConvGeometry | None
    row_layout: str
    row_repeats: int


class Regional(NamedTuple):
    """What `regional.apply_factors` takes."""

    folded: RegionalFold
    factors: Factors


class RegionalForms:
    """What the layers need while masks are in force; for one choice of tasks.

    Args:
        regions: The masks.
        slots: The tasks that act.
        weights: Their strengths among all tasks, (S, 3), or (B, S, 3) with rows.
        level: The noise level of the next call, for tasks with windows.
    """

    def __init__(
        self,
        regions: Regions,
        slots: tuple[int, ...],
        weights: Tensor,
        level: NoiseLevel | None = None,
    ) -> None:
        self.regions, self.slots, self._weights = regions, slots, weights
        self._level = NoiseLevel() if level is None else level
        self._folded: dict[tuple[str, Place], tuple[RegionalFold, tuple[object, ...]] | None] = {}
        self._factors: dict[tuple[object, ...], tuple[Factors, Tensor]] = {}

    def put(self, weights: Tensor) -> None:
        """Takes other strengths of the same tasks, or another noise level."""
        self._weights = weights
        self._factors.clear()

    def of(
        self, asked: Question, affiners: dict[int, Affiner], bias: Tensor | None
    ) -> Regional | None:
        """Returns what a layer's call needs; None if no acting task has the layer.

        Args:
            asked: The layer and its output.
            affiners: A task's slot -> its affiner here.
            bias: The layer's own bias, (C_out,), or None.
        """
        key = (asked.name, asked.place)
        if key not in self._folded:
            with torch.inference_mode(False):
                self._folded[key] = self._fold(affiners, bias, asked.place)
        known = self._folded[key]
        if known is None:
            return None
        folded, structure = known
        device, dtype = asked.place
        # a shape without memory of its own: nothing but the shape is looked at
        y = torch.empty((), device=device, dtype=dtype).expand(asked.shape)
        gates = self.regions.gates(asked.name, y, asked.geometry, asked.row_layout)
        # layers of the same tasks, ranks and places share their factors
        same = (structure, id(gates), len(asked.shape), asked.shape[0], asked.row_repeats)
        if same not in self._factors:
            with torch.inference_mode(False), torch.no_grad():
                factors = factors_for(
                    y,
                    folded,
                    self._weights,
                    gates,
                    asked.geometry,
                    asked.row_repeats,
                    self._window(affiners, folded),
                )
            self._factors[same] = factors, gates
        return Regional(folded, self._factors[same][0])

    def _window(self, affiners: dict[int, Affiner], folded: RegionalFold) -> Tensor | None:
        """Returns which hidden units act at the noise level, (1 or B, H); None: all."""
        here = [affiners[slot] for slot in self.slots if slot in affiners]
        windows = joined([own.windows for own in here], [own.rank for own in here])
        if windows is None:
            return None
        window = torch.atleast_2d(self._level.window(windows))
        window = window if self._weights.ndim == 3 else window[:1]  # all rows are in one range
        constant = len(folded.units[0]) - window.shape[1]
        return F.pad(window, (0, constant), value=1.0)

    def _fold(
        self, affiners: dict[int, Affiner], bias: Tensor | None, place: Place
    ) -> tuple[RegionalFold, tuple[object, ...]] | None:
        here = [slot for slot in self.slots if slot in affiners]
        if not here:
            return None
        folded = fold_regional([affiners[slot] for slot in here], bias, here)
        tables = (*folded.units, folded.scales)
        windows = tuple(affiners[slot].windows for slot in here)
        structure = (place, windows, *(tuple(table.tolist()) for table in tables))
        return folded.to(*place), structure


def copy_into(old: Regional, new: Regional) -> bool:
    """Writes new values into the tensors there are; says whether they have room for them."""
    mine, theirs = _tensors(old), _tensors(new)
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return False
    for own, now in zip(mine, theirs, strict=True):
        if own.data_ptr() != now.data_ptr():
            own.copy_(now)
    return True


def _tensors(regional: Regional) -> list[Tensor]:
    folded, factors = regional
    own: list[Tensor | None] = [folded.down, folded.up, folded.floor, folded.scale, *factors]
    return [t for t in own if t is not None]
