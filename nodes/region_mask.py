"""Where in the picture a task acts: a mask of any size, at the size of the latents."""

from __future__ import annotations

from torch import Tensor

from ..diffscaler_core import DiffScalerError
from .control_conds import averaged
from .pictures import as_masks

#: Sizes of one mask that stay ready.
_KEPT = 4


class RegionMask:
    """A node's mask for one task.

    Args:
        name: The task's name, for messages.
        mask: (H, W), (N, H, W) or (N, 1, H, W) in 0..1; N is 1 or the latent batch.

    Raises:
        DiffScalerError: Another number of dimensions.
    """

    def __init__(self, name: str, mask: Tensor) -> None:
        self.name = name
        self._mask = as_masks(mask, f"the region of {name!r}").clamp(0, 1)
        self._at: dict[tuple[int, int], Tensor] = {}

    @property
    def count(self) -> int:
        """How many masks there are: 1 for all latents, or one for each."""
        return len(self._mask)

    def check(self, batch: int) -> None:
        """Says whether there is one mask for all latents, or one for each.

        Raises:
            DiffScalerError: There is another number.
        """
        if len(self._mask) not in (1, batch):
            raise DiffScalerError(
                f"{len(self._mask)} region masks of {self.name!r} for a latent batch of {batch}: "
                f"give one mask for all, or one per latent"
            )

    def at(self, height: int, width: int) -> Tensor:
        """Returns the mask for latents of that size, (1 or N, 1, h, w).

        As a control picture's: the largest part of the latents' shape, around its middle.
        """
        if (height, width) not in self._at:
            self._at[height, width] = averaged(self._mask, height, width)
            for old in list(self._at)[:-_KEPT]:
                del self._at[old]
        return self._at[height, width]
