"""A file is overwritten, cut short, replaced or deleted while what it held is in use.

safetensors maps files into memory; then a file that is cut short ends the whole process (SIGBUS).
So each of these runs in a process of its own.
"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffscaler_core import attach, import_lora, load_task, new_task, save_task
from diffscaler_core.training.checkpoints import read_checkpoint, save_checkpoint

from .conftest import Child, needs_fork, number_of, numbered

pytestmark = needs_fork


def overwritten(path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\0" * (path.stat().st_size // 2))


def cut_short(path) -> None:
    os.truncate(path, 100)


def deleted(path) -> None:
    path.unlink()


def copied_over(path) -> None:
    other = path.with_name("other.safetensors")
    save_task(numbered(9, 2048), other)
    shutil.copy(other, path)  # into the same file, as ComfyUI's users do


ACTS = (overwritten, cut_short, deleted, copied_over)


def apart(work) -> None:
    assert Child(work).wait() == 0


@pytest.mark.parametrize("act", ACTS)
def test_a_loaded_task_stays_what_it_was(act, tmp_path):
    path = save_task(numbered(3, 4096), tmp_path / "t.safetensors")

    def work() -> None:
        task = load_task(path)
        act(path)
        assert number_of(task) == 3

    apart(work)


def test_an_attached_task_goes_on(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 64), nn.Linear(64, 64))
    task = new_task(model, targets="all", name="t")
    ones = {n: {k: torch.ones_like(t) for k, t in own.items()} for n, own in task.layers.items()}
    path = save_task(task.replace(layers=ones), tmp_path / "t.safetensors")
    x = torch.randn(2, 2048)

    def work() -> None:
        with attach(model, load_task(path)):
            before = model(x)
            cut_short(path)
            assert torch.equal(model(x), before)

    apart(work)


@pytest.mark.parametrize("act", ACTS)
def test_an_imported_lora_stays_what_it_was(act, tmp_path):
    path = tmp_path / "lora.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q"
    pair = {
        f"{name}.lora_A.weight": torch.ones(4, 8192),
        f"{name}.lora_B.weight": torch.ones(8192, 4),
    }
    save_file(pair, path)

    def work() -> None:
        task = import_lora(path)
        act(path)
        assert all((tensor == 1).all() for tensor in task.tensors)

    apart(work)


def test_a_checkpoint_that_is_read_can_be_deleted_and_cut(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(100_000)}, {})

    def work() -> None:
        found = read_checkpoint(path)
        cut_short(path)
        assert (found.tensors["a"] == 1).all()

    apart(work)


@pytest.fixture
def task_folder(pack, monkeypatch, tmp_path):
    """A folder that ComfyUI finds tasks in, for as long as the test lasts."""
    import folder_paths

    pack.nodes.folders.register_folder()
    paths, endings = folder_paths.folder_names_and_paths["diffscaler"]
    known = ([str(tmp_path), *paths], endings)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffscaler", known)
    return tmp_path


def test_comfyui_keeps_the_task_that_it_loaded(pack, task_folder):
    path = save_task(numbered(3, 4096), task_folder / "changes.safetensors")
    node = pack.nodes.load_task.DiffScalerLoadTask

    def work() -> None:
        (task,) = node.execute("changes.safetensors").result
        cut_short(path)
        assert number_of(task) == 3

    apart(work)


def test_comfyui_sees_a_change_under_a_clock_that_was_set_back(pack, task_folder):
    path = save_task(numbered(3), task_folder / "clock.safetensors")
    os.utime(path, (4_000_000_000, 4_000_000_000))  # long after now
    stamp = pack.nodes.load_task.DiffScalerLoadTask.fingerprint_inputs
    before = stamp("clock.safetensors")
    assert stamp("clock.safetensors") == before
    save_task(numbered(4), path)
    assert stamp("clock.safetensors") != before
    before = stamp("clock.safetensors")
    times = path.stat()
    save_task(numbered(5), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` does
    assert stamp("clock.safetensors") != before
