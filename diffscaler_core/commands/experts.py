"""Commands for experts: data cut into parts, and a router that tells the parts apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from ..blocks import block_named
from ..errors import DiffScalerError
from ..systems.clusters import k_means
from ..systems.features import data_features, untold
from ..systems.partition import CONFIG, by_cluster, by_folder, write_parts
from ..systems.router import save_router
from ..systems.router_training import RouterSettings
from ..systems.router_training import train_router as train
from ..training.bases.load import DTYPES
from ..training.data.sources import find_examples
from .base_options import Base, Device, Dtype, Size, opened
from .console import AsJson, check_device, check_folder, check_out, err, say, say_json
from .features import encoded_pictures

_DEFAULTS = RouterSettings()
EXAMPLES = {
    "partition": (
        "diffscaler partition --base assets/pocket --data pictures --parts 4 --out parts",
        "diffscaler partition --base assets/pocket --data pictures --by-folder --out parts",
        "Then all experts in one run: diffscaler train parts/train.toml; or each list for itself, "
        "on machines that never meet.",
    ),
    "train-router": (
        "diffscaler train-router --base assets/pocket --part ink=pictures/ink-kept "
        "--part flowers=pictures/flowers -o router.safetensors",
        "A part is named as its expert is. What comes of it: docs/experts.md.",
    ),
}


def partition(
    base: Base,
    data: Annotated[str, typer.Option(help="Pictures, as --data of train.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the parts' lists.")],
    parts: Annotated[int | None, typer.Option(help="How many parts, by likeness.")] = None,
    folders: Annotated[
        bool, typer.Option("--by-folder", help="A part for each sub-folder.", metavar="")
    ] = False,
    block: Annotated[
        str | None, typer.Option(help="Whose features: a name or a number; default: the middle.")
    ] = None,
    time: Annotated[float, typer.Option(help="How noisy, 0 to 1.")] = 0.1,
    words: Annotated[Path | None, typer.Option(help="File of the base's null prompt.")] = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Of k-means and the noise.")] = 0,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Cut a data set into parts, one for each expert; pictures stay where they are."""
    if folders == (parts is not None):
        raise DiffScalerError("say how many parts (--parts 4), or that folders are (--by-folder)")
    check_folder(folder)
    check_device(device)
    examples = find_examples(data)
    spread = None
    if folders:
        found = by_folder(examples)
    else:
        denoiser, table = opened(base, words, dtype, device)
        told = untold(denoiser, table)
        name = block_named(denoiser.model, block)
        encoded = encoded_pictures(denoiser, examples, size)
        with denoiser.held():
            seen = data_features(denoiser, encoded, (time,), told, [name], seed=seed)
        clusters = k_means(seen[name, time], parts or 0, seed=seed)
        found, spread = by_cluster(clusters), clusters.spread
    written = write_parts(folder, examples, found, base)
    counts = {name: len(own) for name, own in found.items()}
    if as_json:
        lists = {name: str(path) for name, path in written.items()}
        say_json(
            {"parts": counts, "lists": lists, "config": str(folder / CONFIG), "spread": spread}
        )
        return
    for name, path in written.items():
        say(f"{path}: {counts[name]} pictures")
    if spread is not None:
        say(f"pictures lie at {spread:.0%} of their spread from their own part's middle")
    say(f"{folder / CONFIG}: all experts in one run of diffscaler train")


def train_router(
    base: Base,
    part: Annotated[
        list[str],
        typer.Option(help="name=pictures, as --data of train; named as the expert; repeated."),
    ],
    to: Annotated[Path, typer.Option("--out", "-o", help="The router's file.")],
    block: Annotated[
        str | None, typer.Option(help="Which block is read: a name or a number; default: middle.")
    ] = None,
    hidden: Annotated[
        int, typer.Option(help="Units of its hidden layer; 0: a linear map.")
    ] = _DEFAULTS.hidden,
    pool: Annotated[
        int, typer.Option(help="Means over pool x pool parts of a picture.")
    ] = _DEFAULTS.pool,
    draws: Annotated[int, typer.Option(help="Noisings of each picture.")] = _DEFAULTS.draws,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULTS.steps,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = _DEFAULTS.lr,
    kept_back: Annotated[
        float, typer.Option(help="Share of the pictures that it is judged by.")
    ] = _DEFAULTS.kept_back,
    words: Annotated[Path | None, typer.Option(help="File of the base's null prompt.")] = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = _DEFAULTS.seed,
    save_dtype: Annotated[str, typer.Option(help=f"Of the file: {', '.join(DTYPES)}.")] = "float32",
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a router, which says which expert a noisy picture is for."""
    check_out(to)
    check_device(device)
    if save_dtype not in DTYPES:
        raise DiffScalerError(f"save_dtype {save_dtype!r}: one of {', '.join(DTYPES)}")
    settings = RouterSettings(
        block=block, hidden=hidden, pool=pool, draws=draws, steps=steps, lr=lr,
        kept_back=kept_back, seed=seed,
    )  # fmt: skip
    places = _named(part)
    denoiser, table = opened(base, words, dtype, device)
    told = untold(denoiser, table)
    encoded = {name: encoded_pictures(denoiser, place, size) for name, place in places.items()}
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        shown = bar.add_task("looking", total=None)
        router = train(
            denoiser, encoded, told, settings,
            on_picture=lambda done, of: bar.update(shown, completed=done, total=of),
        )  # fmt: skip
    save_router(router, to, DTYPES[save_dtype])
    facts = {"file": str(to), "parameters": router.num_parameters, **router.facts}
    if as_json:
        say_json({**facts, "bytes": to.stat().st_size})
        return
    by_noise = ", ".join(f"{band} {x:.0%}" for band, x in facts["accuracy_by_noise"].items())
    say(f"accuracy on pictures kept back {facts['accuracy']:.0%}; by noise: {by_noise}")
    say(f"{to}: router of {', '.join(router.parts)}, {router.num_parameters:,} parameters")


def _named(said: list[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    for text in said:
        name, equals, place = text.partition("=")
        if not equals or not name or not place or name in places:
            raise DiffScalerError(f"a part is written name=pictures, each name once; got {text!r}")
        places[name] = place
    if len(places) < 2:
        raise DiffScalerError("a router tells two or more parts apart: say --part twice or more")
    return places
