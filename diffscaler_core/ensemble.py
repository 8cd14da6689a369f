"""All tasks on one model: which of them act, how strongly, and in which rows of the batch.

The layers' stacks (`stack.py`) share one ensemble, and ask it what to run. Outside of compiled code
an `Arrangement` holds the tasks that act now and no others, so that a task at rest costs nothing.
Compiled code must find tensors of the same shapes whatever acts: it has an arrangement of its own,
which only ever grows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .affiner import PARTS
from .arrangement import Arrangement
from .errors import DiffScalerError
from .kin import Products
from .layer_tasks import Layer, TaskVectors
from .regional_forms import Place, Question, RegionalForms, copy_into
from .regions import Regions
from .windows import NoiseLevel, ranges_of

#: Arrangements are kept, so that switching back costs nothing, while they hold no more bytes than
#: this (beyond the two last ones), and no more than so many.
_KEPT_BYTES, _KEPT = 256 << 20, 64
#: How many tasks compiled code has room for from the start, so that no switch among any number of
#: attached tasks compiles anew: for the whole batch (a place costs time whether it is used or not),
#: and told apart by row (it costs none). More at once compile anew, once. A row mixes up to the
#: first.
_SEATS, _SEATS_OF_ROWS = 2, 8


class Ensemble:
    """All tasks on one model; shared by its stacks.

    Attributes:
        weights: The strengths in force, (S, 3), or (B, S, 3) with rows, S the slots; on the CPU.
        regional: What differs by place, or None: every task acts everywhere.
        products: What layers that are given the same tensor share.
        level: The noise level of the next call, which tasks with windows go by.
    """

    def __init__(self) -> None:
        self.regional: RegionalForms | None = None
        self._regions: Regions | None = None
        self.products = Products()
        self.weights = torch.ones(1, len(PARTS))
        self.level = NoiseLevel()
        self._given = self.weights
        self._edges: dict[int, tuple[float, ...]] | None = None
        self._ranges: object = None
        self._layers: list[Layer] = []
        self._vectors = TaskVectors(self._layers)
        self._arranged: OrderedDict[tuple[object, ...], Arrangement] = OrderedDict()
        self._now: Arrangement | None = None
        self._is_put = False
        self._is_measured = False
        self._compiled: dict[int, Arrangement] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was computed: a copy computes it again."""
        computed: dict[str, Any] = {
            "_arranged": OrderedDict(),
            "_now": None,
            "_is_put": False,
            "_is_measured": False,
        }
        return {**self.__dict__, **computed, "_compiled": {}}

    def add(self, layer: Layer) -> None:
        """Makes a layer one of the model's."""
        self._edges = None
        self._layers.append(layer)
        self.forget()

    def discard(self, layers: Sequence[Layer]) -> None:
        """Lets go of layers that no task adapts any more."""
        self._edges = None
        self._layers[:] = [layer for layer in self._layers if layer not in layers]
        self.forget(compiled=True)

    @property
    def rows(self) -> int:
        """B, or 0 while the whole batch runs alike."""
        return len(self.weights) if self.weights.ndim == 3 else 0

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force.

        Args:
            weights: (S, 3) for the whole batch, or (B, S, 3) for rows.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._given = weights.detach().to("cpu", torch.float32, copy=True)
            self._put()

    def _put(self) -> None:
        self.weights = self._by_row()
        self._now, self._is_put = None, False
        if any(layer.place is not None for layer in self._layers):
            self._put_compiled()
        if self._regions is not None:
            self._put_regions()

    def set_time(self, log_snr: Tensor) -> None:
        """Says at which noise level the next calls are, in the tensors there are.

        Args:
            log_snr: λ, () for the whole batch, or (B,) by row.

        Raises:
            DiffScalerError: A λ that is no number.
        """
        self.level.put(log_snr)
        edges = self._windowed()
        if not edges or self._is_live():  # which reads it where it lies: no device waits
            self._ranges = None
            return
        ranges = _ranges(edges, log_snr.cpu())
        if ranges == self._ranges:
            return
        self._ranges = ranges
        with torch.inference_mode(False), torch.no_grad():
            if self._by_row().shape != self.weights.shape:
                self._put()
                return
            if log_snr.ndim and len(log_snr) not in (1, self.rows or len(log_snr)):
                self._now, self._is_put = None, False  # the call says so, unless rows follow
            elif self._is_put and self._now is not None:
                self._now.follow_time()
            if any(layer.place is not None for layer in self._layers):
                self._put_compiled()
            if self._regions is not None:
                self._put_regions()

    def _windowed(self) -> dict[int, tuple[float, ...]]:
        """Returns the slots of tasks whose units act by noise level -> the edges of its ranges."""
        if self._edges is None:
            self._edges = {}
            for layer in self._layers:
                for slot, affiner in layer.affiners.items():
                    if affiner.windows is not None:
                        self._edges[slot] = affiner.windows.edges
        return self._edges

    def _is_live(self) -> bool:
        """Says whether a task with windows is being trained."""
        return any(
            parameter.requires_grad
            for layer in self._layers
            for slot in self._windowed()
            if slot in layer.affiners
            for parameter in layer.affiners[slot].parameters()
        )

    def _by_row(self) -> Tensor:
        """Returns the strengths by row of the batch where rows lie in different ranges."""
        level, given = self.level.log_snr, self._given
        if level is None or level.ndim == 0 or given.ndim == 3 or self._is_live():
            return given
        acting = set(given.any(-1).nonzero().flatten().tolist())
        edges = {slot: own for slot, own in self._windowed().items() if slot in acting}
        if all(len(set(own)) == 1 for _, own in _ranges(edges, level.cpu())):
            return given
        return given.expand(len(level), -1, -1).clone()

    def set_regions(self, regions: Regions | None) -> None:
        """Makes tasks act in parts of the picture alone; None: everywhere again."""
        if regions is self._regions:
            return
        self._regions = regions
        self._put_regions()

    def _put_regions(self) -> None:
        acting = self._acting()
        known = self.regional
        if self._regions is None or not acting:
            self.regional = None
        elif known is not None and (known.regions, known.slots) == (self._regions, acting):
            known.put(self.weights)
        else:
            self.regional = RegionalForms(self._regions, acting, self.weights, self.level)
        for layer in self._layers:
            if layer.asked is not None:
                self.prepare_regional(layer, layer.asked)

    def prepare_regional(self, layer: Layer, asked: Question) -> None:
        """Lays a layer's tasks out for code that is being compiled: `layer.compiled_regional`."""
        if self.regional is None:
            return
        layer.asked = asked
        new = self.regional.of(asked, layer.affiners, layer.bias)
        old = layer.compiled_regional
        if old is None or new is None or not copy_into(old, new):
            layer.compiled_regional = new

    @property
    def now(self) -> Arrangement | None:
        """What acts now, for calls outside of compiled code; None: nothing does."""
        if not self._is_put:
            with torch.inference_mode(False), torch.no_grad():
                self._measure()
                self._now = self._arrange(self._acting(), self._width())
            self._is_put = True
        return self._now

    def prepare_compiled(self, layer: Layer, place: Place) -> None:
        """Lays a layer's tasks out for code that is being compiled: `layer.compiled`."""
        with torch.inference_mode(False), torch.no_grad():
            layer.place = place
            self._put_compiled([layer])

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Lays everything out now for this device and dtype, so that the first call need not."""
        now = self.now
        for layer in self._layers if now is not None else ():
            now.ready(layer, (device, dtype))  # type: ignore[union-attr]
        with torch.inference_mode(False), torch.no_grad():
            if any(layer.place is not None for layer in self._layers):
                self._put_compiled()

    def forget(self, *, compiled: bool = False) -> None:
        """Drops what was computed from parameters; the next call computes it again.

        Args:
            compiled: True: also what compiled code uses, which then is compiled anew.
        """
        if compiled and self._compiled:
            self._forget_compiled()
        self._arranged.clear()
        self._edges = self._ranges = None
        self._now, self._is_put, self._is_measured = None, False, False
        if self.regional is not None:
            self.regional = None
            self._put_regions()

    def _forget_compiled(self) -> None:
        self._compiled.clear()
        for layer in self._layers:
            layer.compiled = layer.compiled_regional = None

    def _measure(self) -> None:
        """Finds every layer's place anew, after layers or parameters have changed."""
        if self._is_measured:
            return
        if self._vectors.measure():
            self._forget_compiled()
        for layer in self._layers:
            layer.was_live = False
        self._vectors.forget()
        self._is_measured = True

    @property
    def arranged_bytes(self) -> int:
        """Bytes of the arrangements that are kept, roughly and at once: to see them change."""
        return sum(own.nbytes for own in self._arranged.values())

    @property
    def computed_bytes(self) -> int:
        """Bytes held beside the parameters."""
        return self.bytes_of(self._layers)

    def bytes_of(self, layers: Sequence[Layer]) -> int:
        """Returns the bytes held beside the parameters for these layers."""
        parameters = {
            t.untyped_storage().data_ptr()
            for layer in layers
            for affiner in layer.affiners.values()
            for t in affiner.parameters()
        }
        arrangements = [*self._arranged.values(), *self._compiled.values()]
        tensors = [t for own in arrangements for t in own.tensors(layers)]
        tensors += self._vectors.tensors() if tensors else []
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for start, size in held.items() if start not in parameters)

    def _acting(self) -> tuple[int, ...]:
        acting = self.weights.any(-1)
        acting = acting.any(0) if acting.ndim == 2 else acting
        return tuple(int(slot) for slot in acting.nonzero().flatten())

    def _width(self) -> int:
        return int(self.weights.any(-1).sum(-1).max()) if self.rows else 0

    def _arrange(self, slots: tuple[int, ...], width: int) -> Arrangement | None:
        if not slots:
            return None
        key = (slots, self.rows, width)
        arrangement = self._arranged.get(key)
        if arrangement is None:
            arrangement = Arrangement(self._vectors, slots, self.rows, width, self.level)
            self._arranged[key] = arrangement
            self._evict()
        self._arranged.move_to_end(key)
        arrangement.put(self.weights)
        return arrangement

    def _evict(self) -> None:
        """Drops arrangements that were used longest ago, and vectors that none needs any more."""
        held = self.arranged_bytes
        while len(self._arranged) > (2 if held > _KEPT_BYTES else _KEPT):
            held -= self._arranged.popitem(last=False)[1].nbytes
        arrangements = (*self._arranged.values(), *self._compiled.values())
        self._vectors.forget(but={slot for own in arrangements for slot in own.slots})

    def _put_compiled(self, layers: Sequence[Layer] | None = None) -> None:
        """Puts the strengths in force for compiled code, in the tensors it knows if they do.

        Args:
            layers: Those to lay out; None: all that compiled code has asked for.
        """
        self._measure()
        acting, width = self._acting(), self._width()
        known = self._compiled.get(self.rows)
        if known is None or len(acting) > len(known.slots) or width > known.width:
            known = self._compiled[self.rows] = self._room_for(acting, width, known)
        elif not set(acting) <= set(known.slots):
            known.refill(_seated(acting, known.slots))
        elif not known.is_current:
            self._vectors.forget()
            known.renew()
        known.put(self.weights)
        for layer in self._layers if layers is None else layers:
            if layer.place is not None:
                ready = known.ready(layer, layer.place)
                layer.compiled = None if ready is None else ready.form

    def _room_for(self, acting: Sequence[int], width: int, old: Arrangement | None) -> Arrangement:
        """Returns an arrangement for compiled code that has room for these tasks, and some more."""
        attached = sorted(set().union(*(layer.affiners for layer in self._layers)))
        count = _SEATS_OF_ROWS if self.rows else _SEATS
        count = max(len(acting), min(count, len(attached)), 0 if old is None else len(old.slots))
        if self.rows:
            width = max(width, min(_SEATS, len(attached)), 0 if old is None else old.width)
        slots = tuple(attached) if count >= len(attached) else _seated(acting, (-1,) * count)
        return Arrangement(self._vectors, slots, self.rows, width, self.level, fixed=True)


def _ranges(
    edges: dict[int, tuple[float, ...]], log_snr: Tensor
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns the range of each task with windows, one for all rows or one for each."""
    if bool(log_snr.isnan().any()):
        raise DiffScalerError("a noise level is a log-SNR, got NaN")
    found = {slot: ranges_of(own, log_snr).flatten().tolist() for slot, own in edges.items()}
    alike = all(len(set(own)) == 1 for own in found.values())
    return tuple((slot, tuple(own[:1] if alike else own)) for slot, own in found.items())


def _seated(acting: Sequence[int], old: Sequence[int]) -> tuple[int, ...]:
    """Returns who sits where now: who acts already stays, who does not makes way."""
    new = [slot for slot in acting if slot not in old]
    return tuple(new.pop(0) if slot not in acting and new else slot for slot in old)
