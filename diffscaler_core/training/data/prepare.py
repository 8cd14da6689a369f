"""Pictures become training data: found, looked through, encoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...autoencoder import vae_decode, vae_encode
from ...errors import DiffScalerError, first_names
from ..denoiser import Encode
from .batches import Batch, TrainingData
from .cache import Cache, digest_of
from .controls import MakeControl, made, maker_of
from .encoding import MEMORY, Item, Mill, OnEncode
from .pixels import (
    Size,
    View,
    bucket_sizes,
    check_size,
    cropped_share,
    cut,
    decode_picture,
    load_picture,
    nearest_bucket,
    picture_size,
    views_of,
)
from .sources import Example, find_examples, find_pictures

__all__ = [
    "Batch",
    "TrainingData",
    "encode_folder",
    "encode_pictures",
    "find_examples",
    "find_pictures",
    "load_picture",
    "vae_decode",
    "vae_encode",
]


def encode_folder(
    folder: Any,
    size: int,
    encode: Encode,
    *,
    name: str = "task",
    control: str | Path | bool = False,
    control_from: str | MakeControl | None = None,
    split: str = "train",
    image: str | None = None,
    prompt: str | None = None,
    flip: bool = False,
    crops: int = 0,
    buckets: bool = False,
    factor: int = 1,
    skip_bad: bool = False,
    channels: int = 3,
    batch: int = 16,
    cache: str | Path | None = None,
    encoder_key: str | None = None,
    memory: int = MEMORY,
    on_encode: OnEncode | None = None,
) -> TrainingData:
    """Returns the pictures of a folder, or of another source, as latents; each view encoded once.

    Args:
        folder: Pictures, or one sub-folder of pictures per class; a list in a file; a data set; see
            `find_examples`, whose result is taken as well.
        size: Side of the square the pictures are cropped to, in pixels.
        encode: Pixels (B, channels, H, W) in −1..1 -> latents (B, C, h, w).
        name: Prompt of pictures that have none.
        control: Also encode control pictures; see `find_examples`.
        control_from: Make the control pictures in place of finding them: a name of
            `controls.CONTROLS`, or a function (pixels (channels, H, W) in −1..1, seed) -> the same
            shape. It is made of the very view that is trained on. A function of your own is called
            from several threads, and what it makes is not cached.
        split: Of a data set.
        image: Column of a data set that holds the pictures.
        prompt: Column or key that holds the prompts.
        flip: Also train on the mirrored pictures.
        crops: Random crops per picture besides its middle, each of 80 to 100 % of the largest
            possible side; encoded once, like all views.
        buckets: Cut each picture to the nearest of `bucket_sizes(size, factor)` in place of the
            square: little is cropped away, and batches are made of equal shapes.
        factor: What sides must be a multiple of, from `Denoiser.factor`.
        skip_bad: Leave out pictures that cannot be used (see `TrainingData.skipped`); otherwise
            they are refused together, by name, before anything is encoded.
        channels: 3, or 1 for grey pictures.
        batch: How many pictures are encoded at a time.
        cache: Folder where latents are kept for the next run; None: they are not.
        encoder_key: Names the encoder and its weights, from `cache.encoder_key`; None: the latents
            are not kept.
        memory: Bytes of latents held in memory; the rest is read from the cache, batch by batch.
            Without a cache all are held.
        on_encode: Called with (pictures done, pictures in all).

    Raises:
        DiffScalerError: No picture, pictures that cannot be used, a VAE that gives NaN, or control
            pictures both found and made.
    """
    if control_from is not None and control is not False:
        raise DiffScalerError(
            f"control pictures are either found (control {str(control)!r}) or made (control_from): "
            f"give one of the two"
        )
    make = None if control_from is None else maker_of(control_from)
    if isinstance(folder, Sequence) and not isinstance(folder, str):
        examples = list(folder)
    else:
        examples = find_examples(
            folder, name=name, control=control, split=split, image=image, prompt=prompt
        )
    if not examples:
        raise DiffScalerError("there are no pictures to train on")
    mill = Mill(
        encode,
        views_of(flip, crops),
        batch,
        Cache(cache) if cache is not None and encoder_key is not None else None,
        encoder_key,
        memory,
        skip_bad,
        on_encode,
    )
    sizes = bucket_sizes(size, factor) if buckets else [(size, size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        mill = replace(mill, each=pool.map)
        good, bad = [], []
        # All are tried before the first is encoded.
        for tried in pool.map(lambda one: _tried(one, sizes, channels, mill, make), examples):
            if isinstance(tried, Item):
                good.append(tried)
            else:
                bad.append(tried)
        if bad and not (skip_bad and good):
            hint = "; remove or replace them, or skip them (skip_bad)" if good else ""
            raise DiffScalerError(
                f"{len(bad)} of {len(examples)} pictures cannot be used: {first_names(bad)}{hint}"
            )
        return mill.grind(good, bad)


#: How controls are made, and what names it in a cache.
Maker = tuple[MakeControl, str | None]


def _tried(
    example: Example, sizes: Sequence[Size], channels: int, mill: Mill, make: Maker | None
) -> Item | str:
    """Returns a picture that can be used, or its name and why it cannot."""
    try:
        return _item(example, sizes, channels, mill, make)
    except ValueError as error:
        return f"{example.name} ({error})"


def _item(
    example: Example, sizes: Sequence[Size], channels: int, mill: Mill, make: Maker | None
) -> Item:
    """Returns a picture that can be used; it is decoded to know, unless the cache has it.

    Raises:
        ValueError: It cannot; the message is the reason.
    """
    data = example.read()
    have = picture_size(data)
    size, digest = nearest_bucket(have, sizes), digest_of(data)
    pixels = _cutter(example.read, digest, size, digest, channels)
    kind = f"{channels} channels"
    item = Item(example.name, example.prompt, digest, size, kind, pixels, digest)
    _check(item, data, channels, mill)
    if make is not None:
        return replace(item, control=_of_picture(item, make), cropped=cropped_share(have, size))
    if example.control is None:
        return replace(item, cropped=cropped_share(have, size))
    data = example.read_control()
    own = digest_of(data)
    pixels = _cutter(example.read_control, own, size, digest, channels)
    control = Item(example.name, "", own, size, kind, pixels, digest)
    try:
        _check(control, data, channels, mill)
    except ValueError as error:
        raise ValueError(f"its control picture: {error}") from error
    return replace(item, control=control, cropped=cropped_share(have, size))


def _of_picture(item: Item, make: Maker) -> Item:
    """Returns the control that is made of a picture's own views."""
    function, name = make

    def pixels(views: Sequence[View]) -> list[Tensor]:
        return [made(function, view) for view in item.pixels(views)]

    kind = f"{item.kind}, control {name}"
    return replace(item, prompt="", kind=kind, pixels=pixels, cached=name is not None)


