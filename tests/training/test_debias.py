"""Hidden groups (InvDiff): found by a biased model's losses, then served as well as the others."""

import json

import pytest
import torch
from torch import nn

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import (
    Denoiser,
    Objective,
    TaskRun,
    TrainingConfig,
    TrainingData,
    train_task,
    train_tasks,
)
from diffscaler_core.training.debias import GroupTable, find_groups, group_risk, risks
from diffscaler_core.training.hidden_groups import infer_groups, picture_losses
from diffscaler_core.training.launch import Launch

from .runs import same

MANY, FEW = 90, 10


class Constant(nn.Module):
    """A base that says 0 whatever it is shown: all a task can learn is one constant."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        nn.init.zeros_(self.blocks[0].weight)
        nn.init.zeros_(self.blocks[0].bias)

    def forward(self, x):
        return self.blocks[0](x.movedim(1, -1)).movedim(-1, 1)


@pytest.fixture
def constant():
    model = Constant()
    return Denoiser(model, lambda x, t, told: model(x), Objective("x0"), channels=2)


@pytest.fixture
def planted():
    """Of each 100 pictures ten lie elsewhere, at 1 instead of 0; one prompt."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.cat([torch.zeros(MANY), torch.ones(FEW)]).view(-1, 1, 1, 1)
    latents = (middle + 0.05 * torch.randn(100, 2, 1, 1, generator=generator))[None]
    return TrainingData(latents, torch.zeros(100, dtype=torch.long), ("all",))


def config_of(**changes):
    return TrainingConfig(**{
        **dict(method="bitfit", targets=r".*", steps=150, batch=50, lr_scale_shift=2e-2, warmup=0,
               timesteps="uniform", drop=0.0),
        **changes,
    })  # fmt: skip


def risk_gap(constant, data, task):
    """How much worse the few are off than the many, by what the task makes of each picture."""
    from diffscaler_core.training import prompts_for

    with constant.held(), constant.attached({task.name: task}):
        losses = picture_losses(constant, data, prompts_for(constant, data.prompts), times=2)
    return float(losses[MANY:].mean() - losses[:MANY].mean())


def test_the_risk_is_the_formula():
    losses = torch.tensor([1.0, 2.0, 4.0])
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    m = [(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5]  # the third group is not in the batch
    mean = sum(m) / 2
    expected = mean + 0.7 * sum((x - mean) ** 2 for x in m) / 2
    torch.testing.assert_close(group_risk(losses, weights, 0.7), torch.tensor(expected))
    assert risks(losses, weights)[2] == 0


@pytest.mark.parametrize("groups", [2, 4])
def test_a_planted_minority_is_found_prompt_by_prompt(groups):
    generator = torch.Generator().manual_seed(1)
    # the second prompt is ten times as hard: by losses alone it would be the minority
    one = torch.cat([torch.rand(90, generator=generator), 8 + torch.rand(10, generator=generator)])
    losses, index = torch.cat([one, 10 * one.flip(0)]), torch.arange(200) // 100
    weights = find_groups(losses, index, groups)
    torch.testing.assert_close(weights.sum(1), torch.ones(200))
    few = torch.zeros(200, dtype=torch.bool)
    few[90:110] = True

    # those whose groups are, on the whole, worse off than their prompt
    def hard(weights):
        own = [(weights[p] * risks(losses[p], weights[p])).sum(1) for p in (index == 0, index == 1)]
        return torch.cat([risk > 1.5 * risk.mean() for risk in own])

    assert float((hard(weights) == few).float().mean()) >= 0.97
    # switched off (no search), nobody is told from anybody
    even = find_groups(losses, index, groups, steps=0)
    assert float((hard(even) == few).float().mean()) <= 0.91
    for prompt in (0, 1):  # the first group is the one worst off
        own = risks(losses[index == prompt], weights[index == prompt])
        assert own.tolist() == sorted(own.tolist(), reverse=True)


def test_too_few_pictures_of_a_prompt_belong_to_all_groups_alike():
    weights = find_groups(torch.tensor([1.0, 9.0, 1.0]), torch.tensor([0, 0, 1]), 4)
    assert torch.equal(weights, torch.full((3, 4), 0.25))
    with pytest.raises(DiffScalerError, match="not finite"):
        find_groups(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), 2)


