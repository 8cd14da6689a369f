"""Tiny real bases, and pictures to train on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from diffscaler_core import TaskAdapter, save_task
from diffscaler_core.training import as_denoiser

from .bases import PIPES, Pipe, dit_pipe, sd3_pipe, tiny_vae, unet_pipe, words_of

__all__ = ["PIPES", "Pipe", "dit_pipe", "sd3_pipe", "tiny_vae", "unet_pipe"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small are several times slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c():
    """Ctrl-C does what it does in a terminal: shells have their background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=PIPES)
def denoiser(request):
    return as_denoiser(PIPES[request.param]())


@pytest.fixture
def sd3():
    return as_denoiser(sd3_pipe())


@pytest.fixture
def words() -> TaskAdapter:
    return words_of()


@pytest.fixture
def words_file(words, tmp_path) -> Path:
    return save_task(words, tmp_path / "words.safetensors")


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(3):
            image = Image.new("RGB", (20 + i, 24), colour)
            image.paste((255, 255, 255), (0, 0, 4 + i, 8))
            image.save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def base(sd3, tmp_path, monkeypatch):
    """A folder that `train` takes for a base, with a tiny SD3 in it."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setattr("diffscaler_core.training.command.train.load_base", lambda *a: sd3)
    return folder
