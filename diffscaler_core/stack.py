"""K tasks on one layer, ready to run: what both carriers put behind a layer.

Knows layers only through (x, y, geometry, bias); how the call reaches the layer is the carrier's
business (`attach.py` here, `nodes/patching.py` in ComfyUI).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .affiner import PARTS, Affiner, ConvGeometry, Folded, apply_folded, fold
from .errors import DiffScalerError


class AffinerStack(nn.Module):
    """The affiners of several tasks on one layer, folded for the strengths in force.

    Strengths live in `weights`, changed in place, so that a compiled model sees new values without
    a new graph. While any parameter requires a gradient the stack is folded anew at every call.

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

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force: (K_all, 3) for the whole batch, or (B, K_all, 3) for rows."""
        own = weights[..., list(self.slots), :].float()
        self.idle = not bool(own.any())
        self._weights = _overwrite(self._weights, own)
        if self._folded is not None:
            self._fold(self._folded)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y + Σ wₖ Δₖ(x, y), shaped like y; y itself is never modified.

        Raises:
            DiffScalerError: Rows are set, and the layer's leading dimension does not fit them.
        """
        if not torch.compiler.is_compiling() and self.idle and not self._is_live():
            return y
        repeats = self._row_repeats(y) if self._weights.ndim == 3 else 1
        return apply_folded(x, y, self._folded_for(y), self.geometry, repeats)

    def _is_live(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _folded_for(self, y: Tensor) -> Folded:
        if self._is_live():
            bias = None if self._bias is None else self._bias.to(y.device)
            live = fold(self._affiners(), self._weights.to(y.device), bias)
            return live.to(y.device, y.dtype)
        folded = self._folded
        if folded is None or not _settled(folded, y):
            if torch.compiler.is_compiling():  # a traced call must not change the stack
                return self._fold_now().to(y.device, y.dtype)
            self._folded = folded = self._fold_now().to(y.device, y.dtype)
        return folded

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Folds now for this device and dtype, so that the first call need not."""
        self._folded = self._fold_now().to(device, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes this stack holds: parameters and their folded copies."""
        held = [p for p in self.parameters()] + [t for t in self._folded or () if _is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in held)

    @torch.no_grad()
    def _fold_now(self) -> Folded:
        device = next(self.parameters()).device
        bias = None if self._bias is None else self._bias.to(device)
        return fold(self._affiners(), self._weights.to(device), bias)

    def _fold(self, old: Folded) -> None:
        like = next(t for t in old if _is_tensor(t))
        new = self._fold_now().to(like.device, like.dtype)
        pairs = zip(old, new, strict=True)
        self._folded = Folded(*(_overwrite(o, n) if _is_tensor(n) else n for o, n in pairs))

    def _affiners(self) -> list[Affiner]:
        return list(self.affiners)  # type: ignore[arg-type]

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
    like = next((t for t in folded if _is_tensor(t)), None)
    return like is None or (like.device == y.device and like.dtype == y.dtype)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _overwrite(old: Tensor | None, new: Tensor) -> Tensor:
    """Writes new values into the old tensor where that is possible, so that graphs see them."""
    frozen = old is not None and old.is_inference() and not torch.is_inference_mode_enabled()
    if old is None or frozen or (old.shape, old.dtype) != (new.shape, new.dtype):
        return new
    return old.copy_(new)
