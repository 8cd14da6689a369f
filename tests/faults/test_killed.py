"""kill -9 while something is written: the file is the old one or the new one, whole."""

from __future__ import annotations

import random
import time

import torch

from diffscaler_core import export_lora, import_lora, load_task, save_task
from diffscaler_core.training.checkpoints import newest_checkpoint, save_checkpoint

from .conftest import LAYER, Child, needs_fork, number_of, numbered, wait_for

pytestmark = needs_fork
KILLS = 25


def killed(work, ready) -> None:
    """Runs `work` in a process and kills it at some moment after `ready()`."""
    child = Child(work)
    try:
        wait_for(ready)
        time.sleep(random.random() * 0.02)
    finally:
        child.kill()


def only_parts_beside(path) -> None:
    left = [p.name for p in path.parent.iterdir() if p != path]
    assert all(name.startswith(".") and name.endswith(".part") for name in left), left


def test_a_task_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "t.safetensors"
    tasks = [numbered(number) for number in range(8)]
    seen = set()
    for i in range(KILLS):
        before = path.stat().st_ino if path.exists() else None

        def work(first: int = i) -> None:
            while True:
                for task in tasks[first % 8 :] + tasks[: first % 8]:
                    save_task(task, path)

        def replaced(old: int | None = before) -> bool:
            return path.exists() and path.stat().st_ino != old

        killed(work, replaced)
        seen.add(number_of(load_task(path)))
        only_parts_beside(path)
    assert len(seen) > 1  # else nothing was ever replaced


def test_a_checkpoint_is_there_whole_and_leftovers_go(tmp_path):
    def work() -> None:
        step = 0
        while True:
            step += 1
            tensors = {name: torch.full((256, 64), float(step)) for name in "abc"}
            save_checkpoint(tmp_path, step, tensors, {"settings": {"step": step}})

    for _ in range(KILLS):
        killed(work, lambda: newest_checkpoint(tmp_path))
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert {v for t in found.tensors.values() for v in t.unique().tolist()} == {found.step}
        assert found.facts["settings"] == {"step": found.step}
    save_checkpoint(tmp_path, 10**8, {"a": torch.ones(2)}, {})
    assert not list(tmp_path.glob(".*"))


def test_an_exported_lora_is_whole(tmp_path):
    path = tmp_path / "lora.safetensors"
    loras = []
    for number in range(1, 5):
        task = numbered(number)
        own = {k: t for k, t in task.layers[LAYER].items() if k != "scale"}
        loras.append(
            task.replace(layers={LAYER: own}).with_info(
                method="lora", activation="identity", base={"family": "sd3"}
            )
        )

    def work() -> None:
        while True:
            for lora in loras:
                export_lora(lora, path)

    for _ in range(KILLS):
        killed(work, path.exists)
        task = import_lora(path)
        assert len({v for t in task.tensors for v in t.unique().tolist()}) == 1
        only_parts_beside(path)
