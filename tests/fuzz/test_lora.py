"""LoRA files: `import_lora`, with PEFT's configuration beside the file or in its header."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random

from diffscaler_core import import_lora, save_task
from diffscaler_core.describe import describe

from .good import lora_files
from .harness import Target, not_printable
from .mutations import spoiled_bytes, spoiled_json
from .slices import check_slice, check_with_hypothesis

PEFT = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": True,
    "alpha_pattern": {"attn.to_q": 4, "^transformer_blocks.0.attn.to_q$": 2},
    "target_modules": ["to_q"],
}


def make(rng: Random) -> tuple[bytes, bytes | None]:
    good = rng.choice(lora_files())
    if rng.random() < 0.3:
        beside = spoiled_json(rng, PEFT).encode("utf-8", "surrogatepass")
        return lora_files()[1].raw, spoiled_bytes(rng, beside) if rng.random() < 0.2 else beside
    return good.spoiled(rng), None


def run(case: tuple[bytes, bytes | None], folder: Path) -> None:
    raw, beside = case
    path = folder / "adapter_model.safetensors"
    if beside is not None:
        (folder / "adapter_config.json").write_bytes(beside)
    path.write_bytes(raw)
    task = import_lora(path)
    save_task(task, folder / "task.safetensors")  # what is imported can be kept
    assert not_printable(describe(task), "\n") is None


def without_header(raw: bytes) -> bytes:
    return raw


TARGET = Target("lora", make, run)


def setup_module() -> None:
    logging.getLogger("diffscaler_core.lora.read").setLevel(logging.ERROR)


def teardown_module() -> None:
    logging.getLogger("diffscaler_core.lora.read").setLevel(logging.NOTSET)


def test_the_good_files_are_good(tmp_path):
    for good in lora_files():
        run((good.raw, None), tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
