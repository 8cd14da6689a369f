"""Regions: a mask per task, as factors on the tokens and positions of any layer. Pure tensors.

A mask is drawn on the picture. A layer sees tokens, positions of a feature map, text, or one vector
for the whole picture; `Regions.gates` says what each of these gets of each task:

- an image token or position: the mask averaged over the latents it stands for, the same in all
  frames;
- text tokens, pooled and time vectors, reference pictures, filling, and whatever else is not known
  to be a place in the picture: the mask's mean.

Letters: R rows of masks, K tasks, n tokens of a layer, C its channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .affiner import ConvGeometry
from .errors import DiffScalerError
from .token_layout import TokenLayout as TokenLayout


class _Layer(NamedTuple):
    """One layer's output, as far as places go: its rows first, then its tokens or positions."""

    name: str
    role: str
    shape: tuple[int, ...]
    row_layout: str


class Regions:
    """The masks in force, for K tasks.

    Args:
        masks: A task's index among all tasks attached -> (1 or R, 1, H, W) in 0..1, of any size;
            1 where the task acts. A task without a mask acts everywhere.
        layout: Where the picture's places are in the model's tokens.
        count: K.

    Raises:
        DiffScalerError: A mask of another shape, with values outside 0..1 or NaN, for a task that
            is not there, or masks for different numbers of rows.
    """

    def __init__(self, masks: Mapping[int, Tensor], layout: TokenLayout, count: int) -> None:
        self.layout = layout
        self.count = count
        self.rows = _check(masks, count, len(layout.text_lengths))
        size = (layout.height, layout.width)
        planes = torch.ones(self.rows, count, *size)
        for slot, mask in masks.items():
            # in float32 on the CPU: sums of ones are exact there, so 1 stays 1 and 0 stays 0
            planes[:, slot] = F.adaptive_avg_pool2d(mask.to("cpu", torch.float32), size)[:, 0]
        self._planes = planes
        self._means = planes.double().mean((-2, -1)).float()
        self._known: dict[tuple[object, ...], Tensor] = {}
        self._roles: dict[str, str] = {}

    def gates(
        self, name: str, y: Tensor, geometry: ConvGeometry | None, row_layout: str = "batch"
    ) -> Tensor:
        """Returns each task's factors on a layer's output; the same tensor for the same question.

        A factor is exactly 1 where a mask is 1 on all that a token stands for, exactly 0 where it
        is 0, and 1 for tasks without a mask.

        Args:
            name: The layer's name below the model, with or without "diffusion_model.".
            y: The layer's output, (rows, n, C) or (rows, C) of a Linear, (rows, C, *size) of a
                convolution; only its shape, device and dtype are used.
            geometry: The convolution's geometry, None for a Linear.
            row_layout: How y holds its rows, as in `stack.AffinerStack`.

        Returns:
            (1 or rows, n or 1, K) for a Linear, to be broadcast to y's rows and tokens;
            (1 or rows, K, *size), with 1 for a video's frames, for a convolution. On y's device
            and in its dtype.

        Raises:
            DiffScalerError: The layer saw another number of tokens than the layout says, or its
                leading dimension does not fit the masks' rows.
        """
        role = self._roles.get(name)
        if role is None:
            role = self._roles[name] = self.layout.role(name)
        shape = (y.shape[0], *(y.shape[1:-1] if geometry is None else y.shape[2:]))
        key = (role, shape, geometry is None, row_layout, y.device, y.dtype)
        known = self._known.get(key)
        if known is None:
            layer = _Layer(name, role, shape, row_layout)
            if geometry is None:
                known = self._on_tokens(layer)
            elif len(shape) == 2:  # a 1-dimensional convolution walks over tokens
                known = self._on_tokens(layer).transpose(1, 2)
            else:
                known = self._on_positions(layer)
            known = known.to(y.device, y.dtype)
            if not torch.compiler.is_compiling():  # a traced call must not change what it reads
                self._known[key] = known
        return known

    def _on_positions(self, layer: _Layer) -> Tensor:
        """Returns the factors on a feature map, (1 or rows, K, *size), 1 for frames."""
        height, width = layer.shape[-2:]
        own = self._plane(height, width)
        frames = (1,) * (len(layer.shape) - 3)
        return self._led(own.view(*own.shape[:2], *frames, height, width), layer)

    def _on_tokens(self, layer: _Layer) -> Tensor:
        """Returns the factors on tokens, (1 or rows, n or 1, K)."""
        lead, *inner = layer.shape
        if layer.role == "list" and not inner:
            return self._in_a_list(layer)
        if layer.row_layout == "flat" and lead == 1 and inner and self.rows > 1:
            if inner[0] % self.rows:
                raise self._misfit(layer)
            length = inner[0] // self.rows
            return self._run(layer, length).expand(-1, length, -1).reshape(1, -1, self.count)
        own = self._run(layer, math.prod(inner))
        if len(inner) > 1:
            own = own.view(len(own), *(inner if own.shape[1] > 1 else (1,) * len(inner)), -1)
        return self._led(own, layer)

    def _run(self, layer: _Layer, n: int) -> Tensor:
        """Returns the factors on one row's n tokens, (1 or R or as texts have rows, n or 1, K)."""
        layout, means = self.layout, self._means.unsqueeze(1)
        if layer.role == "mean" or n == 1:
            return means
        if layout.kind == "unet":
            grid = next((grid for grid in layout.levels if math.prod(grid) == n), None)
            return means if grid is None else _as_tokens(self._plane(*grid))
        image = _as_tokens(self._plane(*layout.grid)).repeat(1, layout.frames, 1)
        if n == layout.image_tokens:
            return image
        if layer.role == "either":
            return means
        starts = layout.starts(layer.role, n)
        if starts is None:
            height, width = layout.grid
            raise DiffScalerError(
                f"{layer.name!r} ran on {n} tokens a row, but regions are laid out for "
                f"{layout.frames}x{height}x{width} image tokens: lay them out for the size that is "
                f"drawn, or leave this layer out of the tasks"
            )
        rows = max(self.rows, len(starts))
        own = means.expand(rows, -1, -1).repeat(1, n, 1)
        image = image.expand(rows, -1, -1)
        for row, start in enumerate(starts if len(starts) == rows else starts * rows):
            own[row, start : start + layout.image_tokens] = image[row]
        return own

    def _in_a_list(self, layer: _Layer) -> Tensor:
        """Returns the factors where all rows' image tokens make one run, (its length, 1, K)."""
        length = self.layout.filled
        batch = layer.shape[0] // length
        if layer.shape[0] % length or batch % self.rows:
            raise self._misfit(layer)
        own = self._means.unsqueeze(1).repeat(1, length, 1)
        own[:, : self.layout.image_tokens] = _as_tokens(self._plane(*self.layout.grid))
        return own.repeat_interleave(batch // self.rows, dim=0).view(-1, 1, self.count)

    def _led(self, own: Tensor, layer: _Layer) -> Tensor:
        """Returns factors of R rows as the layer's leading dimension holds its rows."""
        lead, rows = layer.shape[0], len(own)
        if rows in (1, lead):
            return own
        if layer.row_layout == "fold" and lead % rows == 0:
            return own.repeat_interleave(lead // rows, dim=0)
        raise self._misfit(layer)

    def _misfit(self, layer: _Layer) -> DiffScalerError:
        return DiffScalerError(
            f"masks are set for {self.rows} rows, but {layer.name!r} ran with the leading "
            f"dimensions {layer.shape}, which do not tell rows apart: give one mask for all rows, "
            f"or as many as the batch has, or leave this layer out of the tasks"
        )

    def _plane(self, height: int, width: int) -> Tensor:
        """Returns the masks on a grid of that size over the picture, (R, K, height, width)."""
        layout = self.layout
        steps = (2**i for i in range(len(layout.levels))) if layout.kind == "unet" else ()
        for step in (1, layout.patch, *steps):  # a step that overhangs averages what is there
            if (-(-layout.height // step), -(-layout.width // step)) == (height, width):
                return F.avg_pool2d(self._planes, step, ceil_mode=True)
        return F.adaptive_avg_pool2d(self._planes, (height, width))


def _as_tokens(plane: Tensor) -> Tensor:
    """Returns (R, K, h, w) as tokens, row after row, (R, h·w, K)."""
    return plane.flatten(2).transpose(1, 2)


def _check(masks: Mapping[int, Tensor], count: int, texts: int) -> int:
    """Returns R, or says what is wrong with the masks."""
    rows = 1
    for slot, mask in masks.items():
        if not 0 <= slot < count:
            raise DiffScalerError(f"a mask is set for task {slot}, but {count} tasks are attached")
        if mask.ndim != 4 or mask.shape[1] != 1 or not mask.numel():
            raise DiffScalerError(
                f"a region's mask is (1 or rows, 1, height, width), got {tuple(mask.shape)}"
            )
        low, high = (float(v) for v in mask.aminmax())
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise DiffScalerError(
                f"a region's mask is in 0..1, but this one of shape {tuple(mask.shape)} holds "
                f"{low:.3g} to {high:.3g}"
            )
        if len({1, rows, texts, len(mask)} - {0}) > 2:
            raise DiffScalerError(
                f"a region's mask is for {len(mask)} rows, but there are {max(rows, texts)}: give "
                f"one for all rows, or one per row of the batch"
            )
        rows = max(rows, len(mask))
    return rows
