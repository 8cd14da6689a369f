"""New classes of a class-conditional base, learned, looked at, resumed, several tasks at once."""

import dataclasses
from typing import Any

import pytest
import torch

from diffscaler_core import DiffScalerError, attach, load_task, new_task
from diffscaler_core.training import (
    TrainingConfig,
    TrainingData,
    as_denoiser,
    prompts_for,
    train_task,
    train_tasks,
    validation_loss,
)
from diffscaler_core.training.command.plan import plan_task
from diffscaler_core.training.conditioning import new_classes
from diffscaler_core.training.learner import TaskRun

from .bases import Pipe, dit_pipe, unet_pipe

NULL, FIRST = 10, 11


def pictures(*names: str, seed: int = 0) -> TrainingData:
    """Four pictures per class, each class about a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(len(names), 4, 1, 1, generator=generator)
    index = torch.arange(len(names)).repeat_interleave(4)
    latents = middles[index] + 0.1 * torch.randn(len(index), 4, 8, 8, generator=generator)
    return TrainingData(latents[None], index, names)


def config(**changes: Any) -> TrainingConfig:
    defaults = dict(steps=30, batch=4, rank=2, warmup=2, lr_prompts=0.1, save_every=0)
    return TrainingConfig(**{**defaults, **changes})


@pytest.fixture
def base() -> Any:
    return as_denoiser(dit_pipe())


def loss(base: Any, data: TrainingData, task: Any = None) -> float:
    prompts = prompts_for(base, data.prompts, "labels", task=task)
    return validation_loss(base, data, prompts, task, times=4)


def test_names_that_the_base_does_not_know_are_new_classes(base: Any) -> None:
    named = dataclasses.replace(base, class_names={"tench": 0, "hen": 8})
    prompts = prompts_for(named, ["hen", "cat", "3", "dog"], "labels")
    assert prompts.label.tolist() == [8, FIRST, 3, FIRST + 1]
    assert new_classes(named, prompts) == ["cat", "dog"]
    assert prompts_for(base, ["flowers"]).label.tolist() == [NULL]
    assert prompts_for(base, ["flowers"], "labels").label.tolist() == [FIRST]
    task = new_task(base.model, "prompts", classes=["dog"])
    assert prompts_for(base, ["cat", "dog"], task=task).label.tolist() == [FIRST + 1, FIRST]


def test_rows_alone_tell_classes_apart(base: Any) -> None:
    data = pictures("red", "3", "blue")
    task = train_task(base, data, config(method="prompts", steps=60))
    assert task.classes == {"red": FIRST, "3": 3, "blue": FIRST + 1}
    assert task.new_classes == ("red", "blue")
    assert task.layers == {}
    assert loss(base, data, task) < 0.995 * loss(base, data)
    rows = task.class_rows("transformer")
    assert len(rows) == 2
    assert all(not torch.allclose(own[0], own[1], atol=1e-3) for own in rows.values())


def test_their_rate_is_that_of_prompts(base: Any) -> None:
    data = pictures("red", "blue")
    still = train_task(base, data, config(steps=3, lr_prompts=1e-12))
    moved = train_task(base, data, config(steps=3))
    name = next(iter(still.extras))
    assert still.extras[name].abs().max() < 1e-9
    assert moved.extras[name].abs().max() > 1e-3


def test_a_run_validates_samples_stops_and_goes_on(base: Any, tmp_path: Any) -> None:
    data, seen = pictures("red", "blue"), []
    settings = dict(steps=6, validation_share=0.25, validate_every=2, sample_steps=2, guidance=2.0)
    whole = train_task(base, data, config(**settings), folder=tmp_path / "a", on_step=seen.append)
    assert seen[-1].validation is not None
    assert len(seen[-1].samples) == 4
    best = load_task(next((tmp_path / "a").rglob("*best.safetensors")))
    assert best.new_classes == ("red", "blue")

    def stop(now: Any) -> bool:
        return now.step == 3

    train_task(base, data, config(**settings), folder=tmp_path / "b", on_step=stop)
    resumed = train_task(base, data, config(**settings), folder=tmp_path / "b")
    assert all(torch.equal(t, resumed.extras[n]) for n, t in whole.extras.items())


def test_tasks_of_one_run_have_classes_of_their_own(base: Any) -> None:
    runs = {
        "one": pictures("red", "blue", seed=1),
        "two": pictures("green", "5", seed=2),
        "none": pictures("7", "8", seed=3),
    }
    settings = config(steps=4)
    tasks = train_tasks(base, [TaskRun(n, data) for n, data in runs.items()], settings)
    for name, data in runs.items():
        alone = train_task(base, data, dataclasses.replace(settings, name=name))
        assert tasks[name].classes == alone.classes
        for key, rows in alone.extras.items():
            torch.testing.assert_close(tasks[name].extras[key], rows, rtol=1e-3, atol=1e-5)
    assert not tasks["none"].extras


def test_going_on_keeps_the_classes_and_adds_more(base: Any) -> None:
    first = train_task(base, pictures("red", "blue"), config(steps=5))
    second = train_task(base, pictures("green", "red"), config(steps=5), task=first)
    assert second.classes == {"red": FIRST, "blue": FIRST + 1, "green": FIRST + 2}
    for name, rows in first.extras.items():
        assert torch.equal(second.extras[name][1], rows[1])  # blue was not shown
        assert not torch.equal(second.extras[name][0], rows[0])
        assert second.extras[name][2].any()


def test_the_plan_counts_them(base: Any) -> None:
    data = pictures("red", "blue", "green")
    plan = plan_task(base, config(), data, prompts_for(base, data.prompts))
    assert plan.parts["classes"] == 3 * 2 * 16


def test_prior_pictures_are_of_known_classes(base: Any) -> None:
    with pytest.raises(DiffScalerError, match=r"classes must be known to the base; .* no 'elk'"):
        train_task(base, pictures("red", "blue"), config(), prior=pictures("2", "elk"))


def test_without_a_task_a_new_class_is_no_class(base: Any) -> None:
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        told, null = (base(x, t, {"label": torch.tensor([i])}) for i in (FIRST, NULL))
        assert torch.equal(told, null)
        task = new_task(base.model, "prompts", classes=["cat"])
        with base.attached({"t": task}), pytest.raises(DiffScalerError, match="no class 12"):
            base(x, t, {"label": torch.tensor([FIRST + 1])})


def test_a_unet_of_classes_trains_with_a_null_class_or_without() -> None:
    plain = unet_pipe()
    torch.manual_seed(0)
    config_of = {k: v for k, v in plain.unet.config.items() if not k.startswith("_")}
    model = type(plain.unet)(**{**config_of, "num_class_embeds": 6})
    base = as_denoiser(Pipe(plain.scheduler, unet=model))
    assert base.fields == ("label",)
    assert not base.guided
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 16, 16, generator=generator)
    data = TrainingData(latents[None], torch.tensor([0, 1, 0, 1]), ("2", "3"))
    with pytest.raises(DiffScalerError, match=r"drop 0\.1 leaves classes out"):
        train_task(base, data, config(steps=1))
    task = train_task(base, data, config(steps=2, drop=0.0))
    assert task.classes == {"2": 2, "3": 3}
    with_null = dataclasses.replace(base, null_label=5, guided=True)
    new = TrainingData(latents[None], torch.tensor([0, 1, 0, 1]), ("red", "3"))
    task = train_task(with_null, new, config(steps=3))
    assert task.classes == {"red": 6, "3": 3}
    assert task.info["class_table"] == {"size": 6, "start": 5}
    with attach(model, task):
        model(latents[:1], torch.tensor([5]), torch.tensor([6]))
