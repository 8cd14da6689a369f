"""Where a training node's pictures come from: a folder, IMAGEs, or LATENTs with their prompts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.errors import shown
from ..diffscaler_core.training.data.batches import TrainingData
from ..diffscaler_core.training.data.pixels import Size, bucket_sizes, nearest_bucket
from ..diffscaler_core.training.data.prepare import encode_folder, encode_pictures
from ..diffscaler_core.training.denoiser import Denoiser
from .folders import stamp_of
from .training_controls import NOTHING, ControlSource, cut_image, with_controls

NO_FOLDER = "(none)"
#: Pictures that come with the pack, so that its workflow runs as it is.
EXAMPLES = {"example: ink drawings": Path(__file__).parent.parent / "assets" / "examples" / "ink"}

Latent = Mapping[str, Any]


def folder_choices() -> list[str]:
    """Returns the folders a node offers: none, the pack's own, those in ComfyUI's input folder."""
    return [NO_FOLDER, *EXAMPLES, *folder_paths.get_input_subfolders()]


def folder_of(choice: str) -> Path:
    """Returns the path of a folder that a node offers.

    Raises:
        DiffScalerError: No such folder, or one outside ComfyUI's input folder.
    """
    if choice in EXAMPLES:
        return EXAMPLES[choice]
    root = folder_paths.get_input_directory()
    path = os.path.abspath(os.path.join(root, choice))
    if not folder_paths.is_within_directory(root, path) or not os.path.isdir(path):
        raise DiffScalerError(
            f"there is no folder {shown(choice)} in ComfyUI's input folder; put the pictures there "
            f"and press R to see it in the list"
        )
    return Path(path)


def fingerprint_of(choice: str) -> str:
    """Returns what changes when a folder's files do."""
    if choice == NO_FOLDER or not choice:
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder_of(choice).rglob("*")):
        if path.is_file():
            digest.update(f"{path}|{stamp_of(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def from_folder(
    denoiser: Denoiser,
    choice: str,
    size: int,
    name: str,
    options: Mapping[str, Any],
    control: ControlSource = NOTHING,
) -> TrainingData:
    """Returns a folder's pictures, encoded.

    Args:
        denoiser: The base, with its VAE.
        choice: One of `folder_choices`.
        size: Side in pixels.
        name: Prompt of pictures that have none.
        options: flip, crops, buckets, skip_bad, keep_latents.
        control: Where control pictures come from, if it is wanted.

    Raises:
        DiffScalerError: No VAE, no picture, or pictures that cannot be used.
    """
    if control.images:
        raise DiffScalerError(
            "control_images belong to images; for a folder of pictures choose a control_folder, or "
            "control_from"
        )
    encode = _encoder(denoiser)
    cache = os.path.join(folder_paths.get_user_directory(), "diffscaler", "latents")
    return encode_folder(
        folder_of(choice),
        _checked(size, denoiser),
        encode,
        name=name,
        control=False if control.folder is None else folder_of(control.folder),
        control_from=control.made,
        flip=bool(options.get("flip", False)),
        crops=int(options.get("crops", 0)),
        buckets=bool(options.get("buckets", False)),
        factor=denoiser.factor,
        skip_bad=bool(options.get("skip_bad", False)),
        channels=denoiser.channels,
        cache=cache if options.get("keep_latents", True) else None,
        encoder_key=denoiser.encoder_key,
    )


