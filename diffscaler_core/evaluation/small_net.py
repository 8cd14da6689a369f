"""The small feature network: what it is made of and how its file is read. Knows no metric.

Distances between sets of its features rank pictures of the kind it was trained on, and are
comparable only with each other: never with figures taken with Inception or any other network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic import write_whole
from ..errors import DiffScalerError, first_names

#: The pocket base's own network, which ships beside it.
POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "features.safetensors"
#: Key of the header's JSON.
HEADER = "diffscaler.features"
#: (channels in, channels out, stride) of the convolutions, 3 × 3.
LAYERS = ((3, 16, 2), (16, 32, 2), (32, 32, 1), (32, 48, 2), (48, 40, 1))
SIDE = 64  # pixels, of what the first convolution sees
SIZE = 64  # features
_POOLED = 16 + 32 + 4 * 40  # means of layers 0 and 2, quarters' means of the last


class SmallNet(nn.Module):
    """Five convolutions, their means, and one linear map to 64 features.

    Means of early layers carry colour and texture, those of the last layer's four quarters what is
    drawn where.

    Features are given in units of their spread over the training pictures, from their mean there,
    so that none outweighs the others, and so that a kernel that knows the origin makes sense.

    Args:
        heads: Name of a question -> its answers' names; one linear classifier each.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, heads: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.heads = dict(heads)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, 1) for before, after, stride in LAYERS
        )
        self.project = nn.Linear(_POOLED, SIZE)
        self.classifiers = nn.ModuleDict(
            {name: nn.Linear(SIZE, len(answers)) for name, answers in heads.items()}
        )
        self.register_buffer("centre", torch.zeros(SIZE))
        self.register_buffer("spread", torch.ones(SIZE))

    def forward(self, images: Tensor) -> Tensor:
        """Returns features (B, 64) of images (B, 3, H, W) in −1..1, of any size.

        The resizing is smoothed (antialias): without that, distances between sets of different
        sizes would measure the resizing (arXiv:2104.11222).
        """
        kept = self.maps(images)
        pooled = [
            kept[0].mean((2, 3)),
            kept[2].mean((2, 3)),
            F.adaptive_avg_pool2d(kept[4], 2).flatten(1),
        ]
        found: Tensor = self.project(torch.cat(pooled, 1))
        return (found - self.centre) / self.spread

    def maps(self, images: Tensor) -> list[Tensor]:
        """Returns what each convolution gives of images as above, (B, C, h, w) each."""
        x, kept = resized(images, SIDE), []
        for i, conv in enumerate(self.convs):
            x = F.relu(self.normalised(i, conv(x)))
            kept.append(x)
        return kept

    def normalised(self, layer: int, x: Tensor) -> Tensor:
        """Returns x as it is: in the file the normalisation is folded into the convolutions.

        Training overrides this.
        """
        return x

    def logits(self, features: Tensor, head: str) -> Tensor:
        """Returns a classifier's logits (B, answers) of features (B, 64)."""
        found: Tensor = self.classifiers[head](F.relu(features * self.spread + self.centre))
        return found


def resized(images: Tensor, side: int) -> Tensor:
    """Returns images (B, 3, side, side), smoothed where they shrink; the same if they fit."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def save_small_net(net: SmallNet, path: str | Path, name: str, note: str) -> None:
    """Writes a network, float16, with its heads' answers and what it is made for in the header.

    Args:
        net: The network.
        path: Where.
        name: What tables call it.
        note: One sentence that goes with every figure taken with it.
    """
    tensors = {k: t.detach().half().contiguous() for k, t in net.state_dict().items()}
    told = json.dumps({"name": name, "note": note, "heads": net.heads}, ensure_ascii=False)
    write_whole(Path(path), save(tensors, {"format": "pt", HEADER: told}))


def load_small_net(path: str | Path) -> tuple[SmallNet, str, str]:
    """Returns (the network, float32 and frozen, its name, its note).

    Raises:
        DiffScalerError: The file is missing, or is no feature network of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffScalerError(f"no file {str(path)!r} of a feature network")
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get(HEADER)
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    except SafetensorError as error:
        raise DiffScalerError(f"{path.name!r} is no safetensors file ({error})") from error
    if told is None:
        raise DiffScalerError(f"{path.name!r} holds no feature network (no {HEADER} in its header)")
    name, note, heads = _facts(path.name, told)
    net = SmallNet(heads)
    expected = {key: tuple(t.shape) for key, t in net.state_dict().items()}
    found = {key: tuple(t.shape) for key, t in tensors.items()}
    wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if wrong:
        raise DiffScalerError(f"{path.name!r} has other layers than ours: {first_names(wrong)}")
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise DiffScalerError(f"{path.name!r} holds NaN or Inf")
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False), name, note


def _facts(file: str, told: str) -> tuple[str, str, dict[str, tuple[str, ...]]]:
    try:
        facts: Any = json.loads(told)
        heads = {str(k): tuple(map(str, answers)) for k, answers in facts["heads"].items()}
        return str(facts["name"]), str(facts["note"]), heads
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DiffScalerError(f"{file!r} has a header that cannot be read: {error!r}") from error