def test_the_few_do_as_well_as_the_many_and_without_it_they_do_not(constant, planted, tmp_path):
    usual = train_task(constant, planted, config_of())
    assert risk_gap(constant, planted, usual) > 0.5  # the usual loss serves the many
    run = TaskRun("task", planted, biased=usual)
    told = []
    even = train_tasks(
        constant, [run], config_of(debias=1.0, debias_groups=2), folder=tmp_path / "run",
        on_groups=lambda name, found: told.append((name, found)),
    )["task"]  # fmt: skip
    assert abs(risk_gap(constant, planted, even)) < 0.1
    ((name, table),) = told
    assert name == "task"
    found = table.weights.argmax(1) == 0
    assert float((found == (torch.arange(100) >= MANY)).float().mean()) >= 0.95
    kept = json.loads((tmp_path / "run" / "groups.json").read_text())
    assert kept["groups"] == 2
    assert kept["report"][0].startswith("'all', 100 pictures: ")
    assert [row["id"] for row in kept["pictures"]] == list(planted.image_ids)
    again = GroupTable.of(kept)
    assert torch.equal(again.weights, table.weights)


def test_no_weight_is_the_usual_training_bit_for_bit(constant, planted):
    usual = train_task(constant, planted, config_of(steps=5))
    groups = infer_groups(constant, TaskRun("task", planted), prompts(constant), config_of())
    run = TaskRun("task", planted, groups=groups)
    off = train_tasks(constant, [run], config_of(steps=5, debias=0.0))["task"]
    on = train_tasks(constant, [run], config_of(steps=5, debias=1.0))["task"]
    assert same(off, usual)
    assert not same(on, usual)


def prompts(constant):
    from diffscaler_core.training import prompts_for

    return prompts_for(constant, ("all",))


def test_a_stopped_run_goes_on_with_its_groups_and_a_new_one_looks_again(
    constant, planted, tmp_path
):
    config = config_of(steps=10, debias=1.0, save_every=0)
    asked = []

    def run(folder, **options):
        task = TaskRun("task", planted)
        return train_tasks(
            constant, [task], config, folder=tmp_path / folder,
            on_groups=lambda *found: asked.append(folder), **options,
        )["task"]  # fmt: skip

    whole = run("whole")
    run("parts", on_step=lambda now: now.step == 4)
    assert same(run("parts"), whole)
    assert asked == ["whole", "parts"]
    run("parts", resume="never")
    assert asked[2:] == ["parts"]


def test_two_tasks_in_one_run_have_groups_of_their_own(constant, planted, tmp_path):
    other = TrainingData(-planted.latents, planted.index, planted.prompts)
    runs = [TaskRun("one", planted), TaskRun("two", other)]
    config = config_of(steps=6, debias=1.0)
    together = train_tasks(constant, runs, config, folder=tmp_path)
    for run in runs:
        assert (tmp_path / f"groups-{run.name}.json").is_file()
        alone = train_tasks(constant, [run], config)[run.name]
        layers = zip(together[run.name].layers.values(), alone.layers.values(), strict=True)
        assert all(torch.allclose(a["shift"], b["shift"], atol=1e-6) for a, b in layers)


def test_what_cannot_be_taken_apart_is_refused(constant, planted, monkeypatch):
    def refused(run, said, **changes):
        with pytest.raises(DiffScalerError, match=said):
            train_tasks(constant, [run], config_of(steps=2, debias=1.0, **changes))

    refused(TaskRun("t", planted), "not the sum of its parts", accumulate=2)
    refused(TaskRun("t", planted, prior=planted), "prior pictures belong to no group")
    groups = infer_groups(constant, TaskRun("t", planted), prompts(constant), config_of())
    half = planted.select(range(50))
    refused(TaskRun("t", half, groups=groups), "50 pictures to train on, but groups of 100")
    monkeypatch.setattr(Launch, "processes", 2)
    refused(TaskRun("t", planted), "in one process")
