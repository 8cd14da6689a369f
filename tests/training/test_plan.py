import re

import pytest
import torch

from diffscaler_core.training import TrainingConfig, TrainingData, prompts_for
from diffscaler_core.training.command.plan import (
    activation_bytes,
    duration,
    format_plan,
    fresh_task,
    plan_task,
    size_of,
    time_steps,
)

from .bases import words_of


@pytest.fixture
def data(sd3):
    return TrainingData(torch.randn(1, 6, 4, 8, 8), torch.arange(6) % 2, ("red", "pink"))


@pytest.fixture
def prompts(sd3, data):
    return prompts_for(sd3, data.prompts, "learned", words=words_of())


def test_the_figures_are_counted(sd3, data, prompts):
    config = TrainingConfig(steps=30, batch=4, rank=2, ema=0.9)
    plan = plan_task(sd3, config, data, prompts, save_bytes=2)
    task = fresh_task(sd3, config)
    learned = sum(p.numel() for p in prompts.parameters() if p.requires_grad)
    assert plan.trained == task.num_parameters + learned
    assert plan.parts["prompts"] == learned
    scales = sum(own["scale"].numel() for own in task.layers.values())
    assert plan.parts["scale"] == plan.parts["shift"] == scales
    assert plan.layers == len(task.layers)
    assert plan.base_parameters == sum(p.numel() for p in sd3.model.parameters())
    assert plan.base_bytes == 4 * plan.base_parameters
    assert plan.optimizer_bytes == plan.trained * (4 + 4 + 8 + 4)
    assert plan.epochs == 20


def kept_by_autograd(sd3, config, data, prompts, rows):
    """Counts what a real batch keeps, by holding on to it."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in sd3.model.state_dict().values()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with sd3.held(), sd3.attached({"t": fresh_task(sd3, config)}) as trainable:
        trainable.requires_grad_(True)
        x0 = data.latents[0, :rows]
        timestep, x_t = sd3.objective.noisy(x0, x0, torch.full((rows,), 0.5))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = sd3.predict(x_t, timestep, prompts(data.index[:rows]))
            sd3.objective.loss(output, x0, x0, torch.full((rows,), 0.5)).mean()
    return sum(size for size, _ in kept.values())


def test_activations_of_a_batch_are_those_of_one_picture_many_times(sd3, data, prompts):
    config = TrainingConfig(rank=2, batch=6)
    task = fresh_task(sd3, config)
    one = activation_bytes(sd3, config, task, data, prompts)
    real = kept_by_autograd(sd3, config, data, prompts, 6)
    # what does not grow with the batch (folded copies, D's and U's) is counted each time
    assert 0.9 * real < 6 * one < 2.5 * real
    plan = plan_task(sd3, config, data, prompts)
    assert plan.activation_bytes == 6 * one
    accumulated = plan_task(sd3, TrainingConfig(rank=2, batch=6, accumulate=3), data, prompts)
    assert accumulated.activation_bytes == 2 * one
    less = plan_task(sd3, TrainingConfig(rank=2, batch=6, checkpointing=True), data, prompts)
    assert less.activation_bytes < plan.activation_bytes


def test_steps_are_really_timed_and_leave_nothing_behind(sd3, data, prompts):
    before = {name: tensor.clone() for name, tensor in sd3.model.state_dict().items()}
    told = {name: tensor.clone() for name, tensor in prompts.state_dict().items()}
    calls = []
    seconds, peak = time_steps(sd3, TrainingConfig(rank=2, batch=2, steps=1), data, prompts)
    calls.append(seconds)
    assert 0 < seconds < 5
    assert peak is None  # a process on a CPU holds much more than the run
    assert all(torch.equal(before[n], t) for n, t in sd3.model.state_dict().items())
    assert all(torch.equal(told[n], t) for n, t in prompts.state_dict().items())


def test_the_table_says_what_is_estimated_and_what_measured(sd3, data, prompts):
    from dataclasses import replace

    plan = plan_task(sd3, TrainingConfig(name="flowers", rank=2, steps=100), data, prompts)
    text = format_plan([plan])
    assert "time      not measured" in text
    text = format_plan([replace(plan, step_seconds=1.5, peak_bytes=2**30)])
    assert re.search(r"memory +about .* estimated", text)
    assert "peak of 3 real steps: 1.00 GiB, measured" in text
    assert "about 2 min (1.5 s a step, measured over 2 steps on cpu)" in text
    assert len({line.index("  ") for line in text.splitlines() if line[0] != " "}) >= 1
    assert max(map(len, text.splitlines())) < 100


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "3 s"), (600, "10 min"), (11100, "3 h 5 min"), (100, "2 min")]
)
def test_times_and_sizes_read_well(seconds, said):
    assert duration(seconds) == said
    assert [size_of(1536), size_of(3 * 2**20), size_of(5 * 2**30)] == [
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]
