"""K tasks on one layer, ready to run: what both carriers put behind a layer.

Knows layers only through (x, y, geometry, bias); how the call reaches the layer is the carrier's
business (`attach.py` here, `nodes/patching.py` in ComfyUI).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from .affiner import PARTS, Affiner, ConvGeometry, Folded, apply_folded, fold
from .errors import DiffScalerError

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
        self.affiners = nn.ModuleList(affiners)
        self.slots = tuple(slots)
        self.geometry = geometry
        self.row_layout = row_layout
        self.idle = False
        self._bias = bias  # not a buffer: it belongs to the host
        self._weights = torch.ones(len(self.slots), len(PARTS))
        self._folded: Folded | None = None
        self._folded_version = 0

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force: (K_all, 3) for the whole batch, or (B, K_all, 3) for rows."""
        with torch.inference_mode(False), torch.no_grad():  # training may come later
            own = weights[..., list(self.slots), :].float()
            self.idle = not bool(own.any())
            self._weights = _overwrite(self._weights, own)
            if self._folded is not None:
                self._refold(self._folded)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + Σ wₖ Δₖ(x, y), shaped like y; y itself is never modified.

        Raises:
            DiffScalerError: Rows are set, and the layer's leading dimension does not fit them.
        """
        live = any(parameter.requires_grad for parameter in self._tensors())
        tracing = torch.compiler.is_compiling()
        if not tracing and self.idle and not live:  # a traced call must not ask `idle`
            return y
        repeats = self._row_repeats(y) if self._weights.ndim == 3 else 1
        if live:
            if not tracing:
                self._folded = None
            folded = fold(self._affiners(), self._weights.to(y.device), self._bias)
            folded = folded.to(y.device, y.dtype)
        elif tracing:
            folded = self._folded_in_trace(y)
        else:
            folded = self._folded_for(y)
        return apply_folded(x, y, folded, self.geometry, repeats)

    def _folded_in_trace(self, y: Tensor) -> Folded:
        if self._folded is not None and _settled(self._folded, y):
            return self._folded
        return self._fold_now().to(y.device, y.dtype)  # a traced call must not change the stack

    def _folded_for(self, y: Tensor) -> Folded:
        if (
            self._folded is None
            or not _settled(self._folded, y)
            or self._folded_version != self._parameter_version()
        ):
            self.settle(y.device, y.dtype)
        return cast(Folded, self._folded)

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Folds now for this device and dtype, so that the first call need not."""
        with torch.inference_mode(False):  # what inference folds, training may use
            self._folded = self._fold_now().to(device, dtype)
        self._folded_version = self._parameter_version()

    def unsettle(self) -> None:
        """Drops the folded copies; the next call folds again."""
        self._folded = None

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
        device = next(self._tensors(), self._weights).device
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
        self._folded_version = self._parameter_version()

    def _affiners(self) -> list[Affiner]:
        return [cast(Affiner, affiner) for affiner in self.affiners]

    def _tensors(self) -> Iterator[Tensor]:
        """Yields the parameters; `parameters()` would cost more than a small layer's whole sum."""
        for affiner in self.affiners:
            for parameter in affiner._parameters.values():
                if parameter is not None:
                    yield parameter

    def _parameter_version(self) -> int:
        """Returns a number that grows with every in-place change of a parameter."""
        return sum(t._version for t in self._tensors() if not t.is_inference())

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


def _settled(folded: Folded, y: Tensor) -> bool:
    like = next(iter(folded.tensors()), None)
    return like is None or (like.device == y.device and like.dtype == y.dtype)


def _overwrite(old: AnyTensor, new: AnyTensor) -> AnyTensor:
    """Writes new values into the old tensor where that is possible, so that graphs see them."""
    if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
        return new
    if old.is_inference():
        return new
    return old.copy_(new)
