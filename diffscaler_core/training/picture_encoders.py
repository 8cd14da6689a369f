"""PictureEncoder: what a picture looks like to somebody else, token by token. For `repa`.

Given ones: the small feature network of the pocket base or of a file, DINOv2 (arXiv:2304.07193),
which the paper of REPA uses, and any module. Nothing is downloaded unless the caller says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DiffScalerError, reason_of, shown

#: What pictures' colours are brought to before DINOv2: ImageNet's mean and spread, in 0..1.
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PATCHES = 16  # a side, of what DINOv2 sees: 224 pixels at patches of 14, as in the paper


class PictureEncoder(Protocol):
    """Pixels (B, 3, H, W) in −1..1, float32 -> tokens (B, M, Z), row by row of the picture."""

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """Returns the tokens; none stands beside the grid (no class token, no registers)."""
        ...


def load_encoder(
    name: str, device: torch.device | str = "cpu", *, download: bool = False
) -> PictureEncoder:
    """Returns a picture encoder by name, frozen.

    Args:
        name: "pocket"; a file of `evaluation.small_net.save_small_net`; a folder that transformers
            saved a DINOv2 in; or its name on the Hub.
        device: Where it computes.
        download: Whether a name on the Hub may be fetched.

    Raises:
        DiffScalerError: No such encoder here, or transformers is missing or cannot read it.
    """
    if name == "pocket":
        from ..evaluation.features import POCKET

        return SmallNetTokens(POCKET, device)
    if name.endswith(".safetensors"):
        return SmallNetTokens(name, device)
    if Path(name).expanduser().is_dir():
        return Dinov2Tokens(str(Path(name).expanduser()), device, local=True)
    if not download or name.count("/") != 1:
        raise DiffScalerError(
            f"no picture encoder {shown(name)} for repa here: say 'pocket', a .safetensors file of "
            f"a feature network, or a folder with DINOv2 as transformers saves it (on the command "
            f"line also its name on the Hub, such as facebook/dinov2-base)"
        )
    return Dinov2Tokens(name, device, local=False)


class SmallNetTokens:
    """The last convolution's map of a small feature network: 8 × 8 tokens of 40 numbers.

    Args:
        path: Its file.
        device: Where it computes.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        from ..evaluation.small_net import load_small_net

        self.net = load_small_net(path)[0].to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns (B, 64, 40)."""
        maps: Tensor = self.net.maps(pixels.to(self.device))[-1]
        return maps.flatten(2).transpose(1, 2)


class Dinov2Tokens:
    """DINOv2's patch tokens, of pictures brought to 224 pixels a side: 16 × 16 tokens.

    Args:
        name: A folder, or a name on the Hub.
        device: Where it computes.
        local: True: nothing is downloaded.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", local: bool = True) -> None:
        try:
            from transformers import AutoModel
        except ImportError:
            raise DiffScalerError(
                "DINOv2 needs transformers; run: pip install transformers"
            ) from None
        try:
            self.net: Any = AutoModel.from_pretrained(
                name, local_files_only=local, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise DiffScalerError(
                f"transformers cannot read the encoder {shown(name)}: {reason_of(error)}"
            ) from error
        config = self.net.config
        if "dinov2" not in str(config.model_type):
            raise DiffScalerError(
                f"the encoder {shown(name)} is of kind {config.model_type!r}, not DINOv2; give any "
                f"other as a function from Python (train_task(…, encoder=…))"
            )
        self.net.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.side = _PATCHES * int(config.patch_size)
        self.beside = 1 + int(getattr(config, "num_register_tokens", 0))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns (B, 256, Z)."""
        size = (self.side, self.side)
        fitted = F.interpolate(pixels.to(self.device), size, mode="bicubic", antialias=True)
        mean, spread = (fitted.new_tensor(t).view(1, 3, 1, 1) for t in (_MEAN, _SPREAD))
        seen = ((fitted.clamp(-1, 1) + 1) / 2 - mean) / spread
        found: Tensor = self.net(pixel_values=seen).last_hidden_state[:, self.beside :]
        return found


def frozen_encoder(encoder: PictureEncoder, device: torch.device) -> PictureEncoder:
    """Returns an encoder ready to be asked; a module is put in evaluation mode, on the device."""
    return encoder.to(device).eval() if isinstance(encoder, nn.Module) else encoder
