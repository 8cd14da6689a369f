"""Pairs of control picture and picture for the pocket base, and how well a result keeps to one.

A subject stands anywhere, turned and scaled, which the base never does by itself (it draws them
large and in the middle): so what a result shows of its control, it can have from there alone.

    python pocket/control_pictures.py     writes the pictures of assets/examples/control anew
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import ANYWHERE, draw, draw_arrays
from torch import Tensor
from words import SETS

from diffscaler_core.training import Denoiser, TrainingData, encode_pictures
from diffscaler_core.training.data.controls import CONTROLS

KINDS = ("edges", "silhouette")
CACHE = Path(".cache/pocket/latents")
WORDS = SETS["base"][0]
#: Words no control task is trained on.
UNSEEN = WORDS[4::7]
SEEN = tuple(word for word in WORDS if word not in UNSEEN)


#: The shipped examples: word -> which of its drawings.
EXAMPLES = {"cat": 1, "penguin": 0, "sailboat": 1, "rocket": 1, "guitar": 1, "star": 2}
EXAMPLES_SEED = 41


def pictures(words: Sequence[str], per_word: int, seed: int) -> Tensor:
    """Drawn pictures, (N, 3, H, W) in −1..1, word by word."""
    return _pixels(draw_arrays(words, "plain", per_word, seed, poses=ANYWHERE))


def controls(kind: str, words: Sequence[str], per_word: int, seed: int) -> Tensor:
    """The control pictures of `pictures`, white on black."""
    if kind == "silhouette":
        return _pixels(draw_arrays(words, "silhouette", per_word, seed, poses=ANYWHERE))
    return 2 * edges(pictures(words, per_word, seed)).repeat(1, 3, 1, 1) - 1


def pairs(
    denoiser: Denoiser, kind: str, words: Sequence[str], per_word: int, seed: int
) -> TrainingData:
    """Pairs as latents; encoded once and kept."""
    drawn, shown = pictures(words, per_word, seed), controls(kind, words, per_word, seed)
    encode = denoiser.encode
    assert encode is not None
    return encode_pictures(
        lambda i: drawn[i],
        [word for word in words for _ in range(per_word)],
        encode,
        load_control=lambda i: shown[i],
        cache=CACHE,
        encoder_key=denoiser.encoder_key,
    )


def edges(pixels: Tensor) -> Tensor:
    """Canny's edges of (N, 3, H, W) in −1..1: (N, 1, H, W) of 0 and 1."""
    return torch.stack([(CONTROLS["edges"](picture, 0)[:1] + 1) / 2 for picture in pixels])


def silhouette(pixels: Tensor) -> Tensor:
    """What differs from the background, (N, 3, H, W) in −1..1 -> (N, 1, H, W) of 0 and 1.

    Backgrounds are plain or graded from top to bottom, so each row's own is at its two ends.
    """
    sides = torch.cat([pixels[..., :3], pixels[..., -3:]], dim=-1)
    apart = (pixels - sides.median(dim=-1, keepdim=True).values).abs().amax(1, keepdim=True)
    return (apart > 0.22).float()


def edge_iou(results: Tensor, shown: Tensor) -> Tensor:
    """Overlap of each result's edges with those of its control, both 3 px wide; (N,) in 0..1."""
    return _iou(_thick(edges(results)), _thick((shown.mean(1, keepdim=True) > 0).float()))


def mask_iou(results: Tensor, shown: Tensor) -> Tensor:
    """Overlap of each result's subject with the control's silhouette, (N,) in 0..1."""
    return _iou(silhouette(results), (shown.mean(1, keepdim=True) > 0).float())


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "edges": edge_iou,
    "silhouette": mask_iou,
}


def _thick(lines: Tensor) -> Tensor:
    return F.max_pool2d(lines, 3, stride=1, padding=1)


def _iou(one: Tensor, other: Tensor) -> Tensor:
    both = (one * other).flatten(1).sum(1)
    either = torch.maximum(one, other).flatten(1).sum(1)
    return both / either.clamp(min=1)


def _pixels(arrays: object) -> Tensor:
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1  # type: ignore[arg-type]


def main() -> None:
    """Draws the examples."""
    folder = Path("assets/examples/control")
    folder.mkdir(parents=True, exist_ok=True)
    for word, index in EXAMPLES.items():
        for style, name in (("plain", word), ("silhouette", f"silhouette_{word}")):
            image = draw(word, style, seed=EXAMPLES_SEED, index=index, poses=ANYWHERE)
            image.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