def from_images(
    denoiser: Denoiser,
    images: Sequence[Tensor],
    captions: Sequence[str],
    size: int,
    options: Mapping[str, Any],
    control: ControlSource = NOTHING,
) -> TrainingData:
    """Returns IMAGEs, (B, H, W, 3) in 0..1 each, encoded.

    Raises:
        DiffScalerError: No VAE, pictures that are too small, or another number of captions.
    """
    pictures = [image for batch in images for image in batch]
    if len(captions) == 1:
        captions = [captions[0]] * len(pictures)
    if len(captions) != len(pictures):
        raise DiffScalerError(
            f"{len(pictures)} images but {len(captions)} prompts; connect one for each, or one for "
            f"all of them"
        )
    buckets = bool(options.get("buckets", False))
    size = _checked(size, denoiser)
    sizes = bucket_sizes(size, denoiser.factor) if buckets else [(size, size)]

    def target_of(i: int) -> Size:
        height, width = pictures[i].shape[:2]
        return nearest_bucket((height, width), sizes)

    def load(i: int) -> Tensor:
        return cut_image(pictures[i], target_of(i), f"image {i + 1} of {len(pictures)}")

    def load_control(i: int) -> Tensor:
        return cut_image(controls[i], target_of(i), f"control image {i + 1} of {len(controls)}")

    controls = control.for_rows(len(pictures), "images")
    return encode_pictures(
        load,
        list(captions),
        _encoder(denoiser),
        load_control=load_control if controls else None,
        control_from=control.made,
        flip=bool(options.get("flip", False)),
    )


def from_latents(
    model: Any,
    scale: float,
    latents: Sequence[Latent],
    prompts: Sequence[str],
    control: ControlSource = NOTHING,
    vae: Any = None,
    denoiser: Denoiser | None = None,
) -> TrainingData:
    """Returns LATENTs as training data, those of one shape together.

    Args:
        model: ComfyUI's `BaseModel`.
        scale: The trainer's x0 is the model's latent times this.
        latents: LATENTs, one per picture or in batches.
        prompts: The prompts' names, one per picture or one for all.
        control: Control images for them, encoded at the latents' sizes.
        vae: ComfyUI's VAE, for control images.
        denoiser: The model with that VAE.

    Raises:
        DiffScalerError: Another number of prompts, latents of another model, or masked ones.
    """
    if control.made is not None:
        raise DiffScalerError(
            f"control_from {control.made!r} needs the pictures themselves, not their latents: "
            f"connect images, or connect control_images to the latents"
        )
    rows = [row for latent in latents for row in _samples(latent)]
    channels = model.latent_format.latent_channels
    wrong = [row.shape[0] for row in rows if row.shape[0] != channels]
    if wrong or not rows:
        raise DiffScalerError(
            f"the latents have {wrong[0] if wrong else 'no pictures and no'} channels, this model "
            f"has {channels}; encode the pictures with this model's own VAE"
        )
    if len(prompts) not in (1, len(rows)):
        raise DiffScalerError(
            f"{len(rows)} latents but {len(prompts)} prompts; connect one for each, or one for all"
        )
    named = list(prompts) if len(prompts) > 1 else [prompts[0]] * len(rows)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        shapes.setdefault(tuple(row.shape), []).append(i)
    buckets = tuple(
        model.process_latent_in(torch.stack([rows[i] for i in own]))[None] * scale
        for own in shapes.values()
    )
    names = tuple(dict.fromkeys(named))
    order = [i for own in shapes.values() for i in own]
    index = torch.tensor([names.index(named[i]) for i in order])
    data = TrainingData(buckets if len(buckets) > 1 else buckets[0], index, names)
    controls = control.for_rows(len(rows), "latents")
    if not controls or denoiser is None:
        return data
    encode, ratio = _encoder(denoiser), int(vae.spacial_compression_encode())
    return with_controls(data, [controls[i] for i in order], encode, ratio)


def _samples(latent: Latent) -> list[Tensor]:
    if "noise_mask" in latent:
        raise DiffScalerError("the latents carry a mask, which training cannot follow")
    return [row.detach().to("cpu", torch.float32, copy=True) for row in latent["samples"]]


def _encoder(denoiser: Denoiser) -> Any:
    if denoiser.encode is None:
        raise DiffScalerError("pictures have to be encoded: connect the model's VAE to 'vae'")
    return denoiser.encode


def _checked(size: int, denoiser: Denoiser) -> int:
    if size % denoiser.factor:
        near = max(1, round(size / denoiser.factor)) * denoiser.factor
        raise DiffScalerError(
            f"resolution {size} does not suit this model: it must be a multiple of "
            f"{denoiser.factor}, such as {near}"
        )
    return size
