"""Router files: `load_router`, which ComfyUI calls for files that workflows name."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from random import Random

import torch

from diffscaler_core.systems.router import HEADER, Router, Site, load_router, save_router

from .good import random
from .harness import Target
from .mutations import File
from .slices import check_slice, check_with_hypothesis

BASE = {"class": "Toy", "family": "unknown", "fingerprint": "ab" * 8, "targets": 3}


@functools.cache
def router_files() -> tuple[File, ...]:
    """Good router files: a linear one, and one with all that there may be."""
    null = {"context": random(1, 1, 3, 4), "pooled": random(2, 1, 4)}
    routers = (
        Router(("a", "b"), Site(1, 3, 1, BASE), 4),
        Router(("one", "two", "three"), Site("middle", 4, 2, BASE), 8, 5, null, {"loss": 0.5}),
    )
    found = []
    for router in routers:
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.copy_(random(3, *parameter.shape))
        with tempfile.TemporaryDirectory() as folder:
            path = save_router(router, Path(folder) / "r.safetensors")
            found.append(File(path.read_bytes(), [HEADER]))
    return tuple(found)


def make(rng: Random) -> bytes:
    return rng.choice(router_files()).spoiled(rng)


def run(raw: bytes, folder: Path) -> None:
    path = folder / "case.safetensors"
    path.write_bytes(raw)
    router = load_router(path)  # one that loads answers
    alpha = sigma = torch.full((2,), 0.5)
    shares = router.posterior(router.mean.expand(2, -1), alpha, sigma)
    assert shares.shape == (2, len(router.parts))
    assert bool(torch.isfinite(shares).all())


TARGET = Target("router", make, run)


def test_the_good_files_are_good(tmp_path):
    for good in router_files():
        run(good.raw, tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
