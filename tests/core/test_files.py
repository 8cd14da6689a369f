from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from diffscaler_core import (
    METHODS,
    TaskAdapter,
    TaskFileError,
    load_task,
    new_task,
    read_info,
    save_task,
)

from .conftest import filled

FACTS = {"name": "t", "method": "diffscaler"}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_task_comes_back_bit_for_bit(model, method, dtype, tmp_path):
    task = filled(new_task(model, method, rank=3, targets="all", name="Tâche 1", gain=0.3))
    layers = {n: {k: t.to(dtype) for k, t in own.items()} for n, own in task.layers.items()}
    task = task.replace(
        layers=layers,
        info={
            **task.info,
            "prompts": ["a cat", "犬"],
            "training": {"steps": 3, "lr": 1e-3},
            "control": {"kind": "edges", "activation": "identity", "gain": 1.0},
        },
        conditioning={
            "context": torch.randn(2, 3, 4).to(dtype),
            "pooled": torch.randn(2, 5).to(dtype),
        },
        modelspec={"author": "me", "title": "T"},
        extras={f"control.transformer.e.{p}": torch.randn(2, 2) for p in ("up", "down")},
    )
    back = load_task(save_task(task, tmp_path / "t.safetensors"))
    assert back.layers.keys() == task.layers.keys()
    assert all(same(back.layers[name], own) for name, own in task.layers.items())
    assert same(back.conditioning, task.conditioning)
    assert same(back.extras, task.extras)
    for fact, value in task.info.items():
        if fact != "ranks":
            assert back.info[fact] == value
    assert back.modelspec["author"] == "me"
    assert back.name == "Tâche 1"
    again = load_task(save_task(back, tmp_path / "again.safetensors"))
    assert again.info == back.info
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "t.safetensors"
    ).read_bytes()


@settings(
    derandomize=True,
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(length=st.integers(1, 4000))
def test_headers_of_every_length_are_read(length, tmp_path):
    # a header of 128 bytes more or less than a multiple of 256 once looked like a pickle
    task = TaskAdapter({"transformer.a": {"shift": torch.ones(2)}}, {**FACTS, "note": "x" * length})
    assert load_task(save_task(task, tmp_path / "t.safetensors")).info["note"] == "x" * length


@pytest.mark.parametrize("low_byte", [0x80, 0x50])
def test_a_header_whose_length_begins_like_a_pickle_is_read(low_byte, tmp_path):
    path = tmp_path / "t.safetensors"
    for size in range(0, 256, 8):
        facts = {**FACTS, "note": "x" * size}
        save_task(TaskAdapter({"transformer.a": {"shift": torch.ones(2)}}, facts), path)
        if path.read_bytes()[0] == low_byte:
            break
    assert path.read_bytes()[0] == low_byte
    assert load_task(path).name == "t"


def test_safetensors_itself_reads_the_file_and_finds_modelspec(make, tmp_path):
    path = save_task(make(0), tmp_path / "t.safetensors")
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert metadata["diffscaler.format"] == "1"
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.title"] == "task0"
    assert metadata["modelspec.hash_sha256"].startswith("0x")
    assert set(load_file(path)) == {
        f"{layer}.{name}" for layer, own in make(0).layers.items() for name in own
    }


def test_facts_are_read_without_the_tensors(make, tmp_path):
    task = make(0, rank=2)
    path = save_task(task, tmp_path / "t.safetensors")
    info = read_info(path)
    assert info["layers"] == len(task.layers)
    assert info["parameters"] == task.num_parameters
    assert info["bytes"] == path.stat().st_size
    assert info["name"] == "task0"
    assert info["ranks"]["default"] == 2


def test_a_task_loaded_or_made_in_inference_mode_can_be_trained(model, make, tmp_path):
    path = save_task(make(0), tmp_path / "t.safetensors")
    with torch.inference_mode():
        tasks = [load_task(path), new_task(model)]
    assert not any(t.is_inference() for task in tasks for t in task.tensors)


def test_tensors_that_share_memory_are_saved(tmp_path):
    whole, down = torch.randn(6), torch.randn(2, 4)
    layers = {
        f"transformer.{n}": {
            "shift": whole[2 * i : 2 * i + 2],
            "down": down,
            "up": torch.ones(2, 2),
        }
        for i, n in enumerate("qkv")
    }
    back = load_task(save_task(TaskAdapter(layers, FACTS), tmp_path / "t.safetensors"))
    assert all(same(back.layers[name], own) for name, own in layers.items())


ONE = {"transformer.a": {"shift": torch.ones(2)}}
UNSAVABLE = {
    "NaN": (
        TaskAdapter({"transformer.a": {"shift": torch.tensor([1.0, torch.nan])}}, FACTS),
        "NaN",
    ),
    "float64": (
        TaskAdapter({"transformer.a": {"shift": torch.ones(2).double()}}, FACTS),
        "float64",
    ),
    "integers": (TaskAdapter({"transformer.a": {"shift": torch.ones(2).int()}}, FACTS), "int32"),
    "no name": (TaskAdapter(ONE, {"method": "lora"}), "a task has a name"),
    "no method": (TaskAdapter(ONE, {"name": "t"}), "one of the methods"),
    "foreign component": (TaskAdapter({"vae.a": {"shift": torch.ones(2)}}, FACTS), "'vae.a.shift'"),
    "foreign part": (TaskAdapter({"transformer.a": {"gamma": torch.ones(2)}}, FACTS), "gamma"),
    "widths": (
        TaskAdapter({"transformer.a": {"shift": torch.ones(2), "scale": torch.ones(3)}}, FACTS),
        "do not fit",
    ),
    "down alone": (TaskAdapter({"transformer.a": {"down": torch.ones(2, 2)}}, FACTS), "together"),
    "empty": (TaskAdapter({}, FACTS), "is empty"),
    "prompts": (TaskAdapter(ONE, {**FACTS, "prompts": ["a"]}), "names 1 prompts"),
    "unnamed prompts": (
        TaskAdapter(ONE, FACTS, {"context": torch.ones(1, 2, 3)}),
        "names 0 prompts",
    ),
    "NaN fact": (TaskAdapter(ONE, {**FACTS, "lr": float("nan")}), "cannot be written as JSON"),
    "odd fact": (TaskAdapter(ONE, {**FACTS, "lr": torch.ones(1)}), "cannot be written as JSON"),
    "gain": (TaskAdapter(ONE, {**FACTS, "gain": float("inf")}), "'gain' must not be inf"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_could_not_be_loaded_is_not_saved(case, tmp_path):
    task, message = UNSAVABLE[case]
    with pytest.raises(TaskFileError, match=message):
        save_task(task, tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_only_safetensors_are_written(make, tmp_path):
    with pytest.raises(TaskFileError, match=r"must end in \.safetensors"):
        save_task(make(0), tmp_path / "t.pt")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), TaskFileError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    make, tmp_path, monkeypatch, call, error, seen
):
    path = save_task(make(0), tmp_path / "t.safetensors")
    old = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(seen, match="No space left" if seen is TaskFileError else None):
        save_task(make(1), path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_one_clear_error(make, tmp_path):
    (tmp_path / "t.safetensors").mkdir()
    with pytest.raises(TaskFileError, match="could not write"):
        save_task(make(0), tmp_path / "t.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_folders_are_made_and_the_users_umask_counts(make, tmp_path):
    old = os.umask(0o027)
    try:
        path = save_task(make(0), tmp_path / "a" / "b" / "t.safetensors")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_saving_the_same_task_gives_the_same_bytes(make, tmp_path):
    paths = [save_task(make(0), tmp_path / f"{i}.safetensors") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
