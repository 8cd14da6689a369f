"""Any safetensors file: `diffscaler info`, as text, as values and as a row of a table."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from diffscaler_core.describe_file import describe_file, file_row, file_values

from .good import lora_files, other_files, task_files
from .harness import Target, not_printable
from .slices import check_slice, check_with_hypothesis


def make(rng: Random) -> bytes:
    return rng.choice((*task_files(), *lora_files(), *other_files())).spoiled(rng)


def run(raw: bytes, folder: Path) -> None:
    path = folder / "case.safetensors"
    path.write_bytes(raw)
    texts = [
        describe_file(path, layers=True),
        json.dumps(file_values(path, layers=True), allow_nan=False),
        *file_row(path),
    ]
    for text in texts:
        assert not_printable(text, "\n") is None, not_printable(text, "\n")


TARGET = Target("info", make, run)


def test_the_good_files_are_good(tmp_path):
    for good in (*task_files(), *lora_files(), *other_files()):
        run(good.raw, tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
