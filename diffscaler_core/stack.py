"""K tasks on one layer: what both carriers put behind a layer.

Knows layers only through (x, y, geometry, bias); how the call reaches the layer is the carrier's
business (`attach.py` here, `nodes/patching.py` in ComfyUI). What the tasks' strengths are, and what
was laid out for them, the model's `Ensemble` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .affiner import PARTS, Affiner, ConvGeometry, apply_folded, fold, fold_alone, windowed
from .affiner_grad import affine, is_plain
from .arrangement import Arrangement, Ready
from .ensemble import Ensemble
from .errors import DiffScalerError
from .forms import apply_form, product_of
from .groups import apply_each, apply_stacked, fold_groups, group_windows, stack_groups
from .kernels import finish, serves
from .layer_tasks import Layer, version_of
from .regional import apply_factors
from .regional_forms import Question
from .scales import ScaleWatch
from .siblings import Offer, Shared, Siblings
from .windows import check_rows, joined

_NOBODY = -1


class AffinerStack(nn.Module):
    """The affiners of several tasks on one layer.

    Strengths live in the ensemble's tensors, changed in place, so that a compiled model sees new
    values without a new graph. While a parameter of a task that acts requires a gradient the stack
    is folded anew at every call.

    Args:
        name: The layer's name, for messages.
        affiners: One per task that has this layer.
        slots: For each affiner, its task's index among all tasks attached.
        bias: The layer's own bias, float32, (C_out,), or None.
        geometry: The layer's convolution geometry, None for a Linear.
        row_layout: How the layer's leading dimensions hold the batch: "batch" (dim 0 is the batch),
            "fold" (dim 0 is batch × something, row after row), "flat" (dim 0 is 1 and dim 1 holds
            the rows' tokens one after the other).
    """

    def __init__(
        self,
        name: str,
        affiners: Sequence[Affiner],
        slots: Sequence[int],
        bias: Tensor | None,
        geometry: ConvGeometry | None,
        row_layout: str = "batch",
    ) -> None:
        super().__init__()
        self.name = name
        self.affiners = nn.ModuleList(affiners)
        self.slots = tuple(slots)
        self.geometry = geometry
        self.row_layout = row_layout
        self.siblings = Siblings()
        self.watch = ScaleWatch()
        self.layer = Layer(name, dict(zip(slots, affiners, strict=True)), bias, geometry)
        self._groups: tuple[int, ...] | None = None
        self._alone_for: Tensor | None = None
        self._alone_then: int | None = None
        self._known = self._found()
        self.ensemble = Ensemble()
        self.join(self.ensemble, self.siblings, self.watch)
        self.set_weights(torch.ones(1 + max(self.slots, default=0), len(PARTS)))

    def join(self, ensemble: Ensemble, siblings: Siblings, watch: ScaleWatch) -> None:
        """Makes this one of a model's stacks, which share what they know."""
        self.ensemble, self.siblings, self.watch = ensemble, siblings, watch
        ensemble.add(self.layer)

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force in all stacks of the ensemble; see `Ensemble.set_weights`."""
        self._groups = None
        self.ensemble.set_weights(weights)

    def set_groups(self, groups: Sequence[int] | None) -> None:
        """Makes each of len(groups) equal parts of the batch run one task alone, at strength 1.

        Args:
            groups: Per part of the batch its task's index among all tasks attached; None: the
                ensemble's strengths again.
        """
        self._groups = None
        if groups is not None:
            self._groups = tuple(self.slots.index(g) if g in self.slots else -1 for g in groups)

    def affiner_of(self, slot: int) -> Affiner:
        """Returns the affiner of the task with this index among all tasks attached."""
        return self._affiners()[self.slots.index(slot)]

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, float32, (C_out,), where a scale asks for it."""
        return self.layer.bias

    def put(self, slot: int, affiner: Affiner, bias: Tensor | None = None) -> None:
        """Adds a task's affiner here.

        Args:
            slot: The task's index among all tasks attached; nobody has it here.
            affiner: The affiner.
            bias: As in the class, should nobody have asked for it before.
        """
        self.affiners.append(affiner)
        self.slots = (*self.slots, slot)
        self.layer.affiners[slot] = affiner
        self.layer.bias = bias if self.layer.bias is None else self.layer.bias
        self.unsettle()

    def renumber(self, slot: int) -> None:
        """Gives the only task another index."""
        (affiner,) = self.layer.affiners.values()
        self.slots = (slot,)
        self.layer.affiners = {slot: affiner}
        self.unsettle()

    def drop(self, slot: int) -> None:
        """Takes a task's affiner away, if it has one here."""
        if slot in self.slots:
            del self.affiners[self.slots.index(slot)]
            self.slots = tuple(own for own in self.slots if own != slot)
            del self.layer.affiners[slot]
            self.unsettle()

    def forward(self, x: Tensor, y: Tensor, owned: bool = False) -> Tensor:
        """Returns y + Σ wₖ Δₖ(x, y), shaped like y.

        Args:
            x: The layer's input.
            y: The layer's output; not modified unless `owned`.
            owned: Nobody else holds y, so that it may hold the result.

        Raises:
            DiffScalerError: Rows or groups are set, and the layer's leading dimension does not fit.
        """
        if self._groups is not None:
            return self._apply_groups(x, y, self._groups)
        if torch.compiler.is_compiling():
            return self._apply_traced(x, y)
        now = self.ensemble.now
        if now is None:
            return y
        if now.is_live(self.layer):
            self.layer.was_live = True
            return self._apply_live(x, y)
        place = (y.device, y.dtype)
        ready = now.ready(self.layer, place)
        if ready is None:
            return y
        if self.layer.was_live or not ready.is_current:
            self.ensemble.forget()
            now = cast(Arrangement, self.ensemble.now)
            ready = cast(Ready, now.ready(self.layer, place))
        repeats = self._row_repeats(y, now.rows) if now.rows else 1
        if self.ensemble.regional is not None:
            own = self.ensemble.regional.of(self._question(y, repeats), *self._here())
            return y if own is None else apply_factors(x, y, *own, self.geometry, owned)
        hidden = None
        if ready.kin is not None:
            hidden = self.ensemble.products.take(ready.kin, ready.place, x, y)
        if self.geometry is None and serves(x, y, ready.form):
            product = product_of(x.to(*place), ready.form) if hidden is None else hidden
            return finish(product, y, ready.form, not now.plain)
        return apply_form(x, y, ready.form, self.geometry, repeats, not now.plain, hidden, owned)

    def _question(self, y: Tensor, repeats: int) -> Question:
        place = (y.device, y.dtype)
        return Question(self.name, tuple(y.shape), place, self.geometry, self.row_layout, repeats)

    def _here(self) -> tuple[dict[int, Affiner], Tensor | None]:
        return self.layer.affiners, self.layer.bias

    def _apply_live(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies parameters that are being trained."""
        if self.ensemble.regional is not None:
            raise DiffScalerError(
                f"regions are set, but the task's parameters on {self.name!r} are being trained: "
                f"a task is trained on whole pictures; take the regions away"
            )
        alone = self._alone()
        if alone is None:
            return self._apply_folded_now(x, y)
        return y if alone == _NOBODY else self._apply_alone(x, y, alone)

    def _apply_alone(self, x: Tensor, y: Tensor, which: int) -> Tensor:
        affiner = self._affiners()[which]
        folded = fold_alone(affiner, self.layer.bias, y.device)
        window = self._window([affiner], y)
        repeats = 1 if window is None or window.ndim == 1 else self._row_repeats(y, len(window))
        if self._is_lean(x, y):
            rows = None if window is None else torch.atleast_2d(window)
            return affine(x, y, folded, self.name, shared=self._share(x, y), window=rows)
        folded = windowed(folded, window)
        return apply_folded(x, y, folded.to(y.device, y.dtype), self.geometry, repeats)

    def _apply_folded_now(self, x: Tensor, y: Tensor) -> Tensor:
        weights, affiners = self._own_weights(), self._affiners()
        folded = fold(affiners, weights.to(y.device), self.layer.bias)
        window = self._window(affiners, y)
        rows = len(weights) if weights.ndim == 3 else 0
        if window is not None and window.ndim == 2:
            rows = len(window)
            check_rows(len(weights) if weights.ndim == 3 else rows, rows)
        folded = windowed(folded, window)
        repeats = self._row_repeats(y, rows) if rows else 1
        return apply_folded(x, y, folded.to(y.device, y.dtype), self.geometry, repeats)

    def _window(self, affiners: Sequence[Affiner | None], y: Tensor) -> Tensor | None:
        """Returns what the hidden units of these affiners are multiplied with at this noise level.

        (ΣR,), or (B, ΣR) by row, on y's device; None: all act.
        """
        own = [affiner for affiner in affiners if affiner is not None]
        if all(affiner.windows is None for affiner in own):
            return None
        windows = joined([a.windows for a in own], [a.rank for a in own])
        assert windows is not None
        return self.ensemble.level.window(windows).to(y.device)

    def _apply_traced(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies in a way that compiled code can follow."""
        if any(parameter.requires_grad for parameter in self._known):
            return self._apply_folded_now(x, y)
        if self.ensemble.regional is not None:
            self._prepare_regional(y.shape, y.device, y.dtype)
            own = self.layer.compiled_regional
            return y if own is None else apply_factors(x, y, *own, self.geometry)
        self._prepare_compiled(y.device, y.dtype)
        form = self.layer.compiled
        if form is None:
            return y
        repeats = self._row_repeats(y, form.rows) if form.rows else 1
        return apply_form(x, y, form, self.geometry, repeats)

    @torch.compiler.assume_constant_result
    def _prepare_compiled(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Runs while code is being compiled, not in it."""
        self.ensemble.prepare_compiled(self.layer, (device, dtype))
        return True

    @torch.compiler.assume_constant_result
    def _prepare_regional(
        self, shape: torch.Size, device: torch.device, dtype: torch.dtype
    ) -> bool:
        """Runs while code is being compiled, not in it."""
        y = torch.empty((), device=device, dtype=dtype).expand(shape)
        rows = self.ensemble.rows
        repeats = self._row_repeats(y, rows) if rows else 1
        self.ensemble.prepare_regional(self.layer, self._question(y, repeats))
        return True

    def _is_lean(self, x: Tensor, y: Tensor) -> bool:
        """Says whether the gradients can be had while keeping less (see `affiner_grad`)."""
        return (
            self.geometry is None
            and x.device == y.device
            and is_plain(y)
            and self.watch.is_safe(self)
        )

    def _share(self, x: Tensor, y: Tensor) -> Shared | None:
        offer = self.offer(y.device, y.dtype)
        return None if offer is None else self.siblings.share(self, x, offer, y.device, y.dtype)

    def offer(self, device: torch.device, dtype: torch.dtype) -> Offer | None:
        """Returns the D that is trained here now; None if there is none to share."""
        if self.geometry is not None:
            return None
        if not any(parameter.requires_grad for parameter in self._known):
            return None
        alone = self._alone()
        if alone is None or alone == _NOBODY:
            return None
        affiner = self._affiners()[alone]
        down = affiner.down
        if not isinstance(down, nn.Parameter):  # none, or computed whenever it is read
            return None
        return Offer(down, affiner.activation == "identity")

    def scales(self) -> list[Tensor]:
        """Returns the tasks' scales on this layer."""
        scales = (affiner.scale for affiner in self._affiners())
        return [scale for scale in scales if scale is not None]

    @property
    def version(self) -> int:
        """A number that grows with every in-place change of a parameter."""
        return version_of(self._known)

    def _apply_groups(self, x: Tensor, y: Tensor, groups: tuple[int, ...]) -> Tensor:
        live = any(parameter.requires_grad for parameter in self._known)
        if live and len(set(groups)) == 1:  # one task for all: the plain path, at its cost
            self.layer.was_live = True
            return y if groups[0] < 0 else self._apply_alone(x, y, groups[0])
        whole = y.shape[1] if self.row_layout == "flat" and y.shape[0] == 1 else y.shape[0]
        if whole % len(groups):
            raise DiffScalerError(
                f"{len(groups)} groups are set, but {self.name!r} ran on a tensor of shape "
                f"{tuple(y.shape)}: its leading dimension does not divide by {len(groups)}, so "
                f"groups cannot be told apart; give every group the same number of rows, or leave "
                f"this layer out of the tasks"
            )
        affiners = self._affiners()
        chosen = [None if i < 0 else affiners[i] for i in groups]
        folded = fold_groups(chosen, self.layer.bias, y.device)
        windows = self._group_windows(chosen, y)
        if self.geometry is not None:
            return apply_each(x, y, folded, self.geometry, windows)
        if all(own is None for own in folded):
            return y
        stacked = stack_groups(folded)
        window = group_windows(windows, stacked)
        if live and self._is_lean(x, y):
            return affine(x, y, stacked, self.name, len(groups), window=window)
        return apply_stacked(x, y, stacked.to(y.device, y.dtype), window)

    def _group_windows(
        self, chosen: Sequence[Affiner | None], y: Tensor
    ) -> list[Tensor | None] | None:
        """Returns each group's window, (1 or rows of the group, R); None: all units act."""
        if all(own is None or own.windows is None for own in chosen):
            return None
        found: list[Tensor | None] = []
        for i, own in enumerate(chosen):
            window = self._window([own], y)
            if window is not None and window.ndim == 2:
                check_rows(len(window) // len(chosen) * len(chosen), len(window))
                window = window.chunk(len(chosen))[i]
                self._row_repeats(y, len(window) * len(chosen))
            found.append(None if window is None else torch.atleast_2d(window))
        return found

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Lays the tasks out now for this device and dtype, so that the first call need not."""
        self.ensemble.settle(device, dtype)

    def unsettle(self) -> None:
        """Drops what was computed; the next call computes it, and looks for the parameters anew."""
        self._known = self._found()
        self.ensemble.forget(compiled=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AffinerStack:
        super()._apply(fn, recurse)
        self.unsettle()  # torch may have put new parameters in the old ones' places
        return self

    @property
    def computed_bytes(self) -> int:
        """Bytes of what was computed from the parameters, held beside them."""
        return self.ensemble.bytes_of([self.layer])

    @property
    def nbytes(self) -> int:
        """Bytes this stack holds: parameters, and what was computed from them."""
        return self.computed_bytes + sum(p.numel() * p.element_size() for p in self.parameters())

    def _own_weights(self) -> Tensor:
        """Returns the strengths of this layer's tasks, (K, 3), or (B, K, 3) with rows."""
        return self.ensemble.weights[..., list(self.slots), :]

    def _alone(self) -> int | None:
        """Returns the affiner that runs alone at strength 1; None if that is not the case."""
        if self._groups is not None:
            return self._groups[0] if len(set(self._groups)) == 1 else None
        if self.ensemble.weights is not self._alone_for:
            self._alone_for = self.ensemble.weights
            self._alone_then = _alone(self._own_weights())
        return self._alone_then

    def _affiners(self) -> list[Affiner]:
        return [cast(Affiner, affiner) for affiner in self.affiners]

    def _found(self) -> list[Tensor]:
        """Returns the parameters; asking the modules at each call would cost more than a sum."""
        return [parameter for affiner in self._affiners() for parameter in affiner.parameters()]

    def _row_repeats(self, y: Tensor, rows: int) -> int:
        """Returns how many consecutive leading entries of y belong to one row."""
        if y.shape[0] == rows:
            return 1
        length = y.shape[1] if self.row_layout == "flat" and y.shape[0] == 1 else y.shape[0]
        if self.row_layout == "batch" or length % rows:
            raise DiffScalerError(
                f"{rows} rows are set, but {self.name!r} ran on a tensor of shape "
                f"{tuple(y.shape)}: its leading dimension is not the batch, so rows cannot be told "
                f"apart; set as many rows as the batch has, or leave this layer out of the task"
            )
        return length // rows


def _alone(weights: Tensor) -> int | None:
    if weights.ndim == 3:
        return None
    running = [k for k, own in enumerate(weights.tolist()) if any(own)]
    if len(running) != 1 or weights[running[0]].tolist() != [1.0] * len(PARTS):
        return None
    return running[0]
