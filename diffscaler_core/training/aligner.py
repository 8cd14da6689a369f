"""Aligner: what one task's run keeps for `repa`; the projector, and features of its pictures.

Data are latents, and an encoder sees pictures: each is decoded with the base's VAE and looked at
once, alone (so that its features do not hang on its neighbours in a batch), when it first comes up;
its features are then kept in memory, in float16, found again by a hash of its latents. So all but
the first round through the pictures cost a look-up.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import block_named, blocks_of, picture_of, read_outputs
from ..errors import DiffScalerError
from .alignment import Projector, cosines, grid_of, on_grid, weight_at
from .denoiser import Denoiser
from .learner import Learner
from .picture_encoders import PictureEncoder
from .randomness import generator_for

logger = logging.getLogger(__name__)

#: The paper's block 8 of SiT-XL/2's 28, as a share: where nobody says which.
EARLY = 8 / 28


class Aligner:
    """One task's part in REPA.

    Attributes:
        block: The name of the block that is looked into.
        module: That block; the base's own.
        projector: Trained beside the task.
        cosine: Mean cosines since they were asked for last; on the device, not read back.
    """

    def __init__(self, learner: Learner, denoiser: Denoiser, encoder: PictureEncoder) -> None:
        """Runs base and encoder on one picture, to know how wide their tokens are.

        Raises:
            DiffScalerError: The block gives no tokens of the picture, or the encoder no grid.
        """
        config = learner.config
        self.config, self.encoder, self.denoiser = config, encoder, denoiser
        if denoiser.decode is None and denoiser.channels != 3:
            raise DiffScalerError("repa shows pictures to an encoder: this base cannot decode any")
        self.block = early_block(denoiser.model, config.repa_block)
        self.module = blocks_of(denoiser.model)[self.block]
        self.kept: dict[bytes, Tensor] = {}
        drawn = learner.draw(0)
        features = self.features(drawn.x0[:1])
        grid_of(features.shape[1], *drawn.x0.shape[-2:])
        own = drawn.rows(slice(0, 1), denoiser.device)
        timestep, x_t = denoiser.objective.noisy(own.x0, own.noise, own.t)
        with torch.no_grad(), self.looking() as found:
            denoiser(x_t, timestep, learner.condition(own))
        self.projector = Projector(
            self.hidden(found, x_t).shape[1],
            config.repa_width,
            features.shape[-1],
            generator_for(learner.seed, "projector"),
        ).to(denoiser.device)
        self.cosine: list[Tensor] = []

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The projector's parameters, by name."""
        return dict(self.projector.named_parameters())

    def weight(self, step: int) -> float:
        """Returns λ at step number `step` (from 0)."""
        config = self.config
        return weight_at(step, config.steps, config.repa_weight, config.repa_until)

    @torch.no_grad()
    def features(self, x0: Tensor) -> Tensor:
        """Returns the encoder's tokens of clean latents (B, C, h, w), (B, M, Z), on the CPU.

        Raises:
            DiffScalerError: The encoder gives something else than tokens, or NaN or Inf.
        """
        found = []
        for row in x0:
            key = hashlib.blake2b(row.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()
            if key not in self.kept:
                self.kept[key] = self._seen(row[None])
            found.append(self.kept[key])
        return torch.stack(found)

    def _seen(self, x0: Tensor) -> Tensor:
        x0 = x0.to(self.denoiser.device)
        decode = self.denoiser.decode
        pixels = x0 if decode is None else decode(x0)
        tokens = self.encoder(pixels.float().clamp(-1, 1))
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != 1:
            what = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise DiffScalerError(
                f"an encoder for repa gives tokens (B, M, Z) of pictures (B, 3, H, W), not {what}"
            )
        if not bool(torch.isfinite(tokens).all()):
            raise DiffScalerError("the encoder of repa gave NaN or Inf")
        return tokens[0].to("cpu", torch.float16)

    @contextmanager
    def looking(self) -> Iterator[list[Any]]:
        """Gives a list that holds what the block gave, call by call, while the context lasts."""
        found: list[Any] = []
        with read_outputs(self.module, found.append):
            yield found

    def hidden(self, found: list[Any], latents: Tensor) -> Tensor:
        """Returns the picture's tokens of what the block gave last, (B, D, rows, columns).

        Args:
            found: From `looking`.
            latents: What the model was given, (B, C, h, w).

        Raises:
            DiffScalerError: They are a video's, or nothing of it is the picture.
        """
        if latents.ndim != 4:
            raise DiffScalerError("repa looks at pictures; this base draws videos")
        layout = self.denoiser.layout(latents.shape[2:])
        return picture_of(self.block, found[-1] if found else (), layout)

    def loss(self, hidden: Tensor, features: Tensor) -> Tensor:
        """Returns −cos, mean over rows and tokens; notes the cosine.

        Args:
            hidden: The block's tokens on their grid, (B, D, rows, columns).
            features: From `features`, (B, M, Z).
        """
        grid = (hidden.shape[2], hidden.shape[3])
        tokens = hidden.float().flatten(2).transpose(1, 2)
        have = grid_of(features.shape[1], *grid)
        cosine = cosines(self.projector(tokens), on_grid(features.float(), have, grid)).mean()
        self.cosine.append(cosine.detach())
        return -cosine

    def told(self) -> float | None:
        """Returns the mean cosine since this was asked last, None if there was none."""
        if not self.cosine:
            return None
        mean = float(torch.stack(self.cosine).mean())
        self.cosine.clear()
        return mean


def early_block(model: nn.Module, said: int) -> str:
    """Returns the name of the block that is meant, from 1; 0: the one as early as the paper's.

    Raises:
        DiffScalerError: The model has no such block.
    """
    names = list(blocks_of(model))
    if said > len(names):
        raise DiffScalerError(f"repa_block {said}: {type(model).__name__} has {len(names)} blocks")
    return block_named(model, (said or max(1, round(EARLY * len(names)))) - 1)
