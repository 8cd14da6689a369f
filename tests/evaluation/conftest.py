"""Pictures drawn by the repository's own script, and the pocket base."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffscaler_core import TaskAdapter, load_task
from diffscaler_core.evaluation import FeatureNet, load_features
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.training import Denoiser, as_denoiser

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "assets" / "pocket"


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


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Callable[..., Path]:
    """Gives a folder of drawn pictures, one sub-folder per word; drawn once for equal arguments."""
    made: dict[tuple, Path] = {}

    def draw(name: str, per_word: int, words: tuple[str, ...] = (), seed: int = 0) -> Path:
        key = (name, per_word, words, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(name) / name
            command = [sys.executable, ROOT / "pocket" / "draw.py", "--out", folder, "--set", name]
            command += ["--per-word", per_word, "--seed", seed]
            command += ["--words", *words] if words else []
            result = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, check=False
            )
            if "no font" in result.stderr:
                pytest.skip(result.stderr)
            assert result.returncode == 0, result.stderr
            made[key] = folder
        return made[key]

    return draw


@pytest.fixture(scope="session")
def net() -> FeatureNet:
    return load_features(POCKET / "features.safetensors")


@pytest.fixture(scope="session")
def pocket() -> Denoiser:
    return as_denoiser(load_pipeline(POCKET))


@pytest.fixture(scope="session")
def words() -> TaskAdapter:
    return load_task(POCKET / "diffscaler" / "words.safetensors")


@pytest.fixture(scope="session")
def ink() -> TaskAdapter:
    return load_task(POCKET / "diffscaler" / "ink.safetensors")
