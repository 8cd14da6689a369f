"""The picture sets of the methods benchmark: drawn by pocket/draw.py, 64 pixels a side.

Both bases are trained on the same set, "base"; methods are then adapted to the others. A set is
unconditional (its pictures carry no class: the base is told "no class") or conditional.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "pocket"))

from draw import draw_arrays  # noqa: E402
from words import ANIMALS, BASE_WORDS, FRUITS, SMILEYS  # noqa: E402

from diffscaler_core.autoencoder import vae_encode  # noqa: E402
from diffscaler_core.pocket import load_vae  # noqa: E402

POCKET = ROOT / "assets" / "pocket"
SIDE = 64  # pixels
SHAPE = (16, 8, 8)  # of one latent
NULL = len(BASE_WORDS)  # the class "no class"; new classes follow it


@dataclass(frozen=True)
class PictureSet:
    """What a base is adapted to.

    Attributes:
        words: What is drawn.
        style: How; a name in pocket/words.py's STYLES.
        conditional: True: each word is a class. The base's own words keep their class; others are
            new classes.
        title: What the tables call it.
    """

    words: tuple[str, ...]
    style: str
    conditional: bool
    title: str

    @property
    def new(self) -> tuple[str, ...]:
        """The words that the base has no class for; none in an unconditional set."""
        return tuple(w for w in self.words if self.conditional and w not in BASE_WORDS)

    def label(self, word: str) -> int:
        """The class the base is told for a word."""
        if not self.conditional:
            return NULL
        if word in BASE_WORDS:
            return BASE_WORDS.index(word)
        return NULL + 1 + self.new.index(word)


SETS: dict[str, PictureSet] = {
    "fruits": PictureSet(tuple(FRUITS), "plain", False, "fruits"),
    "smileys": PictureSet(tuple(SMILEYS), "plain", False, "smileys"),
    "ink": PictureSet(BASE_WORDS, "ink", False, "ink drawings"),
    "neon": PictureSet(tuple(ANIMALS), "neon", False, "neon animals"),
    "classes": PictureSet((*FRUITS, *SMILEYS), "plain", True, "12 new classes"),
    "blueprint": PictureSet(BASE_WORDS, "blueprint", True, "known classes as blueprints"),
}
UNCONDITIONAL = tuple(name for name, own in SETS.items() if not own.conditional)
CONDITIONAL = tuple(name for name, own in SETS.items() if own.conditional)


@torch.no_grad()
def pictures(words: tuple[str, ...], style: str, per_word: int, seed: int) -> Tensor:
    """Returns pictures in −1..1, (len(words) * per_word, 3, SIDE, SIDE), word by word."""
    drawn = torch.from_numpy(draw_arrays(words, style, per_word, seed)).permute(0, 3, 1, 2)
    small = F.interpolate(drawn.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return small.clamp(0, 255).div(127.5).sub(1)


@torch.no_grad()
def encoded(images: Tensor) -> Tensor:
    """Returns the latents of pictures, (N, *SHAPE)."""
    encode = vae_encode(load_vae(POCKET))
    return torch.cat([encode(part) for part in images.split(64)])
