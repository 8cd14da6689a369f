import json
import logging
import math
import os
import sys

import pytest
import torch
from PIL import Image

from diffscaler_core.training.config import TrainingConfig
from diffscaler_core.training.config_file import read_config
from diffscaler_core.training.progress import History, Progress
from diffscaler_core.training.run_folder import RunFolder, read_log

CONFIG = TrainingConfig(name="flowers", steps=10, lr=0.01)
PICTURES = [torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.0)]


def step(number, **more):
    return Progress(number, 10, 0.5 + number, math.nan, rate=2.0, **more)


def begun(path, resumed_at=0):
    folder = RunFolder(path)
    folder.start(CONFIG, {"images": 3}, resumed_at)
    return folder


def test_a_run_leaves_settings_log_samples_and_curve(tmp_path):
    folder = begun(tmp_path / "run")
    for number in range(1, 4):
        folder.log(step(number, validation=0.25 if number == 3 else None))
    sheet = folder.show(3, PICTURES, 2)
    folder.close()
    read = read_config(folder.path / "config.toml", {"base": "b", "data": "d"})
    assert read.config == CONFIG
    lines = [json.loads(line) for line in folder.log_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == 1.5
    assert lines[0]["mean_loss"] is None
    assert lines[0]["bands"] == [None] * 4
    assert "validation" not in lines[0]
    assert lines[2]["validation"] == 0.25
    assert sheet == folder.samples / "step-000003.png"
    with Image.open(sheet) as image:
        assert image.size == (8, 8)
        assert image.getpixel((6, 2)) == (128, 128, 128)
    assert folder.best_file.name == "flowers-best.safetensors"
    assert not list(folder.path.rglob("*.part"))


def test_steps_cost_no_write_each_and_a_checkpoint_brings_the_log_up_to_date(tmp_path):
    folder = begun(tmp_path / "run")
    folder.log(step(1))
    assert not folder.log_file.exists()
    folder.log(step(2, saved=True))
    assert len(read_log(folder.log_file)) == 2


def test_going_on_cuts_the_log_back(tmp_path):
    folder = begun(tmp_path / "run")
    for number in range(1, 8):
        folder.log(step(number))
    folder.close()
    with folder.log_file.open("a") as file:
        file.write('{"step": 8, "lo')  # cut short by a crash
    again = begun(tmp_path / "run", resumed_at=5)
    again.log(step(6))
    again.close()
    assert [line["step"] for line in read_log(again.log_file)] == [1, 2, 3, 4, 5, 6]
    assert len(again.log_file.read_text().splitlines()) == 6
    assert begun(tmp_path / "run").log_file.read_text() == ""


@pytest.mark.parametrize("task", ["../../../evil", "/abs", "a/b", ".."])
def test_a_name_never_leaves_the_folder(tmp_path, task):
    folder = begun(tmp_path / "run")
    sheet = folder.show(1, PICTURES, 3, task)
    assert sheet.resolve().parent == folder.samples.resolve()
    assert folder.best_of(task).resolve().parent == folder.path.resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_disk_that_refuses_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = begun(tmp_path / "file" / "run")  # a folder cannot be made below a file
    with caplog.at_level(logging.WARNING):
        for number in range(1, 4):
            folder.log(step(number, saved=True))
        assert folder.show(3, PICTURES, 2) is None
        assert folder.curve(History()) is None
        folder.close()
    said = [record for record in caplog.records if "cannot be written" in record.message]
    assert len(said) == 1
    assert "training goes on" in said[0].message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full disk")
def test_a_full_disk_costs_no_lines_once_there_is_room(tmp_path):
    folder = begun(tmp_path / "run")
    folder.log_file.symlink_to("/dev/full")
    folder.log(step(1, saved=True))
    folder.log_file.unlink()
    folder.log(step(2, saved=True))
    assert [line["step"] for line in read_log(folder.log_file)] == [1, 2]


def test_only_the_main_process_writes(tmp_path):
    folder = RunFolder(tmp_path / "run", main=False)
    folder.start(CONFIG, {}, 0)
    folder.log(step(1, saved=True))
    assert folder.show(1, PICTURES, 2) is None
    assert folder.curve(History()) is None
    folder.close()
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_is_no_curve_and_no_fuss(tmp_path, monkeypatch, caplog):
    """Inside ComfyUI there is none."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    folder, history = begun(tmp_path / "run"), History()
    history.add(1, 0.5, ())
    assert folder.curve(history) is None
    assert not caplog.records


def test_a_curve_that_cannot_be_drawn_is_one_warning(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    folder = begun(tmp_path / "run")
    assert folder.curve({"flowers": None}) is None
    assert "could not be drawn" in caplog.text
