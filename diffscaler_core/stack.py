"""K tasks on one layer, ready to run: what both carriers put behind a layer.

Knows layers only through (x, y, geometry, bias); how the call reaches the layer is the carrier's
business (`attach.py` here, `nodes/patching.py` in ComfyUI).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .affiner import PARTS, Affiner, ConvGeometry, Folded, apply_folded, fold, fold_alone
from .affiner_grad import affine, is_plain
from .errors import DiffScalerError
from .groups import apply_each, apply_stacked, fold_groups, stack_groups
from .scales import ScaleWatch
from .siblings import Offer, Shared, Siblings

_NOBODY = -1
AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | None)


class AffinerStack(nn.Module):
    """The affiners of several tasks on one layer, folded for the strengths in force.

    Strengths live in `weights`, changed in place, so that a compiled model sees new values without
    a new graph. While any parameter requires a gradient the stack is folded anew at every call;
    otherwise once, and again when weights or (outside compiled code) parameters have changed.

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
        modules = all(isinstance(affiner, nn.Module) for affiner in affiners)
        self.affiners = nn.ModuleList(affiners) if modules else tuple(affiners)
        self.slots = tuple(slots)
        self.geometry = geometry
        self.row_layout = row_layout
        self.idle = False
        self.siblings = Siblings()
        self.watch = ScaleWatch()
        self._groups: tuple[int, ...] | None = None
        self._alone: int | None = None
        self._known = self._found()
        self._bias = bias  # not a buffer: it belongs to the host
        self._weights = torch.ones(len(self.slots), len(PARTS))
        self._folded: Folded | None = None
        self._folded_version = 0

    def join(self, siblings: Siblings, watch: ScaleWatch) -> None:
        """Makes this one of a model's stacks, which share what they know."""
        self.siblings, self.watch = siblings, watch

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force: (K_all, 3) for the whole batch, or (B, K_all, 3) for rows."""
        with torch.inference_mode(False), torch.no_grad():  # training may come later
            own = weights[..., list(self.slots), :].float()
            self.idle = not bool(own.any())
            self._groups = None
            self._alone = _alone(own)
            self._weights = _overwrite(self._weights, own)
            if self._folded is not None:
                self._refold(self._folded)

    def set_groups(self, groups: Sequence[int]) -> None:
        """Makes each of len(groups) equal parts of the batch run one task alone, at strength 1.

        The next `set_weights` ends it.

        Args:
            groups: Per part of the batch its task's index among all tasks attached.
        """
        if len(set(groups)) == 1:  # one task for all: the plain path, at the plain path's cost
            weights = torch.zeros(1 + max(*self.slots, groups[0]), len(PARTS))
            weights[groups[0]] = 1
            self.set_weights(weights)
            self._alone = self.slots.index(groups[0]) if groups[0] in self.slots else _NOBODY
        else:
            self._groups = tuple(self.slots.index(g) if g in self.slots else -1 for g in groups)

    def affiner_of(self, slot: int) -> Affiner:
        """Returns the affiner of the task with this index among all tasks attached."""
        return self._affiners()[self.slots.index(slot)]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + Σ wₖ Δₖ(x, y), shaped like y; y itself is never modified.

        Raises:
            DiffScalerError: Rows or groups are set, and the layer's leading dimension does not fit.
        """
        live = any(parameter.requires_grad for parameter in self._known)
        if self._groups is not None:
            return self._apply_groups(x, y, self._groups, live)
        if torch.compiler.is_compiling():
            return self._apply_traced(x, y, live)
        if self.idle and not live:
            return y
        if live:
            return self._apply_live(x, y)
        repeats = self._row_repeats(y) if self._weights.ndim == 3 else 1
        return apply_folded(x, y, self._folded_for(y.device, y.dtype), self.geometry, repeats)

    def _apply_live(self, x: Tensor, y: Tensor) -> Tensor:
        """Applies parameters that are being trained."""
        self._folded = None
        if self._alone is None:
            return self._apply_traced(x, y, True)
        if self._alone == _NOBODY:
            return y
        folded = fold_alone(self._affiners()[self._alone], self._bias, y.device)
        if self._is_lean(x, y):
            return affine(x, y, folded, self.name, shared=self._share(x, y))
        return apply_folded(x, y, folded.to(y.device, y.dtype), self.geometry)

    def _apply_traced(self, x: Tensor, y: Tensor, live: bool) -> Tensor:
        """Applies in a way that compiled code can follow: it changes nothing, asks no `idle`."""
        repeats = self._row_repeats(y) if self._weights.ndim == 3 else 1
        if live:
            folded = fold(self._affiners(), self._weights.to(y.device), self._bias)
            folded = folded.to(y.device, y.dtype)
        else:
            folded = self._folded_in_trace(y)
        return apply_folded(x, y, folded, self.geometry, repeats)

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
        if self.geometry is not None or self._groups is not None:
            return None
        if not any(parameter.requires_grad for parameter in self._known):
            return None
        if self._alone is None or self._alone == _NOBODY:
            return None
        affiner = self._affiners()[self._alone]
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
        return sum(t._version for t in self._known if not t.is_inference())

    def _apply_groups(self, x: Tensor, y: Tensor, groups: tuple[int, ...], live: bool) -> Tensor:
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
        folded = fold_groups(chosen, self._bias, y.device)
        if self.geometry is not None:
            return apply_each(x, y, folded, self.geometry)
        if all(own is None for own in folded):
            return y
        stacked = stack_groups(folded)
        if live and self._is_lean(x, y):
            return affine(x, y, stacked, self.name, len(groups))
        return apply_stacked(x, y, stacked.to(y.device, y.dtype))

    def _folded_in_trace(self, y: Tensor) -> Folded:
        if self._folded is not None and _settled(self._folded, y.device, y.dtype):
            return self._folded
        return self._fold_now().to(y.device, y.dtype)  # a traced call must not change the stack

    def _folded_for(self, device: torch.device, dtype: torch.dtype) -> Folded:
        if (
            self._folded is None
            or not _settled(self._folded, device, dtype)
            or self._folded_version != self.version
        ):
            self.settle(device, dtype)
        return cast(Folded, self._folded)

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Folds now for this device and dtype, so that the first call need not."""
        with torch.inference_mode(False):  # what inference folds, training may use
            self._folded = self._fold_now().to(device, dtype)
        self._folded_version = self.version

    def unsettle(self) -> None:
        """Drops the folded copies; the next call folds again, and looks for the parameters anew."""
        self._folded = None
        self._known = self._found()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AffinerStack:
        super()._apply(fn, recurse)
        self._known = self._found()  # torch may have put new parameters in the old ones' places
        return self

    @property
    def folded_bytes(self) -> int:
        """Bytes of the folded copies, held beside the parameters."""
        held = [] if self._folded is None else self._folded.tensors()
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def nbytes(self) -> int:
        """Bytes this stack holds: parameters and their folded copies."""
        return self.folded_bytes + sum(p.numel() * p.element_size() for p in self.parameters())

    @torch.no_grad()
    def _fold_now(self) -> Folded:
        device = next(iter(self._known), self._weights).device
        return fold(self._affiners(), self._weights.to(device), self._bias)

    def _refold(self, old: Folded) -> None:
        """Folds anew into the tensors there are, so that compiled code sees the new values."""
        like = next(iter(old.tensors()), self._weights)
        new = self._fold_now().to(like.device, like.dtype)
        self._folded = Folded(
            gain=_overwrite(old.gain, new.gain),
            offset=_overwrite(old.offset, new.offset),
            down=_overwrite(old.down, new.down),
            up=_overwrite(old.up, new.up),
            floor=_overwrite(old.floor, new.floor),
            linear=new.linear,
            mask=_overwrite(old.mask, new.mask),
        )
        self._folded_version = self.version

    def _affiners(self) -> list[Affiner]:
        return [cast(Affiner, affiner) for affiner in self.affiners]

    def _found(self) -> list[Tensor]:
        """Returns the parameters; asking the modules at each call would cost more than a sum."""
        return [parameter for affiner in self._affiners() for parameter in affiner.parameters()]

    def _row_repeats(self, y: Tensor) -> int:
        """Returns how many consecutive leading entries of y belong to one row."""
        rows = self._weights.shape[0]
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
    """Returns the affiner that runs alone at strength 1; None if that is not the case."""
    if weights.ndim == 3:
        return None
    running = [k for k, own in enumerate(weights.tolist()) if any(own)]
    if len(running) != 1 or weights[running[0]].tolist() != [1.0] * len(PARTS):
        return None
    return running[0]


def _settled(folded: Folded, device: torch.device, dtype: torch.dtype) -> bool:
    like = next(iter(folded.tensors()), None)
    return like is None or (like.device == device and like.dtype == dtype)


def _overwrite(old: AnyTensor, new: AnyTensor) -> AnyTensor:
    """Writes new values into the old tensor where that is possible, so that graphs see them."""
    if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
        return new
    if old.is_inference():
        return new
    return old.copy_(new)
