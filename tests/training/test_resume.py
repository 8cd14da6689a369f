"""A run that was stopped, killed or refused by the disk goes on to the same numbers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from diffscaler_core import load_task
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import TrainingConfig
from diffscaler_core.training.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint

from .runs import same, trained


def checkpoints(folder):
    return sorted((folder / "checkpoints").glob("*.safetensors"))


def stop_at(step, how="return"):
    def on_step(progress):
        if progress.step == step and how == "interrupt":
            raise KeyboardInterrupt
        if progress.step == step and how == "error":
            raise RuntimeError("the host stopped")
        return progress.step == step

    return on_step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "prompts": "learned", "schedule": "cosine_restarts", "restarts": 2},
        {"accumulate": 2, "perturb": "gaussian", "precision": "bf16", "validation_share": 0.3},
    ],
    ids=["plain", "ema, learned prompts", "accumulated, perturbed, bf16, validated"],
)
def test_a_resumed_run_ends_with_the_numbers_of_an_uninterrupted_one(
    sd3, pictures, words, tmp_path, changes
):
    whole = trained(sd3, pictures, words, steps=12, **changes)
    folder = tmp_path / "run"
    half = trained(sd3, pictures, words, stop_at(7), folder=folder, steps=12, **changes)
    assert half.info["training"]["steps_done"] == 7
    assert not same(half, whole)
    seen = []
    resumed = trained(
        sd3, pictures, words, lambda p: seen.append(p.step), folder=folder, steps=12, **changes
    )
    assert seen == list(range(8, 13))
    assert same(resumed, whole)
    assert resumed.info["training"]["loss"] == whole.info["training"]["loss"]


@pytest.mark.parametrize("how", ["return", "interrupt", "error"])
def test_whatever_ends_a_run_between_two_steps_loses_nothing(sd3, pictures, words, tmp_path, how):
    folder = tmp_path / "run"
    expected = pytest.raises(RuntimeError, match="the host stopped")
    with expected if how == "error" else contextlib.nullcontext():
        trained(sd3, pictures, words, stop_at(5, how), folder=folder, save_every=0)
    assert newest_checkpoint(folder / "checkpoints").step == 5


def test_a_finished_run_is_given_back_without_training(sd3, pictures, words, tmp_path):
    folder = tmp_path / "run"
    first = trained(sd3, pictures, words, folder=folder, steps=3)
    steps = []
    again = trained(sd3, pictures, words, lambda p: steps.append(1), folder=folder, steps=3)
    assert same(first, again)
    assert not steps
    longer = trained(sd3, pictures, words, lambda p: steps.append(1), folder=folder, steps=5)
    assert len(steps) == 2
    assert longer.info["training"]["steps_done"] == 5


def test_never_starts_anew_and_leaves_no_older_run_behind(sd3, pictures, words, tmp_path):
    folder = tmp_path / "run"
    trained(sd3, pictures, words, folder=folder, steps=6)
    trained(sd3, pictures, words, stop_at(2), folder=folder, steps=6, resume="never")
    assert [path.name for path in checkpoints(folder)] == ["step-000000002.safetensors"]


def test_the_folder_of_another_run_is_refused(sd3, pictures, words, tmp_path):
    folder = tmp_path / "run"
    trained(sd3, pictures, words, folder=folder, steps=2)
    with pytest.raises(DiffScalerError, match=r"another run \(rank 2, now 4\).*resume 'never'"):
        trained(sd3, pictures, words, folder=folder, steps=4, rank=4)


def test_other_rates_are_taken_and_told(sd3, pictures, words, tmp_path, caplog):
    folder = tmp_path / "run"
    trained(sd3, pictures, words, folder=folder, steps=2)
    trained(sd3, pictures, words, folder=folder, steps=4, lr=2e-2)
    assert "lr 0.01, now 0.02" in caplog.text


def test_few_checkpoints_are_kept_and_the_log_has_each_step_once(sd3, pictures, words, tmp_path):
    folder = tmp_path / "run"
    trained(sd3, pictures, words, stop_at(7), folder=folder, steps=9, save_every=2, keep=2)
    assert [p.name[5:14] for p in checkpoints(folder)] == ["000000006", "000000007"]
    trained(sd3, pictures, words, folder=folder, steps=9, save_every=2)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_a_broken_checkpoint_is_told_and_the_one_before_it_taken(
    sd3, pictures, words, tmp_path, caplog
):
    folder = tmp_path / "run"
    whole = trained(sd3, pictures, words, folder=tmp_path / "whole", steps=8)
    trained(sd3, pictures, words, stop_at(6), folder=folder, steps=8, save_every=3)
    last = checkpoints(folder)[-1]
    last.write_bytes(last.read_bytes()[:-100])
    assert same(trained(sd3, pictures, words, folder=folder, steps=8), whole)
    assert "cannot be read" in caplog.text


def test_a_full_disk_is_told_once_and_training_goes_on(
    sd3, pictures, words, tmp_path, monkeypatch, caplog
):
    import diffscaler_core.training.checkpoints as module

    def refuse(path, data):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    trained(sd3, pictures, words, stop_at(2), folder=folder, steps=6, save_every=2)
    kept = checkpoints(folder)[0].read_bytes()
    monkeypatch.setattr(module, "write_whole", refuse)
    task = trained(sd3, pictures, words, folder=folder, steps=6, save_every=2)
    assert task.info["training"]["steps_done"] == 6
    assert "No space left on device" in caplog.text
    assert checkpoints(folder)[0].read_bytes() == kept


def test_a_checkpoint_holds_no_pickle_and_can_be_read_by_safetensors(tmp_path):
    save_checkpoint(tmp_path, 3, {"a": torch.ones(2)}, {"note": 1})
    found = newest_checkpoint(tmp_path)
    assert (found.step, found.facts["note"], found.tensors["a"].tolist()) == (3, 1, [1, 1])
    (tmp_path / "step-000000004.safetensors").write_bytes(b"\x80\x04pickle")
    assert newest_checkpoint(tmp_path).step == 3
    with pytest.raises(DiffScalerError, match="cannot be read"):
        read_checkpoint(tmp_path / "step-000000004.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_every_optimiser_resumes_exactly(sd3, pictures, words, tmp_path, optimizer):
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    changes = {"steps": 8, "optimizer": optimizer}
    whole = trained(sd3, pictures, words, **changes)
    trained(sd3, pictures, words, stop_at(4), folder=tmp_path, **changes)
    assert same(trained(sd3, pictures, words, folder=tmp_path, **changes), whole)


def test_an_optimiser_that_is_not_installed_is_one_line(sd3, pictures, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DiffScalerError, match="pip install bitsandbytes"):
        trained(sd3, pictures, words, optimizer="adamw8bit")


#: A run on a base of four Linears, which starts in a second: no diffusers, no accelerate.
RUN = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
torch.set_num_threads(1)
from diffscaler_core.training import Denoiser, Objective, TrainingConfig, TrainingData, train_task

class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x, t, condition):
        x = x.flatten(1)
        for block in self.blocks:
            x = torch.nn.functional.silu(block(x) + t[:, None])
        return x.view(-1, 1, 4, 4)

torch.manual_seed(0)
base = Base()
data = TrainingData(torch.randn(1, 6, 1, 4, 4), torch.zeros(6, dtype=torch.long), ("red",))
config = TrainingConfig(steps=int(sys.argv[2]), batch=4, rank=4, save_every=1, targets="all")
train_task(Denoiser(base, base, Objective("flow")), data, config, folder=sys.argv[1],
    on_step=lambda p: print(p.step, flush=True))
"""


