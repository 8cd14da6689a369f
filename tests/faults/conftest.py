"""Processes to be killed, small disks, and tasks that say which one they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from diffscaler_core import TaskAdapter

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
LAYER = "transformer.transformer_blocks.0.attn.to_q"


def numbered(number: int, width: int = 512) -> TaskAdapter:
    """A task whose every number, and whose trigger, is `number`."""
    tensors = {
        "scale": torch.full((width,), float(number)),
        "down": torch.full((16, width), float(number)),
        "up": torch.full((width, 16), float(number)),
    }
    info = {"name": "n", "method": "diffscaler", "activation": "relu", "trigger": str(number)}
    return TaskAdapter({LAYER: tensors}, info)


def number_of(task: TaskAdapter) -> int:
    """Which task it is; fails for one that is put together of two."""
    (number,) = {value for tensor in task.tensors for value in tensor.unique().tolist()}
    assert task.info["trigger"] == str(int(number))
    return int(number)


class Child:
    """A forked process that runs a function; it imports nothing, so it starts at once."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)

    def kill(self) -> None:
        """Ends it as a power cut would."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def wait(self) -> int:
        """Returns its exit status; of one that died of a signal, minus that."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def _mount(*arguments: str) -> bool:
    if sys.platform != "linux":
        return False
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.name == "nt"
        or os.geteuid()
        or not _mount("-t", "tmpfs", "-o", "size=128k", "x", str(disk))
    ):
        pytest.skip("only root may mount a small disk; a limit on file sizes is tested instead")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder a disk that nobody may write to, root neither."""
    mounted = []

    def lock(folder: Path) -> None:
        bound = os.name != "nt" and not os.geteuid() and _mount("--bind", str(folder), str(folder))
        if bound:
            mounted.append(folder)
        if not bound or not _mount("-o", "remount,bind,ro", str(folder)):
            pytest.skip("only root may mount a read-only disk, and root may write everywhere else")

    yield lock
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
