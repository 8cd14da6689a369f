"""Where a task's file is looked for, and what is said when it is not there."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscaler_core import TaskFileError, new_task, save_task
from diffscaler_core.hub import find_task_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    return save_task(new_task(model, targets="all"), tmp_path / "tasks" / "mine.safetensors")


def test_a_file_or_the_only_file_of_a_folder_is_found(file: Path) -> None:
    assert find_task_file(file) == file
    assert find_task_file(str(file)) == file
    assert find_task_file(file.parent) == file
    assert find_task_file(file.parent, weight_name=file.name) == file
    assert find_task_file(file.parent.parent, subfolder="tasks") == file


def test_among_several_files_the_plain_name_wins_or_a_choice_is_asked_for(file: Path) -> None:
    shutil.copy(file, file.with_name("other.safetensors"))
    with pytest.raises(TaskFileError, match=r"2 files 'mine.safetensors', .*weight_name="):
        find_task_file(file.parent)
    plain = file.with_name("diffscaler.safetensors")
    shutil.copy(file, plain)
    assert find_task_file(file.parent) == plain
    with pytest.raises(TaskFileError, match=r"no file 'absent\.safetensors'"):
        find_task_file(file.parent, weight_name="absent.safetensors")


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "./absent", "/absent/absent", "a/b/c", "absent"]
)
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "hf_hub_download", None)
    with pytest.raises(TaskFileError, match="no file or folder"):
        find_task_file(name)


def test_only_safetensors_are_read(file: Path) -> None:
    with pytest.raises(TaskFileError, match=r"must end in \.safetensors"):
        find_task_file(file.parent, weight_name="task.bin")


def test_an_empty_cache_and_a_bad_name_give_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(TaskFileError, match="is not in the cache") as caught:
        find_task_file("owner/name", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(TaskFileError, match="neither a local path nor a repository"):
        find_task_file("owner/bad name!", local_files_only=True, cache_dir=tmp_path)


def failure(kind: str) -> Exception:
    errors = pytest.importorskip("huggingface_hub.errors")
    if kind == "ConnectionError":
        return ConnectionError("no route\nto host")
    error = getattr(errors, kind)
    return error.__new__(error)  # their constructors need a web answer, and change by version


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "is not on the Hub, or is private"),
        ("EntryNotFoundError", "has no such file; name another with weight_name="),
        ("RevisionNotFoundError", "has no such revision"),
        ("ConnectionError", "could not be downloaded: no route to host"),
    ],
)
def test_what_the_hub_answers_becomes_one_clear_line(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise failure(kind)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(TaskFileError, match=message) as caught:
        find_task_file("owner/name")
    assert "'owner/name'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_repository_is_downloaded_with_all_that_was_said(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, asked = pytest.importorskip("huggingface_hub"), {}

    def download(*args: Any, **kwargs: Any) -> str:
        asked.update(kwargs, args=args)
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    where = {"subfolder": "s", "revision": "r", "token": "t", "cache_dir": "c"}
    assert find_task_file("owner/name", local_files_only=True, **where) == file
    expected = {"args": ("owner/name", "diffscaler.safetensors"), "local_files_only": True}
    assert asked == {**where, **expected}
