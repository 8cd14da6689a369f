"""TaskBank on a plain model, with real files; the plugin's side is in tests/diffusers."""

from __future__ import annotations

import threading

import pytest
import torch

from diffscaler_core import DiffScalerError, TaskBank, UnknownNameError, new_task, save_task

from .conftest import filled, hooks_of, reference_task

NAMES = [f"task{i}" for i in range(6)]


@pytest.fixture
def tasks(model):
    return {n: filled(new_task(model, rank=2, name=n), i) for i, n in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path, tasks):
    for name, task in tasks.items():
        save_task(task, tmp_path / f"{name}.safetensors")
    return tmp_path


def size_of(task):
    return sum(t.nbytes for own in task.layers.values() for t in own.values())


def close(a, b):
    return (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.no_grad()
def test_tasks_are_loaded_by_name_and_the_one_used_longest_ago_makes_room(model, x, folder, tasks):
    before, one = model(x), size_of(tasks["task0"])
    bank = TaskBank(model, folder, device_bytes=3 * one, host_bytes=2 * one + one // 2)
    assert bank.names == tuple(NAMES)
    assert bank.at_hand == ()
    for name in ("task0", "task1", "task2", "task0", "task3"):
        bank.activate(name)
        assert close(model(x), reference_task(model, [tasks[name]], [1.0])(x))
        assert bank.device_bytes_held <= 3 * one
    assert bank.at_hand == ("task2", "task0", "task3")
    assert bank.statistics.evicted == 1
    assert (bank.statistics.hits, bank.statistics.from_files) == (1, 4)
    assert len(bank.in_memory) == 2  # as many as the budget holds
    bank.activate("task1")  # evicted from the model, and from memory
    assert bank.statistics.from_files == 5
    bank.release()
    assert hooks_of(model) == []
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_rows_of_a_bank_equal_separate_runs(model, x, folder, tasks):
    bank = TaskBank(model, folder)
    base = model(x)
    for rows in (
        ["task4", None, "task1"],
        ["task1", "task1", "task5"],
        [None, None, {"task2": 0.5}],
    ):
        with bank.rows(rows):
            got = model(x)
        for i, row in enumerate(rows):
            mix = {row: 1.0} if isinstance(row, str) else row or {}
            if not mix:
                assert torch.equal(got[i], base[i])
                continue
            want = reference_task(model, [tasks[n] for n in mix], list(mix.values()))(x)
            assert close(got[i], want[i])
        assert torch.equal(model(x), base)
    bank.release()


@torch.no_grad()
def test_random_use_under_a_small_budget_never_goes_wrong(model, x, tasks):
    generator = torch.Generator().manual_seed(0)
    bank = TaskBank(model, tasks, device_bytes=4 * size_of(tasks["task0"]))
    wanted = {n: reference_task(model, [task], [1.0])(x) for n, task in tasks.items()}
    for _ in range(40):
        chosen = [NAMES[int(i)] for i in torch.randint(0, 6, (3,), generator=generator)]
        with bank.rows(chosen):
            got = model(x)
        assert all(close(got[i], wanted[name][i]) for i, name in enumerate(chosen))
        assert bank.device_bytes_held <= bank.device_bytes
        assert set(chosen) <= set(bank.at_hand)
    assert bank.statistics.evicted > 0
    assert 0 < bank.statistics.hit_rate < 1


def test_an_active_task_is_not_evicted_by_rows(model, x, tasks):
    one = size_of(tasks["task0"])
    bank = TaskBank(model, tasks, device_bytes=2 * one)
    bank.activate("task0")
    for name in ("task1", "task2", "task3"):
        with bank.rows([name] * 3):
            model(x)
        assert "task0" in bank.at_hand
    with pytest.raises(DiffScalerError, match=r"3 tasks need .* MiB at once .*device_bytes"):
        bank.need(["task1", "task2"])


def test_more_than_fits_unknown_names_and_broken_files_change_nothing(model, x, folder, tasks):
    bank = TaskBank(model, folder, device_bytes=2 * size_of(tasks["task0"]))
    bank.activate("task0")
    now = model(x)
    (folder / "broken.safetensors").write_bytes(b"nonsense")
    stranger = new_task(torch.nn.Sequential(torch.nn.Linear(3, 3)), targets="all", name="stranger")
    save_task(stranger, folder / "stranger.safetensors")
    for names, error in (
        (["task1", "task2", "task3"], DiffScalerError),
        (["task1", "nobody"], UnknownNameError),
        (["../task1"], UnknownNameError),
        (["broken"], DiffScalerError),
        (["task1", "stranger"], DiffScalerError),
    ):
        with pytest.raises(error):
            bank.need(names)
        assert bank.at_hand == ("task0",)
        assert torch.equal(model(x), now)


def test_no_folder_is_one_clear_error(model, tmp_path):
    with pytest.raises(DiffScalerError, match=r"no folder .* to take tasks from"):
        TaskBank(model, tmp_path / "nowhere")


def test_prefetch_comes_from_any_thread(model, folder):
    bank = TaskBank(model, folder)
    threads = [threading.Thread(target=bank.prefetch, args=([name],)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bank.in_memory) == NAMES
    bank.need(NAMES)
    assert bank.statistics.from_files == 0
    assert bank.statistics.from_memory == 6


def test_at_hand_means_the_models_own_dtype(model, folder, x):
    bank = TaskBank(model.bfloat16(), folder)
    bank.activate("task0")
    own = bank._seat._attached.parameters_of("task0")
    assert {p.dtype for n, p in own.items() if n.endswith((".up", ".down"))} == {torch.bfloat16}
    assert {p.dtype for n, p in own.items() if n.endswith((".scale", ".shift"))} == {torch.float32}
    assert model(x.bfloat16()).isfinite().all()
