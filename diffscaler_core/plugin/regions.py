"""Regions in diffusers: the masks a user gave, and how they become what the denoiser's call needs.

A mask is cut as a control picture is, to the size that is drawn, which is known at the denoiser's
first call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError
from ..pictures import Size, as_mask, covered
from ..token_layout import TokenLayout, layout_of
from .call import Call, Same, given_by_name, spread
from .control_request import pixels_per_latent

#: One mask (1, 1, H, W) for all prompts, or one per prompt, None for everywhere.
Mask = Tensor | tuple[Tensor | None, ...]


@dataclass(eq=False)
class RegionRequest:
    """Where tasks act.

    Attributes:
        masks: name -> its mask; tasks that are left out act everywhere.
    """

    masks: Mapping[str, Mask]
    _built: dict[Any, dict[str, Tensor]] = field(default_factory=dict, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what was computed."""
        return {**self.__dict__, "_built": {}}

    def situation(self, call: Call) -> Any:
        """Returns what decides the regions in a call. Cheap, every call."""
        return (Same(self), call.layout, call.text_layout)

    @torch.no_grad()
    def masks_for(
        self, call: Call, names: Sequence[str], images: int | None, pipe: Any
    ) -> dict[str, Tensor]:
        """Returns the masks for the batch of a call: name -> (1 or batch, 1, H, W) in 0..1.

        Args:
            call: The call.
            names: The tasks that are attached.
            images: Pictures per prompt, or None: ask the running pipeline.
            pipe: The pipeline, or None; its VAE says how large a latent is.

        Raises:
            DiffScalerError: Another number of masks than prompts.
        """
        height, width = call.size()
        factor = 1 if pipe is None else pixels_per_latent(pipe)
        size = (height * factor, width * factor)
        rows = {n: self._rows(n, call, images) for n in self.masks if n in names}
        key = (size, tuple((n, *entries) for n, entries in rows.items()))
        if key not in self._built:
            self._built = {key: {n: self._cut(n, size, entries) for n, entries in rows.items()}}
        return self._built[key]

    def _rows(self, name: str, call: Call, images: int | None) -> list[int]:
        """Returns which of a task's masks each sample of the batch has; none: one for all."""
        mask = self.masks[name]
        if isinstance(mask, Tensor):
            return []
        return spread(len(mask), images, call, "set_diffscaler", "masks", counts=False)[0]

    def _cut(self, name: str, size: Size, entries: Sequence[int]) -> Tensor:
        """Returns a task's mask, cut to a size, (1 or rows, 1, H, W)."""
        mask = self.masks[name]
        if isinstance(mask, Tensor):
            return covered(mask, size).clamp(0, 1)
        cut = [torch.ones(1, 1, *size) if m is None else covered(m, size).clamp(0, 1) for m in mask]
        return torch.cat([cut[entry] for entry in entries])


def layout_for(call: Call) -> TokenLayout:
    """Returns where the picture's places are in the tokens of a call.

    Raises:
        DiffScalerError: The call does not show the size that is drawn.
    """
    return layout_of(call.model, (call.frames(), *call.size()), call.text_lengths())


def regions_of(names: Sequence[str], given: Any) -> RegionRequest | None:
    """Returns the regions that a user means, None for none.

    Args:
        names: The tasks that are chosen.
        given: None; one mask for all tasks; one for each task or None, in a list; or {name: mask}.
            In a list or mapping a mask may itself be a list, with one mask or None per prompt.

    Raises:
        UnknownNameError: A mask for a task that is not chosen.
        DiffScalerError: Another number of masks than tasks, or something that is none.
    """
    found = given_by_name(names, given, "masks", "everywhere", is_one=False)
    masks = {name: _mask(own) for name, own in found.items()}
    return RegionRequest(masks) if masks else None


def _mask(given: Any) -> Mask:
    if not isinstance(given, list | tuple):
        return as_mask(given)
    if not given:
        raise DiffScalerError("a list of masks has one entry per prompt, got none")
    return tuple(None if mask is None else as_mask(mask) for mask in given)
