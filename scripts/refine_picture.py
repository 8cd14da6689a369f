"""Makes docs/images/refine.png: coarse pictures, refined ones, and the true ones.

.venv/bin/python scripts/refine_picture.py

The pictures are those of assets/examples/control, which nobody trained on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffscaler_core import load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.training import as_denoiser, prompts_for, sample_latents
from diffscaler_core.training.data.coarse import KINDS
from diffscaler_core.training.preview import to_image

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "assets" / "examples" / "control"
OUT = ROOT / "docs" / "images" / "refine.png"
#: Word -> kind and strength of its coarse picture.
SHOWN = {
    "cat": ("blur", 1.0), "sailboat": ("blur", 0.7), "penguin": ("low_resolution", 1.0),
    "rocket": ("low_resolution", 0.7), "guitar": ("jpeg", 1.0), "star": ("jpeg", 0.9),
}  # fmt: skip
GAP = 6


def shown(word: str) -> Tensor:
    """Returns an example picture, (3, H, W) in −1..1."""
    values = np.array(Image.open(PICTURES / f"{word}.png").convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).movedim(-1, 0) / 127.5 - 1


@torch.no_grad()
def refined(coarse: Tensor) -> Tensor:
    """Returns what the shipped task makes of coarse pictures, (N, 3, H, W), in ten steps."""
    base = as_denoiser(load_pipeline(ROOT / "assets" / "pocket"))
    assert base.encode is not None
    assert base.decode is not None
    known = load_task(ROOT / "assets" / "pocket" / "diffscaler" / "words.safetensors")
    prompts = prompts_for(base, tuple(SHOWN), "stored", words=known)
    told = prompts(torch.arange(len(SHOWN))) | {"control": base.encode(coarse)}
    noise = torch.randn(len(SHOWN), 16, 16, 16, generator=torch.Generator().manual_seed(3))
    task = load_task(ROOT / "assets" / "tasks" / "refine.safetensors")
    with base.held(), base.attached({"refine": task}):
        latents = sample_latents(base, told, prompts.null(len(SHOWN)), noise, steps=10, guidance=1)
    return base.decode(latents)


def main() -> None:
    """Draws and writes; says how near the pictures are to the true ones."""
    torch.set_num_threads(1)
    true = torch.stack([shown(word) for word in SHOWN])
    pairs = zip(true, SHOWN.values(), strict=True)
    coarse = torch.stack([KINDS[kind](picture, strength) for picture, (kind, strength) in pairs])
    rows = [coarse, refined(coarse), true]
    for name, row in zip(("coarse", "refined"), rows, strict=False):
        near = 10 * torch.log10(4 / (row - true).square().flatten(1).mean(1))
        told = ", ".join(f"{word} {value:.1f}" for word, value in zip(SHOWN, near, strict=True))
        print(f"{name}: {near.mean():.2f} dB ({told})")
    side = true.shape[-1] + GAP
    sheet = Image.new("RGB", (side * len(SHOWN) - GAP, side * 3 - GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(to_image(picture), (x * side, y * side))
    sheet.save(OUT, optimize=True)
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
