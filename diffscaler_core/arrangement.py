"""Some of a model's tasks laid out to run: their strengths, and each layer's form.

Strengths live in a few tensors as long as the whole model, of which every layer has its part: a new
strength, or another task in a row, is a handful of operations however many layers there are, and no
layer is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import PARTS, Affiner
from .forms import WIDE, Factors, Form, flattened, joined, stacked
from .kin import Kin, joined_kin
from .layer_tasks import Layer, TaskVectors, version_of
from .regional_forms import Place
from .windows import NoiseLevel, check_rows

#: Up to so many bytes, every row's own D and U are laid out.
_BY_ROW_BYTES = 128 << 20

#: What a mask depends on beside the strengths: the ranks of the tasks on a layer, and the layer
#: itself where the noise level says which of its units act.
_MaskKey = tuple[tuple[int, ...], Layer | None]


class Ready(NamedTuple):
    """A layer's tasks in an arrangement.

    Attributes:
        form: Ready to run.
        sources: The parameters it was made from.
        version: Their state then.
        kin: Layers that share the product with D, or None.
        place: This one's place among them.
    """

    form: Form
    sources: tuple[Tensor, ...]
    version: int
    kin: Kin | None = None
    place: int = 0

    @property
    def is_current(self) -> bool:
        """Says whether no parameter has changed in place since."""
        return self.version == version_of(self.sources)


@dataclass(eq=False)
class _Vectors:
    """What depends on the strengths, in one place; changed in place.

    Attributes:
        gain: Of all layers, (ΣC_out,), with rows (B, ΣC_out); as `Form.gain`.
        offset: Of all layers, the same shape.
        masks: What each depends on -> mask; as `Form.mask`.
        index: As `Form.index`.
    """

    gain: Tensor
    offset: Tensor
    masks: dict[_MaskKey, Tensor] = field(default_factory=dict)
    chosen: Tensor | None = None


class Arrangement:
    """Some tasks of a model, laid out to run.

    Args:
        vectors: The model's.
        slots: The tasks, in order.
        rows: B; 0: the whole batch alike.
        width: With rows, M: how many tasks one row runs at most.
        level: The noise level of the next call, for tasks with windows.
        fixed: True: shapes depend on how many slots there are alone, not on which tasks these are,
            and `refill` can put others in their places. For compiled code. A slot of −1 is empty.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        slots: tuple[int, ...],
        rows: int = 0,
        width: int = 0,
        level: NoiseLevel | None = None,
        fixed: bool = False,
    ) -> None:
        self._of_tasks = vectors
        self._level = NoiseLevel() if level is None else level
        self._is_timed = False
        self.slots, self.rows, self.width = slots, rows, width
        self._fixed = fixed
        # Laid out row by row, D and U are ready to be multiplied by, which pays where rows have few
        # tokens; but they take as many bytes as rows have tasks. Compiled code's tensors must not
        # depend on who runs.
        self._is_laid_by_row = bool(rows) and not fixed
        if self._is_laid_by_row:
            self._is_laid_by_row = rows * width * vectors.largest(slots) <= _BY_ROW_BYTES
        self.plain = False
        self.nbytes = 0
        self._weights = torch.zeros(max(1, rows), len(slots), len(PARTS))
        self._chosen = torch.zeros(max(1, rows), max(1, width), dtype=torch.long)
        self._vectors: dict[Place, _Vectors] = {}
        self._ready: dict[tuple[Layer, Place], Ready | None] = {}
        self._sources: dict[Layer, tuple[Tensor, ...]] = {}

    def put(self, weights: Tensor) -> None:
        """Puts strengths in force, in the tensors there are.

        Args:
            weights: (S, 3), or (B, S, 3) with rows, S all slots; on the CPU.
        """
        nobody = weights.new_zeros(*weights.shape[:-2], 1, len(PARTS))  # slot -1
        own = torch.cat([weights, nobody], dim=-2)[..., list(self.slots), :]
        self._weights = own if self.rows else own.unsqueeze(0)
        strengths = self._weights[..., PARTS.index("subspace")]
        if self.rows:
            acting = self._weights.any(-1)
            # a stable order, so that rows that run the same tasks sum them up alike
            before = self._chosen
            self._chosen = acting.int().argsort(dim=1, descending=True, stable=True)
            self._chosen = self._chosen[:, : self.width]
            strengths = strengths.gather(1, self._chosen)
            if self._is_laid_by_row and not torch.equal(before, self._chosen):
                self._ready.clear()
        self.plain = bool((strengths == 1).all()) and not self._is_timed
        for place, vectors in self._vectors.items():
            self._fill(vectors, place)

    def follow_time(self) -> None:
        """Puts the noise level in force, in the tensors there are."""
        for vectors in self._vectors.values():
            for key, mask in vectors.masks.items():
                if key[1] is not None:
                    mask.copy_(self._unit_strengths(*key).view(mask.shape))

    def refill(self, slots: tuple[int, ...]) -> None:
        """Puts other tasks in the places there are, in the same tensors; then `put` strengths."""
        self.slots = slots
        self._sources.clear()
        self.renew()

    def is_live(self, layer: Layer) -> bool:
        """Says whether a parameter of these tasks is being trained on a layer."""
        return True in [t.requires_grad for t in self._sources_of(layer)]

    def _sources_of(self, layer: Layer) -> tuple[Tensor, ...]:
        sources = self._sources.get(layer)
        if sources is None:
            there = [layer.affiners[slot] for slot in self.slots if slot in layer.affiners]
            sources = tuple(t for affiner in there for t in affiner.parameters())
            self._sources[layer] = sources
        return sources

    def ready(self, layer: Layer, place: Place) -> Ready | None:
        """Returns a layer's tasks, laid out at their first use; None if none has this layer.

        Args:
            layer: One of the ensemble's.
            place: Device and dtype of the layer's output.
        """
        key = (layer, place)
        if key not in self._ready:
            with torch.inference_mode(False), torch.no_grad():  # training may use it later
                self._ready[key] = self._made(layer, place)
                if layer.kin and not self._fixed:
                    self._join(layer.kin, place)
        return self._ready[key]

    def _join(self, layers: Sequence[Layer], place: Place) -> None:
        """Lays kin out together, so that the first of them can multiply for all."""
        own = []
        for layer in layers:
            if (layer, place) not in self._ready:
                self._ready[layer, place] = self._made(layer, place)
            ready = self._ready[layer, place]
            if ready is None:
                return
            own.append(ready)
        kin = joined_kin([ready.form for ready in own])
        if kin is None:
            return
        self.nbytes += kin.down.nbytes
        downs = kin.down.split(list(kin.ranks), dim=-2)  # the same numbers need not be held twice
        for i, (layer, ready, down) in enumerate(zip(layers, own, downs, strict=True)):
            form = ready.form._replace(down=down)
            self._ready[layer, place] = ready._replace(form=form, kin=kin, place=i)

    def _made(self, layer: Layer, place: Place) -> Ready | None:
        present = [layer.affiners.get(slot) for slot in self.slots]
        there = [affiner for affiner in present if affiner is not None]
        if not there and not self._fixed:
            return None
        kinds = list(layer.affiners.values()) if self._fixed else there
        vectors = self._vectors_at(place)
        own = slice(layer.start, layer.start + layer.width)
        gains = any(a.scale is not None for a in kinds)
        offsets = any(a.shift is not None for a in kinds) or _needs_bias(layer, kinds)
        gathered = bool(self.rows) and layer.geometry is None
        by_row = gathered and self._is_laid_by_row
        factors = stacked(present, kinds) if gathered or self._fixed else joined(there)
        ranks: tuple[int, ...] = tuple(0 if a is None else a.rank for a in present)
        if factors is not None and gathered:
            ranks = (factors.down.shape[1], -1)
        elif factors is not None and self._fixed:
            ranks = (factors.down.shape[1],) * len(self.slots)
            factors = flattened(factors)
        mask = None
        if factors is not None:
            timed = any(affiner.windows is not None for affiner in kinds)
            mask = self._mask(vectors, place, (ranks, layer if timed else None))
            factors = self._by_row(factors).to(*place) if by_row else factors.to(*place)
        sources = self._sources_of(layer)
        if factors is not None:
            shared = {t.untyped_storage().data_ptr() for t in sources}
            for t in (factors.down, factors.up):
                self.nbytes += 0 if t.untyped_storage().data_ptr() in shared else t.nbytes
        form = Form(
            gain=vectors.gain[..., own] if gains else None,
            offset=vectors.offset[..., own] if offsets else None,
            down=None if factors is None else factors.down,
            up=None if factors is None else factors.up,
            mask=mask,
            floor=None if factors is None else factors.floor,
            linear=factors is not None and factors.linear,
            chosen=None if by_row or not gathered or factors is None else vectors.chosen,
            rows=self.rows,
        )
        return Ready(form, sources, version_of(sources))

    def _by_row(self, factors: Factors) -> Factors:
        chosen = self._chosen.flatten().to(factors.down.device)

        def own(bank: Tensor) -> Tensor:
            return bank.index_select(0, chosen).view(self.rows, -1, bank.shape[-1])

        floor = None if factors.floor is None else own(factors.floor[..., None]).squeeze(-1)
        return Factors(own(factors.down), own(factors.up), floor, factors.linear)

    def _vectors_at(self, place: Place) -> _Vectors:
        vectors = self._vectors.get(place)
        if vectors is None:
            total = self._of_tasks.channels
            shape = (self.rows, total) if self.rows else (total,)
            device, dtype = place
            vectors = _Vectors(
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
                chosen=torch.zeros(self._chosen.numel(), device=device, dtype=torch.long),
            )
            self._vectors[place] = vectors
            self.nbytes += vectors.gain.nbytes + vectors.offset.nbytes
            self._fill(vectors, place)
        return vectors

    def _fill(self, vectors: _Vectors, place: Place) -> None:
        """Writes what the strengths make of the tasks' vectors into the tensors there are."""
        device, dtype = place
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        weights = self._weights.to(device, exact)
        rows = len(weights)
        gain = torch.zeros(rows, self._of_tasks.channels, device=device, dtype=exact)
        offset = torch.zeros_like(gain)
        for k, slot in enumerate(self.slots):
            if slot < 0:
                continue
            scale, shift, unbiased = self._of_tasks.of(slot, device)
            w_scale, w_shift = weights[:, k, 0:1], weights[:, k, 1:2]
            gain.addcmul_(w_scale, scale)
            offset.addcmul_(w_shift, shift).addcmul_(w_scale, unbiased)
        if dtype in WIDE:  # in 16 bits 1 + a would round a small a away
            gain += 1
        vectors.gain.copy_(gain.view(vectors.gain.shape))
        vectors.offset.copy_(offset.view(vectors.offset.shape))
        for key, mask in vectors.masks.items():
            mask.copy_(self._unit_strengths(*key).view(mask.shape))
        if vectors.chosen is not None:
            vectors.chosen.copy_(self._chosen.flatten())

    def _mask(self, vectors: _Vectors, place: Place, key: _MaskKey) -> Tensor:
        if key not in vectors.masks:
            if key[1] is not None:
                self._is_timed, self.plain = True, False
            strengths = self._unit_strengths(*key)
            strengths = strengths if self.rows else strengths[0]
            vectors.masks[key] = strengths.to(*place)
        return vectors.masks[key]

    def _unit_strengths(self, ranks: tuple[int, ...], layer: Layer | None) -> Tensor:
        """Returns the strength of each hidden unit, (B or 1, R), or (B, M·R) where gathered.

        Args:
            ranks: Of each task; of one for all where gathered, then a -1 behind it.
            layer: Whose units act by noise level; None: they always act.
        """
        strengths = self._weights[..., PARTS.index("subspace")]
        if ranks[-1:] == (-1,):
            strengths = strengths.gather(1, self._chosen).repeat_interleave(ranks[0], dim=1)
        else:
            strengths = strengths.repeat_interleave(torch.tensor(ranks), dim=1)
        return strengths if layer is None else strengths * self._windows(ranks, layer)

    def _windows(self, ranks: tuple[int, ...], layer: Layer) -> Tensor:
        """Returns which hidden units act at the noise level, as `_unit_strengths` has them."""
        gathered = ranks[-1:] == (-1,)
        own = []
        widths = ranks[:1] * len(self.slots) if gathered else ranks
        for slot, rank in zip(self.slots, widths, strict=True):
            affiner = layer.affiners.get(slot)
            if affiner is None or affiner.windows is None:
                own.append(torch.ones(1, rank))
                continue
            window = torch.atleast_2d(self._level.window(affiner.windows)).cpu()
            if self.rows and len(window) > 1:
                check_rows(self.rows, len(window))
            window = window if self.rows else window[:1]  # all rows are in one range
            own.append(F.pad(window, (0, rank - window.shape[1])))
        rows = max(map(len, own))
        if not gathered:
            return torch.cat([window.expand(rows, -1) for window in own], dim=1)
        every = torch.stack([window.expand(self.rows, -1) for window in own], dim=1)  # (B, S, R)
        place = self._chosen.unsqueeze(-1).expand(-1, -1, ranks[0])
        return every.gather(1, place).flatten(1)

    @property
    def is_current(self) -> bool:
        """Says whether no parameter has changed in place since it was laid out."""
        return all(ready is None or ready.is_current for ready in self._ready.values())

    def renew(self) -> None:
        """Lays out anew, in the tensors there are."""
        for (layer, place), old in list(self._ready.items()):
            new = self._made(layer, place)
            if old is not None and new is not None:
                for own, now in zip(old.form.tensors(), new.form.tensors(), strict=True):
                    if own.data_ptr() != now.data_ptr():
                        own.copy_(now)
                new = Ready(old.form, new.sources, new.version)
            self._ready[layer, place] = new

    def tensors(self, layers: Sequence[Layer]) -> Iterator[Tensor]:
        """Yields what it holds for these layers."""
        for (layer, _), ready in self._ready.items():
            if ready is not None and layer in layers:
                yield from ready.form.tensors()


def _needs_bias(layer: Layer, affiners: Sequence[Affiner]) -> bool:
    return layer.bias is not None and any(
        a.scale is not None and not a.scale_includes_bias for a in affiners
    )
