"""Names that lead out of their folder, name a device, or no file at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from diffscaler_core import DiffScalerError, TaskBank, UnknownNameError, new_task, save_task
from diffscaler_core.file_names import MOST_BYTES, harmless, problem_of

DEVICES = ("CON", "con", "NUL.txt", "aux.safetensors", "COM1", "lpt9.x", "PRN ", "CONIN$")
OUT = ("../x", "../../x", "/etc/x", "a/../../x", "..", "a/..", "..\\x", "\\\\host\\share\\x")
NOT_EVERYWHERE = ("a\0b", "a\nb", "C:\\x", "C:x", "a:b", "x.", "a./x", "x/ ", 'a"b', "a|b", "a?b")
LONG = ("a" * 5000, "é" * 150, "a/" * 200 + "\0", "\U00020000" * 80)
NO_NAME = ("", " ", ".", "...", "a/", "/")
NAMES = (*OUT, *NOT_EVERYWHERE, *DEVICES, *LONG, *NO_NAME)


def everything_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_symlink()}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_a_run_s_folder_is_one_harmless_name(name):
    made = harmless(name)
    assert problem_of(made) is None, (made, problem_of(made))
    assert made == os.path.basename(made)
    assert not made.startswith(".")
    assert len(f"{made}-best-12345678.safetensors".encode()) < 255


@pytest.mark.parametrize("name", ["flowers", "my task", "a.b", "控", "İstanbul", "console", "nul1"])
def test_ordinary_names_stay(name):
    assert problem_of(name) is None
    assert harmless(name) == name


def test_the_longest_name_fits_a_file_system(tmp_path):
    (tmp_path / (harmless("\U00020000" * 500) + "-best.safetensors")).touch()
    assert MOST_BYTES < 255


@pytest.mark.parametrize("name", [*OUT, "a/b", "a\0b", "a" * 5000, "", ".", "x.safetensors"])
def test_a_bank_s_names_lead_out_of_no_folder(name, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    save_task(new_task(model, targets="all", name="t"), tmp_path / "secret.safetensors")
    (tmp_path / "bank").mkdir()
    bank = TaskBank(model, tmp_path / "bank")
    for own in (name, f"../{name}", "../secret"):
        with pytest.raises(UnknownNameError):
            bank.need([own])


@pytest.fixture
def output(pack, comfy_base) -> Path:
    return comfy_base / "output"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_saving_a_task_stays_in_the_output_folder(name, pack, output):
    task = new_task(torch.nn.Sequential(torch.nn.Linear(4, 4)), targets="all", name="t")
    # the pack's own copy of the core made no difference to what is written
    before = everything_below(output.parent.parent)
    with pytest.raises(ValueError, match="names no file below") as error:
        pack.nodes.save_task.DiffScalerSaveTask.execute(task, name)
    assert isinstance(error.value, pack.diffscaler_core.DiffScalerError)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert everything_below(output.parent.parent) == before


def test_saving_follows_no_link_out_of_the_output_folder(pack, output, tmp_path):
    task = new_task(torch.nn.Sequential(torch.nn.Linear(4, 4)), targets="all", name="t")
    (output / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="names no file below"):
        pack.nodes.save_task.DiffScalerSaveTask.execute(task, "link/x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_loading_stays_in_the_model_folders(name, pack, comfy_base):
    pack.nodes.folders.register_folder()
    for node in (
        pack.nodes.load_task.DiffScalerLoadTask,
        pack.nodes.import_lora.DiffScalerImportLoRA,
    ):
        for own in (name, f"{name}.safetensors", f"../../../{name}"):
            node.fingerprint_inputs(own)
            with pytest.raises((FileNotFoundError, DiffScalerError, ValueError)) as error:
                node.execute(own)
            assert not isinstance(error.value, UnicodeError)


# "a/.." is the input folder itself
@pytest.mark.parametrize("name", [*sorted({*OUT} - {"a/.."}), "a\0b", "a" * 5000, "C:\\x", "~"])
def test_pictures_come_from_the_input_folder_alone(name, pack, comfy_base):
    with pytest.raises(pack.diffscaler_core.DiffScalerError, match="no folder"):
        pack.nodes.training_data.folder_of(name)


def test_a_link_out_of_the_input_folder_is_not_followed(pack, comfy_base, tmp_path):
    (comfy_base / "input" / "out").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(pack.diffscaler_core.DiffScalerError, match="no folder"):
        pack.nodes.training_data.folder_of("out")


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
def test_a_task_s_name_leads_no_run_out_of_its_folder(name, pack, output):
    """The training node's folder: what its name becomes, as `training_folder.py` makes it."""
    made = output / "diffscaler" / "runs" / f"{pack.nodes.training_folder.harmless(name)}-12345678"
    assert made.resolve().parent == (output / "diffscaler" / "runs").resolve()
