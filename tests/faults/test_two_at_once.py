"""Two processes write the same name at once: one of them wins whole, or each gets its own name."""

from __future__ import annotations

import pytest

from diffscaler_core import load_task, save_task

from .conftest import Child, needs_fork, number_of, numbered, wait_for

pytestmark = needs_fork


def test_a_reader_always_meets_a_whole_file(tmp_path):
    path = tmp_path / "t.safetensors"
    save_task(numbered(0), path)

    def writer(number: int):
        return lambda: [save_task(numbered(number), path) for _ in range(40)]

    children = [Child(writer(number)) for number in (1, 2)]
    seen = {number_of(load_task(path)) for _ in range(60)}
    assert [child.wait() for child in children] == [0, 0]
    assert seen <= {0, 1, 2}
    assert number_of(load_task(path)) in (1, 2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_may_not_be_replaced_is_not(tmp_path):
    path = save_task(numbered(1), tmp_path / "t.safetensors")
    with pytest.raises(FileExistsError):
        save_task(numbered(2), path, replace=False)
    assert number_of(load_task(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_links_two_still_do_not_share_a_name(tmp_path, monkeypatch):
    import os

    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = save_task(numbered(1), tmp_path / "t.safetensors", replace=False)
    with pytest.raises(FileExistsError):
        save_task(numbered(2), path, replace=False)
    assert number_of(load_task(path)) == 1


def test_comfyui_saves_every_task_under_a_name_of_its_own(pack, comfy_base):
    node = pack.nodes.save_task.DiffScalerSaveTask
    start = comfy_base / "start"
    tasks = {n: numbered(n, 64) for n in (1, 2, 3)}

    def writer(number: int):
        def work() -> None:
            wait_for(start.exists)
            for _ in range(5):
                node.execute(tasks[number], "together/t")

        return work

    children = [Child(writer(number)) for number in tasks]
    start.touch()
    assert [child.wait() for child in children] == [0, 0, 0]
    found = [number_of(load_task(p)) for p in (comfy_base / "output" / "together").iterdir()]
    assert sorted(found) == sorted([*tasks] * 5)
