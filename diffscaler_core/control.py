"""Control pictures: h = embed(x) + Σ wₖ embedₖ'(zₖ), through the base's own patch embedding.

z is a control picture as the base's VAE sees it, embed' the base's frozen embedding under a task's
*control affiner*. With y_z = embed(z) and the affiner's Δ of `affiner.py`,

    embed'(z) = Δ(z, y_z) = a ⊙ (y_z − b̂) + b + s · U · act(D z),    a = b = U = 0 at the start,

so a new control adds nothing, bit for bit: no extra encoder, no zero convolution. (DiffScaler,
arXiv:2404.09976, describes control without its exact path; this form is our choice.) It depends on
the picture alone, not on x or the time, so it is computed once and added at every step.

Knows no host; how the call reaches the layer is the carrier's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .affiner import PARTS, Affiner, ConvGeometry, delta_folded, fold, fold_alone
from .errors import DiffScalerError
from .tokens import Embedding, embed_input, fitted, token_mask

Embed = Callable[[Tensor], Tensor]
#: Combinations of controls and strengths whose contribution a stack keeps.
_KEPT = 8


@dataclass(frozen=True, eq=False)
class Control:
    """What a control task is given for a batch.

    Attributes:
        latents: The pictures in the model's own latent space, (R, C, h, w), or (R, C, f, h, w) for
            one per frame of a video; R is 1 (all rows share it) or the batch.
        rows: Factor per row, (R,); 0: that row has no control. None: all 1.
        mask: Where the control counts, (1 or R, 1, H, W) in 0..1, of any size; None: everywhere. It
            weighs what is embedded; the task's affiners in the blocks run in the whole picture.
    """

    latents: Tensor
    rows: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        count = len(self.latents)
        rows = self.rows
        if rows is not None and (rows.ndim != 1 or (count != 1 and len(rows) not in (1, count))):
            raise DiffScalerError(
                f"{count} control pictures, but factors for {tuple(rows.shape)} rows"
            )
        if self.mask is not None and (
            self.mask.ndim != 4 or self.mask.shape[1] != 1 or len(self.mask) not in (1, count)
        ):
            raise DiffScalerError(
                f"a control's mask is (1 or {count}, 1, H, W), got {tuple(self.mask.shape)}"
            )

    @property
    def is_gated(self) -> bool:
        """Says whether rows differ in their factors, or all have another one than 1."""
        return self.rows is not None and not bool((self.rows == 1).all())


class ControlStack(nn.Module):
    """The control affiners of several tasks on one patch embedding.

    Args:
        embedding: The layer.
        affiners: One per task with a control affiner here.
        slots: For each affiner, its task's index among all tasks attached.
        bias: The layer's own bias, float32, (C_out,), or None.
        geometry: The layer's convolution geometry, None for a Linear.
    """

    def __init__(
        self,
        embedding: Embedding,
        affiners: Sequence[Affiner],
        slots: Sequence[int],
        bias: Tensor | None,
        geometry: ConvGeometry | None,
    ) -> None:
        super().__init__()
        self.name, self.embedding = embedding.name, embedding
        self.affiners = nn.ModuleList(affiners)
        self.slots = tuple(slots)
        self.geometry = geometry
        self._bias = bias  # not a buffer: it belongs to the host
        self._weights = torch.ones(len(self.slots), len(PARTS))
        self._groups: tuple[int, ...] | None = None
        self.idle = False
        self._controls: dict[int, Control] = {}
        self._added: Tensor | None = None
        self._added_version = 0
        self._kept: OrderedDict[Any, tuple[Tensor, int]] = OrderedDict()

    def set_controls(self, controls: Mapping[int, Control]) -> None:
        """Gives tasks their control; tasks that are left out have none.

        Args:
            controls: A task's index among all tasks attached -> its control.
        """
        own = {slot: control for slot, control in controls.items() if slot in self.slots}
        same = own.keys() == self._controls.keys()
        if same and all(control is self._controls[slot] for slot, control in own.items()):
            return
        self._controls = own
        if not own:
            self._kept.clear()
        self._recall()

    def set_weights(self, weights: Tensor) -> None:
        """Puts strengths in force: (K_all, 3) for the whole batch, or (B, K_all, 3) for rows."""
        own = weights[..., list(self.slots), :].detach().float().to("cpu", copy=True)
        if self._groups is None and torch.equal(own, self._weights):
            return
        self._weights, self._groups = own, None
        self.idle = not bool(own.any())
        self._recall()

    def set_groups(self, groups: Sequence[int]) -> None:
        """Makes each of len(groups) equal parts of the batch run one task alone, at strength 1."""
        self._groups = tuple(self.slots.index(g) if g in self.slots else -1 for g in groups)
        self.idle = False
        self._recall()

    def affiner_of(self, slot: int) -> Affiner:
        """Returns the affiner of the task with this index among all tasks attached."""
        return self._affiners()[self.slots.index(slot)]

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, float32, (C_out,), or None."""
        return self._bias

    def put(self, slot: int, affiner: Affiner, bias: Tensor | None = None) -> None:
        """Adds a task's control affiner, at strength 0; see `AffinerStack.put`."""
        self.affiners.append(affiner)
        self.slots = (*self.slots, slot)
        self._weights = nn.functional.pad(self._weights, (0, 0, 0, 1))
        self.unsettle()

    def renumber(self, slot: int) -> None:
        """Gives the only task another index."""
        (_,), self.slots = self.slots, (slot,)

    def drop(self, slot: int) -> None:
        """Takes a task's control affiner away, if it has one here."""
        if slot in self.slots:
            at = self.slots.index(slot)
            del self.affiners[at]
            kept = [k for k in range(len(self.slots)) if k != at]
            self.slots = tuple(self.slots[k] for k in kept)
            self._weights = self._weights[..., kept, :]
            self._controls.pop(slot, None)
            self.unsettle()

    def unsettle(self) -> None:
        """Drops what was computed; the next call computes it again."""
        self._added = None
        self._kept.clear()

    def _recall(self) -> None:
        """Takes up what was computed for these controls and strengths before, if it is still there.

        A sampler that draws areas apart comes back to each of them in every step.
        """
        known = self._kept.get(self._situation())
        if known is not None and known[1] != self.version:
            known = None
        self._added, self._added_version = (None, 0) if known is None else known

    def _situation(self) -> Any:
        weights = (self._weights.shape, *self._weights.flatten().tolist())
        return (*self._controls.items(), self._groups, weights)  # a Control is compared by identity

    @property
    def version(self) -> int:
        """A number that grows with every in-place change of a parameter."""
        return sum(t._version for t in self.parameters() if not t.is_inference())

    @property
    def nbytes(self) -> int:
        """Bytes held: parameters, and what was computed from them."""
        return self.kept_bytes + sum(p.numel() * p.element_size() for p in self.parameters())

    @property
    def kept_bytes(self) -> int:
        """Bytes of what was computed, held beside the parameters."""
        return sum(added.numel() * added.element_size() for added, _ in self._kept.values())

    def forward(self, embed: Embed, y: Tensor) -> Tensor:
        """Returns y + Σ wₖ embedₖ'(zₖ), shaped like y; y itself is never modified.

        Args:
            embed: The frozen layer: what `embed_input` gives -> its output.
            y: Its output in the model.

        Raises:
            DiffScalerError: A control does not fit the model's latents or its batch.
        """
        if not self._controls:
            return y
        if any(p.requires_grad for affiner in self._affiners() for p in affiner.parameters()):
            added = self._sum(embed, y)
            return y if added is None else y + added
        traced = torch.compiler.is_compiling()  # then nothing may change here, nor ask for numbers
        if not traced and self.idle:
            return y
        kept = self._added
        if kept is not None and kept.device == y.device and kept.dtype == y.dtype:
            if traced or self._added_version == self.version:
                if kept.shape[1:] == y.shape[1:] and kept.shape[0] in (1, y.shape[0]):
                    return y + kept
        added = self._sum(embed, y)
        if added is None:
            return y
        if not traced:
            with torch.inference_mode(False), torch.no_grad():
                self._added = added.detach().clone()
            self._added_version = self.version
            self._kept[self._situation()] = (self._added, self._added_version)
            for old in list(self._kept)[:-_KEPT]:
                del self._kept[old]
        return y + added

    def prepare(self, embed: Embed, like: Tensor) -> None:
        """Computes now what the next calls add, so that compiled code need not.

        Args:
            embed: As in `forward`.
            like: A tensor of the shape, device and dtype of the layer's output.
        """
        with torch.no_grad():
            self.forward(embed, like)

    def _sum(self, embed: Embed, y: Tensor) -> Tensor | None:
        if self._groups is not None:
            return self._sum_of_groups(embed, y, self._groups)
        total: Tensor | None = None
        for k, slot in enumerate(self.slots):
            control, weights = self._controls.get(slot), self._weights[..., k : k + 1, :]
            if control is None:
                continue
            if not torch.compiler.is_compiling() and not bool(weights.any()):
                continue
            added = self._embedded(embed, control, self._affiners()[k], weights, y)
            total = added if total is None else total + added
        return total

    def _sum_of_groups(self, embed: Embed, y: Tensor, groups: Sequence[int]) -> Tensor | None:
        """Returns what all groups add; all of them train on one control each, in the same order."""
        control = next(iter(self._controls.values()))
        parts: list[Tensor | None] = []
        count, one = len(groups), torch.ones(1, len(PARTS))
        rows = [None] * count if control.rows is None else list(control.rows.chunk(count))
        for chosen, latents, factors, own in zip(
            groups, control.latents.chunk(count), rows, y.chunk(count), strict=True
        ):
            affiner = None if chosen < 0 else self._affiners()[chosen]
            part = Control(latents, factors)
            parts.append(
                None if affiner is None else self._embedded(embed, part, affiner, one, own)
            )
        if all(part is None for part in parts):
            return None
        pieces = zip(parts, y.chunk(count), strict=True)
        return torch.cat([torch.zeros_like(own) if p is None else p for p, own in pieces])

    def _embedded(
        self, embed: Embed, control: Control, affiner: Affiner, weights: Tensor, y: Tensor
    ) -> Tensor:
        """Returns w · embed'(z) for one task, laid as y is.

        Args:
            embed: The frozen layer.
            control: The task's control.
            affiner: The task's control affiner.
            weights: Its strengths, (1, 3), or (B, 1, 3) with rows.
            y: The layer's output in the model.
        """
        latents = control.latents.to(y.device, y.dtype)
        rows, z = len(latents), embed_input(latents, self.embedding)
        with torch.no_grad():
            y_z = embed(z)
        wanted = len(weights) if weights.ndim == 3 else 1
        wanted = wanted if control.rows is None else max(wanted, len(control.rows))
        if rows == 1 < wanted:
            rows = wanted
            z, y_z = (t.repeat(rows, *(1,) * (t.ndim - 1)) for t in (z, y_z))
        alone = weights.ndim == 2 and not torch.compiler.is_compiling()
        if alone and bool((weights == 1).all()):
            folded = fold_alone(affiner, self._bias, y.device)
        else:
            folded = fold([affiner], weights.to(y.device), self._bias)
        repeats = y_z.shape[0] // rows
        if weights.ndim == 3 and len(weights) != rows:
            raise DiffScalerError(
                f"{rows} control pictures for {len(weights)} rows: give one for all, or one per row"
            )
        added = delta_folded(z, y_z, folded.to(y.device, y.dtype), self.geometry, repeats)
        if control.mask is not None:
            added = added * token_mask(control.mask, latents, self.embedding, added)
        if control.rows is not None:
            factors = control.rows.to(y.device, y.dtype).repeat_interleave(repeats)
            added = added * factors.view(-1, *(1,) * (added.ndim - 1))
        return fitted(added, rows, y, self.embedding)

    def _affiners(self) -> list[Affiner]:
        return [cast(Affiner, affiner) for affiner in self.affiners]
