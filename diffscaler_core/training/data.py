"""Pictures from a folder, encoded once. Knows files and pixels; no model but an `encode` callable.

A folder holds pictures, or one sub-folder of pictures per class. A picture's prompt is the text
file beside it (`cat.png`, `cat.txt`), else the name of its class folder, else the task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError, first_names
from .denoiser import Encode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """One picture file and what it shows."""

    path: Path
    prompt: str


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Clean samples and their prompts, ready to train on.

    Attributes:
        latents: x0 in the model's own space, (V, N, C, h, w): V views (as is, mirrored) of N
            pictures.
        index: Which prompt each picture has, (N,).
        prompts: The prompts' names.
        skipped: Files that could not be used, with the reason.
    """

    latents: Tensor
    index: Tensor
    prompts: tuple[str, ...]
    skipped: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.index)

    def batch(self, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Returns random (x0 (B, C, h, w), prompt indices (B,)), drawn with replacement."""
        rows = torch.randint(len(self), (size,), generator=generator)
        views = torch.randint(len(self.latents), (size,), generator=generator)
        return self.latents[views, rows], self.index[rows]


def find_pictures(folder: str | Path, name: str = "task") -> list[Picture]:
    """Returns the pictures of a folder and of its sub-folders, in the order of their paths.

    Raises:
        DiffScalerError: No such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DiffScalerError(f"{str(folder)!r} is no folder; give a folder of pictures")
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            own = name if path.parent == folder else path.parent.name
            text = path.with_suffix(".txt")
            found.append(Picture(path, text.read_text().strip() if text.is_file() else own))
    if not found:
        raise DiffScalerError(
            f"{str(folder)!r} holds no picture ({', '.join(SUFFIXES)}), also not in its sub-folders"
        )
    return found


def load_picture(path: str | Path, size: int, channels: int = 3) -> Tensor:
    """Returns one picture as (channels, size, size) in −1..1: resized to cover, its middle kept.

    Transparent pictures are laid on white; the camera's rotation is applied.

    Raises:
        ValueError: Broken, or with a side shorter than half of `size`; the message is the reason.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read: {error}".replace(str(path), Path(path).name)) from error
    if min(image.size) * 2 < size:
        raise ValueError(f"{image.width}x{image.height} is too small for {size}x{size}")
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(size, size, -1)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def encode_folder(
    folder: str | Path,
    size: int,
    encode: Encode,
    *,
    name: str = "task",
    flip: bool = False,
    skip_bad: bool = False,
    channels: int = 3,
    batch: int = 16,
) -> TrainingData:
    """Returns a folder's pictures as latents in memory, each encoded once (twice with `flip`).

    Args:
        folder: Pictures, or one sub-folder of pictures per class.
        size: Side of the square the pictures are cropped to, in pixels.
        encode: Pixels (B, channels, size, size) in −1..1 -> latents (B, C, h, w).
        name: Prompt of pictures that lie in the folder itself.
        flip: Also train on the mirrored pictures.
        skip_bad: Leave out pictures that cannot be used (see `TrainingData.skipped`); otherwise
            they are refused together, by name, before anything is trained.
        channels: 3, or 1 for grey pictures.
        batch: How many pictures are encoded at a time.

    Raises:
        DiffScalerError: No picture, or pictures that cannot be used.
    """
    pictures = find_pictures(folder, name)
    good, bad = [], []
    for picture in pictures:  # all are tried before the first is encoded
        try:
            load_picture(picture.path, size, channels)
            good.append(picture)
        except ValueError as error:
            bad.append(f"{picture.path.relative_to(folder)} ({error})")
    if bad and not (skip_bad and good):
        hint = "; remove or replace them, or skip them (skip_bad)" if good else ""
        raise DiffScalerError(
            f"{len(bad)} of {len(pictures)} pictures cannot be used: {first_names(bad)}{hint}"
        )
    data = encode_pictures(
        lambda i: load_picture(good[i].path, size, channels),
        [picture.prompt for picture in good],
        encode,
        flip=flip,
        batch=batch,
    )
    return replace(data, skipped=tuple(bad))


@torch.no_grad()
def encode_pictures(
    load: Callable[[int], Tensor],
    prompts: Sequence[str],
    encode: Encode,
    *,
    flip: bool = False,
    batch: int = 16,
) -> TrainingData:
    """Returns N pictures as training data; only `batch` of them are in memory as pixels.

    Args:
        load: Number of a picture -> its pixels (channels, H, W) in −1..1, all of one size.
        prompts: The N pictures' prompts.
        encode: As in `encode_folder`.
        flip: Also train on the mirrored pictures.
        batch: How many pictures are encoded at a time.

    Raises:
        DiffScalerError: The encoder gives NaN or Inf.
    """
    parts: list[list[Tensor]] = [[], []]
    for start in range(0, len(prompts), batch):
        pixels = torch.stack([load(i) for i in range(start, min(start + batch, len(prompts)))])
        parts[0].append(encode(pixels).float().cpu())
        if flip:
            parts[1].append(encode(pixels.flip(-1)).float().cpu())
    latents = torch.stack([torch.cat(view) for view in parts if view])
    if not bool(torch.isfinite(latents).all()):
        raise DiffScalerError("the VAE gave NaN or Inf; load it in float32")
    names = tuple(dict.fromkeys(prompts))
    index = torch.tensor([names.index(prompt) for prompt in prompts])
    return TrainingData(latents, index, names)


def vae_encode(vae: Any) -> Encode:
    """Returns the `encode` of a diffusers VAE: the posterior's mode, shifted and scaled.

    Args:
        vae: AutoencoderKL, AutoencoderTiny, …; stays where it is, in its own dtype.
    """
    scale = float(getattr(vae.config, "scaling_factor", None) or 1.0)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def encode(pixels: Tensor) -> Tensor:
        output = vae.encode(pixels.to(vae.device, vae.dtype))
        latents = output.latents if hasattr(output, "latents") else output.latent_dist.mode()
        return (latents.float() - shift) * scale  # type: ignore[no-any-return]

    return encode


def vae_decode(vae: Any) -> Encode:
    """Returns the inverse of `vae_encode`: latents -> pixels (B, 3, H, W) in −1..1."""
    scale = float(getattr(vae.config, "scaling_factor", None) or 1.0)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def decode(latents: Tensor) -> Tensor:
        z = (latents / scale + shift).to(vae.device, vae.dtype)
        return vae.decode(z).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]

    return decode
