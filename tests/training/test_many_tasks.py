"""Several tasks in one run on one frozen base: each becomes what a run of its own makes of it."""

import pytest
import torch

from diffscaler_core import load_task, save_task
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import (
    DivergedError,
    TaskRun,
    TrainingData,
    as_denoiser,
    train_task,
    train_tasks,
)

from .runs import config_of, farthest, same

NAMES = ("one", "two", "three", "four")


def data_for(seed, channels=4, side=8, count=5):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, count, channels, side, side, generator=generator)
    return TrainingData(latents, torch.arange(count) % 2, ("blue", "red"))


def runs_for(words, **changes):
    return [TaskRun(name, data_for(i), words=words, **changes) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.9, "prompts": "learned", "accumulate": 2},
        {"method": "scale_shift"},
        {"method": "lora", "perturb": "gaussian"},
    ],
    ids=["diffscaler", "ema, learned prompts, accumulated", "scale_shift", "lora, perturbed"],
)
def test_four_tasks_in_one_run_equal_four_separate_runs(sd3, words, changes):
    config = config_of(steps=6, batch=4, **changes)
    together = train_tasks(sd3, runs_for(words), config)
    assert list(together) == list(NAMES)
    for i, name in enumerate(NAMES):
        alone = train_task(
            sd3, data_for(i), config_of(steps=6, batch=4, name=name, **changes), words=words
        )
        assert farthest(together[name], alone) < 1e-5
    assert not same(together["one"], together["two"])


@pytest.mark.parametrize("kind", ["dit", "unet2d"])
def test_other_architectures_too(kind):
    from .conftest import PIPES

    config = config_of(steps=4, batch=3)
    channels, side = (4, 8) if kind == "dit" else (3, 16)
    runs = [TaskRun(n, data_for(i, channels, side)) for i, n in enumerate(NAMES[:3])]
    base = as_denoiser(PIPES[kind]())
    together = train_tasks(base, runs, config)
    effects = []
    for run in runs:
        # What a task does, not its numbers: a key's shift, say, has no gradient but rounding, of
        # which Adam makes whole steps.
        alone = effect(base, train_tasks(base, [run], config)[run.name])
        torch.testing.assert_close(effect(base, together[run.name]), alone, rtol=0, atol=1e-5)
        effects.append(alone)
    assert float((effects[0] - effects[1]).abs().max()) > 1e-3


@torch.no_grad()
def effect(base, task):
    """Returns what the base predicts with the task on, for fixed inputs."""
    channels, side = (3, 16) if base.channels == 3 and base.encode is None else (4, 8)
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(4))
    condition = {"label": torch.tensor([0, 1])} if base.fields else {}
    with base.held(), base.attached({task.name: task}):
        return base.predict(x, torch.tensor([100, 700]), condition)


def test_a_task_depends_on_its_own_pictures_alone_bit_for_bit(sd3, words):
    config = config_of(steps=5, batch=4)
    first, second = runs_for(words)[:2]
    other = TaskRun("two", data_for(77), words=words)
    one = train_tasks(sd3, [first, second], config)
    two = train_tasks(sd3, [first, other], config)
    assert same(one["one"], two["one"])
    assert not same(one["two"], two["two"])


def test_tasks_may_have_seeds_validation_and_starting_points_of_their_own(sd3, words):
    config = config_of(steps=4, batch=4, validate_every=2)
    start = train_task(sd3, data_for(9), config_of(steps=2, name="old"), words=words)
    seen = {}
    runs = [
        TaskRun("one", data_for(0), words=words, seed=1, validation=data_for(5)),
        TaskRun("two", data_for(0), words=words, seed=2, task=start),
    ]
    tasks = train_tasks(
        sd3, runs, config, on_step=lambda p: seen.setdefault(p.task, []).append(p.validation)
    )
    assert [value is not None for value in seen["one"]] == [False, True, False, True]
    assert seen["two"] == [None] * 4
    assert tasks["one"].info["training"]["seed"] == 1
    assert tasks["two"].name == "two"
    assert start.name == "old"
    alone = train_task(
        sd3,
        data_for(0),
        config_of(steps=4, batch=4, name="one", seed=1),
        words=words,
        validation=data_for(5),
    )
    assert tasks["one"].info["training"]["validation_loss"] == pytest.approx(
        alone.info["training"]["validation_loss"], rel=1e-4
    )


def test_pictures_of_different_sizes_run_in_passes_of_their_own(sd3, words):
    config = config_of(steps=3, batch=4)
    runs = [
        TaskRun("one", data_for(0), words=words),
        TaskRun("two", data_for(1, side=4), words=words),
        TaskRun("three", data_for(2), words=words),
    ]
    together = train_tasks(sd3, runs, config)
    for run in runs:
        assert farthest(together[run.name], train_tasks(sd3, [run], config)[run.name]) < 1e-5


def test_a_run_of_several_tasks_resumes(sd3, words, tmp_path):
    config = config_of(steps=6, batch=4, ema=0.9)
    whole = train_tasks(sd3, runs_for(words), config)
    train_tasks(sd3, runs_for(words), config, folder=tmp_path, on_step=lambda p: p.step == 3)
    resumed = train_tasks(sd3, runs_for(words), config, folder=tmp_path)
    assert all(same(resumed[name], whole[name]) for name in NAMES)
    with pytest.raises(DiffScalerError, match="another run"):
        train_tasks(sd3, runs_for(words)[:2], config, folder=tmp_path)


def test_one_that_diverges_ends_the_run_with_all_good_states(sd3, words):
    bad = data_for(1)
    bad.latents[:] = float("inf")
    runs = [TaskRun("one", data_for(0), words=words), TaskRun("two", bad, words=words)]
    with pytest.raises(DivergedError, match="of task 'two' became nan at step 1") as caught:
        train_tasks(sd3, runs, config_of(steps=3))
    assert list(caught.value.tasks) == ["one", "two"]


def test_two_of_one_name_are_refused(sd3, words):
    with pytest.raises(DiffScalerError, match="different names"):
        train_tasks(sd3, [runs_for(words)[0]] * 2, config_of())


def test_each_task_is_a_file_of_its_own(sd3, words, tmp_path):
    tasks = train_tasks(sd3, runs_for(words), config_of(steps=2, batch=2))
    for name, task in tasks.items():
        again = load_task(save_task(task, tmp_path / f"{name}.safetensors"))
        assert again.name == name
        assert same(task, again)


def test_the_base_is_there_once(sd3, words):
    """K tasks add their own parameters and no copy of the base."""
    held = []
    before = {id(p) for p in sd3.model.parameters()}

    def look(progress):
        held.append({id(p) for p in sd3.model.parameters()})

    train_tasks(sd3, runs_for(words), config_of(steps=1, batch=2), on_step=look)
    assert all(now == before for now in held)
