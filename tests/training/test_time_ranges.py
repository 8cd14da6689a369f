"""Experts and sliding windows, trained by the trainer on real bases."""

import pytest
import torch

from diffscaler_core import DiffScalerError, load_task, save_task
from diffscaler_core.training import TaskRun, TrainingData, train_task, train_tasks
from diffscaler_core.windows import ranges_of

from .runs import config_of, farthest


def data_for(denoiser, seed, count=5):
    channels, side = (3, 16) if denoiser.channels == 3 and denoiser.encode is None else (4, 8)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, count, channels, side, side, generator=generator)
    return TrainingData(latents, torch.arange(count) % 2, ("blue", "red"))


@pytest.mark.parametrize("settings", [{"experts": 3}, {"time_route": True, "route_beta": 0.5}])
def test_any_base_trains_them_and_the_file_keeps_them(denoiser, words, settings, tmp_path):
    config = config_of(steps=3, batch=4, rank=4, targets="blocks", **settings)
    task = train_task(denoiser, data_for(denoiser, 0), config, words=words)
    assert task.is_timed
    assert task.windows.edges == denoiser.objective.range_edges(len(task.windows.edges) + 1)
    assert task.info["gain"] == (2.0 if "time_route" in settings else 1.0)
    again = load_task(save_task(task, tmp_path / "t.safetensors"))
    assert again.windows == task.windows
    for key, value in settings.items():
        assert again.info["training"][key] == value


def test_only_units_of_the_times_that_were_drawn_are_trained(sd3, words):
    # no noise level above t = 0.5 is drawn, so the second expert stays as it began
    config = config_of(steps=4, batch=4, rank=4, experts=2, timesteps="logit_normal",
                       timestep_mean=-4.0, timestep_std=0.1, timestep_uniform=0.0)  # fmt: skip
    start = train_task(sd3, data_for(sd3, 0), config_of(steps=1, batch=4, rank=4, experts=2,
        timesteps="logit_normal", timestep_mean=-4.0, timestep_std=0.1, timestep_uniform=0.0,
        lr=1e-12), words=words)  # fmt: skip
    task = train_task(sd3, data_for(sd3, 0), config, words=words)
    moved = 0.0
    for name, own in task.layers.items():
        if "down" in own:
            assert not own["up"][:, 2:].any()
            assert torch.allclose(own["down"][2:], start.layers[name]["down"][2:], atol=1e-6)
            moved += float(own["up"][:, :2].abs().sum())
    assert moved > 0
    off = train_task(sd3, data_for(sd3, 0), config_of(steps=4, batch=4, rank=4,
        timesteps="logit_normal", timestep_mean=-4.0, timestep_std=0.1), words=words)  # fmt: skip
    assert any(own["up"][:, 2:].any() for own in off.layers.values() if "up" in own)


def test_tasks_in_one_run_equal_runs_of_their_own(sd3, words):
    config = config_of(steps=5, batch=4, rank=4, experts=2)
    runs = [TaskRun(name, data_for(sd3, i), words=words) for i, name in enumerate("abc")]
    together = train_tasks(sd3, runs, config)
    for i, name in enumerate("abc"):
        own = config_of(steps=5, batch=4, rank=4, experts=2, name=name)
        alone = train_task(sd3, data_for(sd3, i), own, words=words)
        assert farthest(together[name], alone) < 1e-5
        assert together[name].windows == alone.windows


def test_a_call_lies_in_the_range_of_its_own_time(denoiser):
    t = torch.linspace(0.01, 0.99, 30)
    timestep, _, _ = denoiser.objective.at(t)
    edges = denoiser.objective.range_edges(4)
    found = ranges_of(edges, denoiser.objective.log_snr_of(timestep))
    assert found.tolist() == (t * 4).floor().long().tolist()


def test_what_cannot_be_meant_is_refused(sd3, words):
    with pytest.raises(DiffScalerError, match="choose one"):
        config_of(experts=2, time_route=True)
    with pytest.raises(DiffScalerError, match="time_route a rank"):
        config_of(experts=2, rank="auto")
    with pytest.raises(DiffScalerError, match="route_beta"):
        config_of(time_route=True, route_beta=0.0)
    plain = train_task(sd3, data_for(sd3, 0), config_of(steps=1, rank=4), words=words)
    with pytest.raises(DiffScalerError, match="leave out experts and time_route"):
        train_task(sd3, data_for(sd3, 0), config_of(steps=1, experts=2), task=plain, words=words)
