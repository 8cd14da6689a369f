import logging
import math

import pytest
import torch

tracking = pytest.importorskip("accelerate.tracking")

from diffscaler_core import DiffScalerError  # noqa: E402
from diffscaler_core.training.command.tracking import (  # noqa: E402
    Tracker,
    check_tracker,
    numbers,
    start_tracker,
)
from diffscaler_core.training.progress import Progress  # noqa: E402


class Kept(tracking.GeneralTracker):
    """A tracker of accelerate's own kind that keeps what it is given."""

    name = "kept"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir=None, **more):
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.settings, self.values, self.done = {}, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step):
        self.values.append((step, values))

    def finish(self):
        self.done = True


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    return start_tracker("kept", "flowers", tmp_path / "tracker", {"lr": 0.1, "targets": ["a"]})


def step(number, **more):
    return Progress(number, 25, 0.5, 0.6, bands=(0.1, math.nan, 0.3, 0.4), **more)


def test_every_tenth_step_and_each_validation_arrives(kept):
    for number in range(1, 26):
        kept.log(step(number, validation=0.7 if number == 13 else None))
    kept.close()
    assert [number for number, _ in kept.tracker.values] == [1, 10, 13, 20, 25]
    assert kept.tracker.settings == {"lr": 0.1, "targets": "['a']"}
    assert kept.tracker.done


def test_numbers_are_finite_and_named_by_task():
    values = numbers(step(3, task="ink", validation=0.7))
    assert values["ink/loss"] == 0.5
    assert values["ink/validation_loss"] == 0.7
    assert values["ink/loss_noise_75_100"] == 0.4
    assert all(map(math.isfinite, values.values()))
    assert not any("25_50" in name for name in values)


def test_a_service_that_fails_is_one_warning(caplog):
    class Broken(Kept):
        def log(self, values, step):
            raise ConnectionError("no network")

    tracker = Tracker(Broken("x"))
    with caplog.at_level(logging.WARNING):
        for number in (1, 10, 20):
            tracker.log(step(number))
    assert caplog.text.count("no network") == 1


def test_what_is_not_installed_is_one_line(monkeypatch):
    with pytest.raises(DiffScalerError, match="knows no tracker 'quill'"):
        check_tracker("quill")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(DiffScalerError, match="pip install tensorboard"):
        check_tracker("tensorboard")


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX" if not _has_tensorboard() else "tensorboard")
    tracker = start_tracker("tensorboard", "flowers", tmp_path, {"lr": 0.1, "name": "x"})
    tracker.log(step(10, samples=[torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]))
    tracker.close()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*tfevents*"))
    assert b"loss_mean" in written
    assert b"samples" in written
    assert not tracker._warned


def _has_tensorboard():
    import importlib.util

    return importlib.util.find_spec("tensorboard") is not None
