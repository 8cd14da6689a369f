"""A disk that is full or may not be written: one clear error, and what was there stays."""

from __future__ import annotations

import logging

import pytest
import torch

from diffscaler_core import TaskFileError, load_task, save_task
from diffscaler_core.training.checkpoints import newest_checkpoint, save_checkpoint
from diffscaler_core.training.config import TrainingConfig
from diffscaler_core.training.data.cache import Cache, digest_of
from diffscaler_core.training.run_folder import RunFolder

from .conftest import Child, needs_fork, number_of, numbered


def small(number: int = 1):
    return numbered(number, 64)


def refused(folder, words: str) -> None:
    """Everything that writes meets a disk that refuses; files of before are as they were."""
    path = folder / "t.safetensors"
    with pytest.raises(TaskFileError, match=rf"could not write.*{words}.*nothing was changed"):
        save_task(numbered(2, 4096), path)
    assert number_of(load_task(path)) == 1
    with pytest.raises(OSError, match=words):
        save_checkpoint(folder, 2, {"a": torch.ones(500_000)}, {})
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.step == 1
    assert not [p for p in folder.iterdir() if p.name.endswith(".part")]


def prepare(folder) -> None:
    save_task(small(), folder / "t.safetensors")
    save_checkpoint(folder, 1, {"a": torch.ones(2)}, {})


def test_a_full_disk(small_disk):
    prepare(small_disk)
    refused(small_disk, "No space left")


def test_a_disk_that_may_not_be_written(tmp_path, read_only_disk):
    prepare(tmp_path)
    read_only_disk(tmp_path)
    refused(tmp_path, "Read-only file system")


@needs_fork
def test_a_limit_on_the_size_of_files(tmp_path):
    import resource

    prepare(tmp_path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
        refused(tmp_path, "File too large")

    assert Child(work).wait() == 0


def test_training_goes_on_without_its_cache_and_its_log(small_disk, caplog):
    cache, run = Cache(small_disk / "cache"), RunFolder(small_disk / "run")
    run.start(TrainingConfig(name="t"), {}, 0)
    with caplog.at_level(logging.WARNING):
        for i in range(40):  # fills the disk
            cache.put(digest_of("picture", i), {"x0": torch.full((4, 32, 32), float(i))})
        run._lines = ["x" * 10_000] * 40
        run.flush()
    assert sum("nothing more is cached" in text for text in caplog.messages) == 1
    assert sum("training goes on without it" in text for text in caplog.messages) == 1
    kept = [i for i in range(40) if cache.get(digest_of("picture", i)) is not None]
    assert 0 < len(kept) < 40
    for i in kept:
        assert (cache.get(digest_of("picture", i))["x0"] == i).all()
