"""Makes docs/images/translate.jpg and docs/images/guidance.jpg with the pocket base.

.venv/bin/python scripts/redrawn_pictures.py [translate] [guidance]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffscaler_core import TaskAdapter, load_task
from diffscaler_core.evaluation.pictures import labelled_grid
from diffscaler_core.pictures import as_picture, cut_to
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.systems.guidance import Guide, sample_guided
from diffscaler_core.systems.guidance_losses import make_loss
from diffscaler_core.systems.translate import translate
from diffscaler_core.training import Denoiser, as_denoiser, prompts_for, sample_latents

ROOT = Path(__file__).resolve().parent.parent
POCKET, OUT = ROOT / "assets" / "pocket", ROOT / "docs" / "images"
WORDS, SIDE = ["cat", "rocket", "penguin", "sailboat"], 128
SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 3.0}
Rows = list[tuple[str, list[Tensor]]]


@dataclass(frozen=True)
class Base:
    """The pocket base, what it is told, and the noise it starts from."""

    denoiser: Denoiser
    told: dict[str, Tensor]
    null: dict[str, Tensor]
    noise: Tensor

    def shown(self, latents: Tensor) -> list[Tensor]:
        """Returns the pictures of latents."""
        assert self.denoiser.decode is not None
        with torch.no_grad():
            return list(self.denoiser.decode(latents).cpu())

    def drawn(self, task: TaskAdapter | None = None) -> Tensor:
        """Returns latents of the words, by the base or a task."""
        worn = nullcontext() if task is None else self.denoiser.attached({task.name: task})
        with torch.no_grad(), self.denoiser.held(), worn:
            return sample_latents(self.denoiser, self.told, self.null, self.noise, **SAMPLING)


def translated(base: Base) -> Rows:
    """The base's own pictures as ink and as neon, and pictures that it would not draw as ink."""
    own, ink, neon = base.drawn(), _task("ink"), _task("neon")
    folder = ROOT / "assets" / "examples" / "control"
    images = [as_picture(Image.open(folder / f"{word}.png")) for word in WORDS]
    pixels = torch.cat([cut_to(image, (SIDE, SIDE)) for image in images])
    assert base.denoiser.encode is not None
    with torch.no_grad():
        others = base.denoiser.encode(pixels)

    def moved(latents: Tensor, task: TaskAdapter, **settings: Any) -> list[Tensor]:
        told = {"source_prompt": base.told, "null": base.null, **SAMPLING, **settings}
        return base.shown(translate(base.denoiser, latents, None, task, **told))

    return [
        ("drawn by the base", base.shown(own)),
        ("as ink", moved(own, ink)),
        ("as neon", moved(own, neon)),
        ("not by the base", list(pixels)),
        ("ink, strength 0.5", moved(others, ink, strength=0.5, guidance=2.0)),
    ]


def guided(base: Base) -> Rows:
    """The base's own pictures, and what losses make of them."""

    def led(colour: str, rho: float, mask: Tensor | None = None) -> list[Tensor]:
        guide = Guide([make_loss("colour", colour, where=mask)], rho)
        kept = {"source": own, "mask": mask}
        with base.denoiser.held():
            found = sample_guided(
                base.denoiser, guide, base.told, base.null, base.noise, **kept, **SAMPLING
            )
        return base.shown(found)

    own, right = base.drawn(), torch.zeros(1, 1, 16, 16)
    right[..., 8:] = 1
    return [
        ("not led", base.shown(own)),
        ("mean colour blue", led("#3060d0", 0.5)),
        ("mean colour green", led("#50a040", 0.5)),
        ("right half, blue", led("#3060d0", 1.5, right)),
    ]


#: Picture -> its rows.
PICTURES: dict[str, Callable[[Base], Rows]] = {"translate": translated, "guidance": guided}


def main() -> None:
    """Draws the pictures asked for, or both."""
    torch.set_num_threads(1)
    denoiser = as_denoiser(load_pipeline(POCKET))
    prompts = prompts_for(denoiser, WORDS, words=_task("words"))
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(len(WORDS), 16, 16, 16, generator=generator)
    base = Base(denoiser, prompts(torch.arange(len(WORDS))), prompts.null(len(WORDS)), noise)
    for name in sys.argv[1:] or PICTURES:
        path = OUT / f"{name}.jpg"
        labelled_grid(PICTURES[name](base)).save(path, quality=88, optimize=True)
        print(path)


def _task(name: str) -> TaskAdapter:
    return load_task(POCKET / "diffscaler" / f"{name}.safetensors")


if __name__ == "__main__":
    main()
