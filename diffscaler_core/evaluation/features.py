"""FEATURES: the networks whose features pictures are compared by. One line each.

Nothing is downloaded here, ever: a network whose weights are not on this machine is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError, unknown
from ..training.data.cache import encoder_key
from .small_net import POCKET, load_small_net, resized

BATCH = 64  # pictures looked at together


@dataclass(frozen=True, eq=False)
class FeatureNet:
    """A function from pictures to features, and its name, which goes with every figure.

    Attributes:
        name: What tables call it. Figures of two names are not comparable.
        size: How many features, F.
        features: Pictures (B, 3, H, W) in −1..1, float32 -> (B, F).
        key: What tells it from any other, weights included.
        note: One sentence that goes with every figure, or "".
        heads: Question -> its answers' names, if it classifies too; the first is the main one.
        logits: (features (B, F), question) -> (B, answers).
    """

    name: str
    size: int
    features: Callable[[Tensor], Tensor]
    key: str = ""
    note: str = ""
    heads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    logits: Callable[[Tensor, str], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns features (B, F) of pictures (B, 3 or 1, H, W) in −1..1, float32, on the CPU.

        Raises:
            DiffScalerError: These are no such pictures, or the network gives something else.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DiffScalerError(f"pictures are (B, 3, H, W) in −1..1, not {tuple(images.shape)}")
        colour = images.float().expand(-1, 3, -1, -1)
        parts = [self.features(part).float().cpu() for part in colour.split(BATCH)]
        found = torch.cat(parts) if parts else torch.zeros(0, self.size)
        if found.shape != (len(images), self.size):
            raise DiffScalerError(
                f"feature network {self.name!r} gave {tuple(found.shape)}, not "
                f"{(len(images), self.size)}"
            )
        return found

    @property
    def classes(self) -> tuple[str, ...]:
        """The answers of the main question; empty if it does not classify."""
        return next(iter(self.heads.values()), ())

    @torch.no_grad()
    def classify(self, images: Tensor, head: str | None = None) -> Tensor:
        """Returns logits (B, answers) of pictures as above, to the main question or another.

        Raises:
            DiffScalerError: It has no such question.
        """
        head = next(iter(self.heads), "") if head is None else head
        if self.logits is None or head not in self.heads:
            raise unknown(f"question of feature network {self.name!r}:", head, self.heads)
        return self.logits(self(images), head).float().cpu()

    def of(self, pictures: Iterable[Tensor]) -> Tensor:
        """Returns features (N, F) of pictures (3, H, W), which may differ in size."""
        found: list[Tensor] = []
        waiting: list[Tensor] = []
        for picture in pictures:
            if waiting and (picture.shape != waiting[0].shape or len(waiting) == BATCH):
                found.append(self(torch.stack(waiting)))
                waiting = []
            waiting.append(picture)
        if waiting:
            found.append(self(torch.stack(waiting)))
        return torch.cat(found) if found else torch.zeros(0, self.size)


def load_features(name: str | Path = "pocket", device: torch.device | str = "cpu") -> FeatureNet:
    """Returns a feature network.

    Args:
        name: A name in FEATURES, or a file of `small_net.save_small_net`.
        device: Where it computes.

    Raises:
        DiffScalerError: No such network, or its weights or its library are not on this machine.
    """
    device = torch.device(device)
    if str(name) in FEATURES:
        return FEATURES[str(name)](device)
    if str(name).endswith(".safetensors"):
        return small_net(name, device)
    raise unknown("feature network", str(name), [*FEATURES, "<file>.safetensors"])


def small_net(path: str | Path, device: torch.device) -> FeatureNet:
    """Returns the small network of a file."""
    net, name, note = load_small_net(path)
    net.to(device)
    return FeatureNet(
        name=name,
        size=net.project.out_features,
        features=lambda images: net(images.to(device)),
        key=encoder_key(net) or name,
        note=note,
        heads=net.heads,
        logits=lambda features, head: net.logits(features.to(device), head),
    )


def _pocket(device: torch.device) -> FeatureNet:
    if not POCKET.is_file():
        raise DiffScalerError(
            f"the pocket base's feature network is not at {str(POCKET)!r}: it comes with the "
            f"repository, not with the package; name its file, assets/pocket/features.safetensors"
        )
    return small_net(POCKET, device)


def _inception(device: torch.device) -> FeatureNet:
    """Inception-v3 as torch-fidelity has it, which torchmetrics uses too: 2,048 features.

    Figures equal those of the original TensorFlow FID code, as torch-fidelity's authors show.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError:
        raise DiffScalerError(
            "feature network 'inception' needs torch-fidelity; run: pip install torch-fidelity"
        ) from None
    weights = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not weights.is_file():
        raise DiffScalerError(
            f"Inception's weights are not on this machine, and nothing is downloaded by itself; "
            f"fetch {URL_INCEPTION_V3} to {str(weights)!r}"
        )
    net: Any = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    net.to(device).eval()

    def features(images: Tensor) -> Tensor:
        # It takes bytes and resizes without smoothing, so what is larger is shrunk well before.
        small = resized(images, 299) if min(images.shape[2:]) > 299 else images
        pixels = ((small.to(device).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return net(pixels)[0]  # type: ignore[no-any-return]

    return FeatureNet("Inception-v3", 2048, features, key=weights.name)


#: Name -> what loads it onto a device.
FEATURES: dict[str, Callable[[torch.device], FeatureNet]] = {
    "pocket": _pocket,
    "inception": _inception,
}