@pytest.fixture
def process(tmp_path):
    """Starts a training in a process of its own."""
    started = []

    def start(folder, steps=100_000):
        arguments = [sys.executable, "-c", RUN, str(folder), str(steps)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=env)
        started.append(child)
        for line in child.stdout:
            if line.strip().isdigit():
                break
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.slow
def test_kill_9_at_random_moments_always_leaves_a_checkpoint_that_loads(process, tmp_path):
    """The process dies between any two instructions, most of them spent writing checkpoints."""
    folder, rng, last = tmp_path / "run", random.Random(0), 0
    child = process(folder)
    for _ in range(KILLS):
        time.sleep(rng.uniform(0.0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = newest_checkpoint(folder / "checkpoints")
        newest = checkpoints(folder)[-1]
        assert found.path == newest, "the newest file itself must be whole"
        assert found.step > last
        last = found.step
        child = process(folder)


KILLS = int(os.environ.get("DIFFSCALER_KILLS", "3"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(process, tmp_path, name):
    folder = tmp_path / "run"
    child = process(folder)
    time.sleep(0.1)
    child.send_signal(getattr(signal, name))
    steps = [int(line) for line in child.stdout if line.strip().isdigit()]
    assert child.wait(20) == (143 if name == "SIGTERM" else 0)
    assert newest_checkpoint(folder / "checkpoints").step == (steps[-1] if steps else 1)


def test_the_best_task_is_kept_as_a_file(sd3, pictures, words, tmp_path):
    seen = []
    trained(
        sd3,
        pictures,
        words,
        lambda p: seen.append((p.step, p.validation)),
        folder=tmp_path,
        steps=12,
        validate_every=3,
        validation_share=0.3,
    )
    values = {step: value for step, value in seen if value is not None}
    assert list(values) == [3, 6, 9, 12]
    best = load_task(tmp_path / "tiny-best.safetensors").info["training"]
    assert best["steps_done"] == min(values, key=values.get)
    assert best["best_validation_loss"] == pytest.approx(min(values.values()), abs=1e-5)


def test_settings_have_a_name_for_what_is_wrong():
    with pytest.raises(DiffScalerError, match="accumulate 3 must divide the batch of 8"):
        TrainingConfig(accumulate=3)
