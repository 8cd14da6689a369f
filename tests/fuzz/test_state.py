"""What a run keeps for itself: checkpoints, the cache of encoded pictures, the log."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from random import Random

import torch

from diffscaler_core.training.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint
from diffscaler_core.training.data.cache import Cache, digest_of
from diffscaler_core.training.run_folder import read_log

from .harness import Target
from .mutations import File, spoiled_bytes, spoiled_text
from .slices import check_slice, check_with_hypothesis

KEY = digest_of("picture", 1)
LOG = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null, "bands": [1, 2]}\n'


@functools.cache
def files() -> tuple[File, File]:
    """Returns (checkpoint, cache entry)."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tensors = {"layers/a.up": torch.ones(4, 2), "0/exp_avg": torch.ones(4, 2)}
        saved = save_checkpoint(place, 7, tensors, {"settings": {"lr": 1.0}, "losses": [1, 2]})
        Cache(place).put(KEY, {"x0": torch.ones(4, 2, 2)})
        entry = Cache(place).path(KEY)
        return File(saved.read_bytes(), ["diffscaler.checkpoint"]), File(entry.read_bytes())


def make(rng: Random) -> tuple[str, bytes]:
    kind = rng.choice(("checkpoint", "cache", "log"))
    if kind == "log":
        text = spoiled_text(rng, LOG).encode("utf-8", "surrogatepass")
        return kind, spoiled_bytes(rng, text) if rng.random() < 0.5 else text
    return kind, files()[kind == "cache"].spoiled(rng)


def run(case: tuple[str, bytes], folder: Path) -> None:
    kind, raw = case
    if kind == "log":
        (folder / "log.jsonl").write_bytes(raw)
        assert all(isinstance(entry["step"], int) for entry in read_log(folder / "log.jsonl"))
    elif kind == "cache":  # whatever lies there, reading never fails
        cache = Cache(folder)
        cache.path(KEY).parent.mkdir()
        cache.path(KEY).write_bytes(raw)
        found, shape = cache.get(KEY), cache.shape(KEY)
        assert found is None or shape == found["x0"].shape == (4, 2, 2) or raw != files()[1].raw
    else:
        path = folder / "step-000000007.safetensors"
        path.write_bytes(raw)
        newest = newest_checkpoint(folder)
        assert (read_checkpoint(path).step == newest.step) if newest else True
        read_checkpoint(path)


TARGET = Target("state", make, run)


def setup_module() -> None:
    logging.getLogger("diffscaler_core.training.checkpoints").setLevel(logging.ERROR)


def teardown_module() -> None:
    logging.getLogger("diffscaler_core.training.checkpoints").setLevel(logging.NOTSET)


def test_the_good_files_are_good(tmp_path):
    checkpoint, entry = files()
    for case in (("checkpoint", checkpoint.raw), ("cache", entry.raw), ("log", LOG.encode())):
        run(case, tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
