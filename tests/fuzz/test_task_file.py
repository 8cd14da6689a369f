"""Task files: `load_task`, `read_info`, `read_header`, `outline_task`."""

from __future__ import annotations

from pathlib import Path
from random import Random

from diffscaler_core import load_task, read_info
from diffscaler_core.describe import describe
from diffscaler_core.files import outline_task, read_header

from .good import task_files
from .harness import Target, not_printable
from .slices import check_slice, check_with_hypothesis


def make(rng: Random) -> bytes:
    return rng.choice(task_files()).spoiled(rng)


def run(raw: bytes, folder: Path) -> None:
    path = folder / "case.safetensors"
    path.write_bytes(raw)
    refused = []
    for read in (read_header, read_info, outline_task, load_task):
        try:
            found = read(path)
        except Exception as error:
            refused.append(error)
            continue
        if read is load_task:
            text = describe(found)  # a file that loads can be shown
            assert not_printable(text, "\n") is None, not_printable(text, "\n")
            text.encode()
    for error in refused:  # the last is the strictest one's
        if error is not refused[-1] and type(error).__name__ != "TaskFileError":
            raise error
    if refused:
        raise refused[-1]


TARGET = Target("task_file", make, run)


def test_the_good_files_are_good(tmp_path):
    for good in task_files():
        run(good.raw, tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