def _cutter(
    read: Callable[[], bytes], digest: str, size: Size, crop_digest: str, channels: int
) -> Callable[[Sequence[View]], list[Tensor]]:
    """Returns the function that reads a picture again and cuts views from it."""
    seed = int(crop_digest[:15], 16)

    def pixels(views: Sequence[View]) -> list[Tensor]:
        data = read()
        if digest_of(data) != digest:
            raise ValueError("changed while it was looked at")
        image = decode_picture(data, channels)
        return [cut(image, size, view, seed) for view in views]

    return pixels


def _check(item: Item, data: bytes, channels: int, mill: Mill) -> None:
    check_size(picture_size(data), item.size)
    if not mill.has(item):
        decode_picture(data, channels)


def encode_pictures(
    load: Callable[[int], Tensor],
    prompts: Sequence[str],
    encode: Encode,
    *,
    load_control: Callable[[int], Tensor] | None = None,
    control_from: str | MakeControl | None = None,
    flip: bool = False,
    batch: int = 16,
    cache: str | Path | None = None,
    encoder_key: str | None = None,
    memory: int = MEMORY,
    on_encode: OnEncode | None = None,
) -> TrainingData:
    """Returns N pictures as training data; only `batch` of them are in memory as pixels.

    Args:
        load: Number of a picture -> its pixels (channels, H, W) in −1..1; pictures of different
            sizes go into buckets. It is called twice for each.
        prompts: The N pictures' prompts.
        encode: As in `encode_folder`.
        load_control: The same for control pictures, of their pictures' sizes.
        control_from: Make them of the pictures instead, as in `encode_folder`.
        flip: Also train on the mirrored pictures.
        batch: As in `encode_folder`, like all that follow.
        cache: Folder for latents.
        encoder_key: Names the encoder.
        memory: Bytes of latents held.
        on_encode: Called with (pictures done, pictures in all).

    Raises:
        DiffScalerError: No picture, or the encoder gives NaN or Inf.
    """
    if not prompts:
        raise DiffScalerError("there are no pictures to train on")
    kept = Cache(cache) if cache is not None and encoder_key is not None else None
    mill = Mill(encode, views_of(flip), batch, kept, encoder_key, memory, on_encode=on_encode)
    make = None if control_from is None else maker_of(control_from)
    items = []
    for i, prompt in enumerate(prompts):
        item = _drawn(i, prompt, load)
        if make is not None:
            item = replace(item, control=_of_picture(item, make))
        elif load_control is not None:
            control = _drawn(i, "", load_control)
            if control.size != item.size:
                (h, w), (height, width) = control.size, item.size
                raise DiffScalerError(
                    f"control picture {i + 1} is {w}x{h}, its picture {width}x{height}: give both "
                    f"at one size"
                )
            item = replace(item, control=control)
        items.append(item)
    return mill.grind(items)


def _drawn(number: int, prompt: str, load: Callable[[int], Tensor]) -> Item:
    first = load(number)
    digest = digest_of(first.float().cpu().contiguous().numpy().tobytes())

    def pixels(views: Sequence[View]) -> list[Tensor]:
        picture = load(number)
        return [picture.flip(-1) if view.mirror else picture for view in views]

    size = (int(first.shape[-2]), int(first.shape[-1]))
    return Item(f"picture {number + 1}", prompt, digest, size, "pixels", pixels, digest)
