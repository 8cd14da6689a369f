"""Ranks chosen from the gradient of real bases, and what training makes of them."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from diffscaler_core import load_task, save_task
from diffscaler_core.auto_rank import RankChoice, Spectrum, allocate, rank_at
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.targets import find_targets, resolve
from diffscaler_core.training import (
    Denoiser,
    TaskRun,
    TrainingData,
    as_denoiser,
    choose_ranks,
    prompts_for,
    train_tasks,
    validation_loss,
)
from diffscaler_core.training.advice import about_ranks
from diffscaler_core.training.checkpoints import newest_checkpoint
from diffscaler_core.training.conditioning import new_classes
from diffscaler_core.training.learner import Learner
from diffscaler_core.training.loop import fresh_task
from diffscaler_core.training.objective import Objective
from diffscaler_core.training.rank_chart import placed
from diffscaler_core.training.rank_choice import LOOKS, spectrum_of
from diffscaler_core.training.run_folder import read_log

from .bases import dit_pipe
from .runs import config_of, data_of, same, trained


class Branches(nn.Module):
    """An untrained denoiser of pictures in slices, a layer each: it predicts 0."""

    def __init__(self, count, size):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(size, size) for _ in range(count))
        for block in self.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)

    def forward(self, x):
        slices = x.chunk(len(self.blocks), dim=1)
        return torch.cat([block(x) for block, x in zip(self.blocks, slices, strict=True)], dim=1)


def branches(count, size):
    model = Branches(count, size)
    return Denoiser(model, lambda x, t, told: model(x), Objective("x0"))


def data_from(x0):
    return TrainingData(x0.unsqueeze(0), torch.zeros(len(x0), dtype=torch.long), ("",))


def planted(pictures, size, rank, seed):
    """Pictures (pictures, size) in a subspace of that rank."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q
    return torch.randn(pictures, rank, generator=generator) @ basis.T


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def untouched(model, before):
    after = model.state_dict()
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    return not hooks and all(torch.equal(after[name], before[name]) for name in before)


def test_the_rank_of_the_data_is_read_off_the_gradient():
    denoiser = branches(1, 40)
    data = data_from(planted(64, 40, 5, seed=0))
    choice = choose_ranks(denoiser, data, config_of(batch=16, method="lora", rank_budget=2))
    (spectrum,) = choice.spectra.values()
    assert rank_at(spectrum.gains, 0.99) == 5
    assert choice.ranks == {"blocks.0": 2}
    assert about_ranks(choice) == ()


#: A task that moves two of six layers, by rank 4, at a budget of rank 1 in each.
CONFINED = dict(
    method="lora", rank="auto", rank_budget=1, steps=150, batch=16, lr=2e-2, timesteps="uniform"
)


def test_a_task_confined_to_two_layers_is_learned_better_and_not_with_shuffled_spectra():
    denoiser = branches(6, 16)
    x0, unseen = torch.zeros(64, 96), torch.zeros(32, 96)
    for i in (1, 4):
        both = planted(96, 16, 4, seed=i)
        x0[:, 16 * i : 16 * i + 16], unseen[:, 16 * i : 16 * i + 16] = both[:64], both[64:]
    data, config = data_from(x0), config_of(**CONFINED)
    choice = choose_ranks(denoiser, data, config)
    assert choice.ranks == {f"blocks.{i}": 3 if i in (1, 4) else 0 for i in range(6)}
    assert choice.spent == choice.budget == 6 * 32
    names = list(choice.spectra)
    others = names[1:] + names[:1]
    moved = {n: choice.spectra[other] for n, other in zip(names, others, strict=True)}
    shuffled = dataclasses.replace(choice, ranks=allocate(moved, choice.budget))
    losses = {}
    for name, (rank, ranks) in {
        "even": (1, None), "auto": ("auto", choice), "shuffled": ("auto", shuffled)
    }.items():  # fmt: skip
        run = TaskRun("tiny", data, ranks=ranks)
        task = train_tasks(denoiser, [run], dataclasses.replace(config, rank=rank))["tiny"]
        assert task.num_parameters <= choice.budget
        told = prompts_for(denoiser, data.prompts)
        losses[name] = validation_loss(denoiser, data_from(unseen), told, task)
    assert losses["auto"] < 0.85 * losses["even"], losses
    assert losses["even"] < 0.97 * losses["shuffled"], losses


def test_on_a_real_dit_the_same_numbers_do_more_where_the_gradient_says():
    """The task: to become another DiT, of which two layers are moved by rank 4."""
    denoiser = as_denoiser(dit_pipe())
    teacher = copy.deepcopy(denoiser.model).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(7)
    for name in ("transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_out.0"):
        weight = resolve(teacher, name).weight
        up, down = (torch.randn(size, 4, generator=generator) for size in weight.shape)
        weight += 0.1 * up @ down.T

    def predict(x, timestep, told):
        """The difference: with data of zeros and a prediction of x0, the loss is its square."""
        facts = dict(timestep=timestep, class_labels=told["label"], return_dict=False)
        return (denoiser.model(x, **facts)[0] - teacher(x, **facts)[0])[:, :4]

    denoiser = dataclasses.replace(denoiser, predict=predict, objective=Objective("x0"))
    zeros = torch.zeros(1, 32, 4, 8, 8)
    data = TrainingData(zeros, torch.zeros(32, dtype=torch.long), ("1",))
    losses = []
    for rank in (1, "auto"):
        config = config_of(**{**CONFINED, "rank": rank, "steps": 120, "drop": 0.0})
        task = train_tasks(denoiser, [TaskRun("tiny", data)], config)["tiny"]
        told = prompts_for(denoiser, data.prompts, "labels")
        losses.append(validation_loss(denoiser, data, told, task, times=4))
    assert losses[1] < losses[0], losses


def test_two_passes_find_the_gradient_that_autograd_finds(denoiser, pictures, words):
    """On a transformer and on a U-Net's convolutions: every singular value of the sketch."""
    data, config = data_of(denoiser, pictures), config_of(rank_budget=8, batch=4, drop=0.0)
    choice = choose_ranks(denoiser, data, config, words=words)
    targets = {target.name: target for target in find_targets(denoiser.model)}
    assert set(choice.ranks) == set(targets)
    assert choice.spent <= choice.budget
    for name, spectrum in choice.spectra.items():
        target = targets[name]
        size = target.in_features * torch.Size(target.kernel).numel()
        assert spectrum.cost == size + target.out_features
        assert choice.ranks[name] <= min(size, target.out_features)
    if any(target.kernel for target in targets.values()):
        return
    exact = autograd_spectra(denoiser, data, config, words, targets)
    for name, spectrum in choice.spectra.items():
        ours = torch.tensor(spectrum.gains, dtype=torch.float64)
        theirs = torch.tensor(exact[name].gains[: len(ours)], dtype=torch.float64)
        top = max(float(theirs[0]), 1e-12)
        assert float((ours - theirs).abs().max()) < 5e-3 * top, name


def autograd_spectra(denoiser, data, config, words, targets):
    """The spectra from dL/dW itself, of the same batches."""
    prompts = prompts_for(denoiser, data.prompts, config.prompts, words=words, seed=config.seed)
    weights = {n: resolve(denoiser.model, n).weight for n in targets}
    batches = LOOKS // (2 * config.batch)
    sides = []
    plain = dataclasses.replace(config, name="x", method="scale_shift")
    shift = {"x": fresh_task(denoiser, plain, new_classes(denoiser, prompts))}
    with denoiser.held(), denoiser.attached(shift) as worn:
        for half, own in enumerate(data.split(0.5, config.seed)):
            learner = Learner(TaskRun("x", own), worn, prompts, None, config,
                              denoiser.objective, denoiser.device)  # fmt: skip
            for weight in weights.values():
                weight.requires_grad_(True)
                weight.grad = None
            for step in range(half * batches, (half + 1) * batches):
                drawn = learner.draw(step)
                timestep, x_t = denoiser.objective.noisy(drawn.x0, drawn.noise, drawn.t)
                output = denoiser(x_t, timestep, learner.condition(drawn))
                learner.losses(output, drawn)[0].mean().backward()
            sides.append({n: torch.zeros_like(w) if w.grad is None else w.grad.clone()
                          for n, w in weights.items()})  # fmt: skip
        for weight in weights.values():
            weight.grad = None
    return {n: spectrum_of(sides[0][n], sides[1][n], 1) for n in targets}


def test_what_one_half_does_not_confirm_is_worth_little():
    generator = torch.Generator().manual_seed(0)
    shared, *own = torch.randn(3, 20, 30, generator=generator)
    agreeing = spectrum_of(shared, shared, 50)
    chance = spectrum_of(*own, 50)
    assert agreeing.confirmed == pytest.approx(1.0)
    assert agreeing.total == pytest.approx(float(shared.square().sum()), rel=1e-5)
    assert chance.confirmed < 0.1
    assert list(chance.gains) == sorted(chance.gains, reverse=True)
    assert min(chance.gains) >= 0


def test_too_few_pictures_are_warned_about_with_numbers():
    few = choose_ranks(branches(1, 40), data_from(planted(8, 40, 8, 3)),
                       config_of(batch=16, method="lora", rank_budget=8))  # fmt: skip
    (said, *_) = about_ranks(few)
    assert said.startswith("8 pictures are few to choose ranks up to 8 by")
    chance = RankChoice({"a": 1}, {"a": Spectrum((1.0,), 1, 0.3)}, 9, 100)
    assert "confirms 30%" in about_ranks(chance)[0]
    fine = RankChoice({"a": 4}, {"a": Spectrum((1.0,) * 4, 1, 0.9)}, 9, 8)
    assert about_ranks(fine) == ()


def test_choosing_leaves_no_trace_and_is_deterministic(denoiser, pictures, words):
    before, state = state_of(denoiser.model), torch.random.get_rng_state()
    flags = [p.requires_grad for p in denoiser.model.parameters()]
    data = data_of(denoiser, pictures)
    one, two = (choose_ranks(denoiser, data, config_of(), words=words) for _ in range(2))
    assert one == two
    assert untouched(denoiser.model, before)
    assert [p.requires_grad for p in denoiser.model.parameters()] == flags
    assert all(p.grad is None for p in denoiser.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_exception_while_choosing_leaves_no_trace(sd3, pictures, words):
    before, data, calls = state_of(sd3.model), data_of(sd3, pictures), []

    def breaks(x_t, timestep, told):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sd3.predict(x_t, timestep, told)

    with pytest.raises(KeyboardInterrupt):
        choose_ranks(dataclasses.replace(sd3, predict=breaks), data, config_of(), words=words)
    assert untouched(sd3.model, before)
    assert sd3.model.training


def test_a_layer_of_rank_0_has_no_subspace_and_the_file_holds_that(sd3, pictures, words, tmp_path):
    task = trained(sd3, pictures, words, rank="auto", rank_budget=1, steps=2)
    dead = "transformer.transformer_blocks.1.attn.add_q_proj"  # its output goes nowhere
    assert set(task.layers[dead]) == {"scale", "shift"}
    again = load_task(save_task(task, tmp_path / "auto.safetensors"))
    assert same(again, task)
    facts = again.info["training"]["rank_choice"]
    subspaces = sum(
        t.numel() for own in task.layers.values() for n, t in own.items() if n in ("down", "up")
    )
    assert facts["spent"] == subspaces <= facts["budget"]
    assert again.info["ranks"]["default"] == 1


def test_a_resumed_run_keeps_its_ranks_and_ends_with_the_same_numbers(
    sd3, pictures, words, tmp_path, monkeypatch
):
    settings = dict(rank="auto", rank_budget="60%", steps=6, prompts="learned")
    whole = trained(sd3, pictures, words, **settings)
    folder = tmp_path / "run"
    trained(sd3, pictures, words, lambda p: p.step == 3, folder=folder, **settings)
    state = newest_checkpoint(folder / "checkpoints").facts["tasks"]["tiny"]["ranks"]
    pytest.importorskip("matplotlib")
    assert (folder / "ranks.png").stat().st_size > 1000

    def never(*anything):
        raise AssertionError("ranks were chosen a second time")

    monkeypatch.setattr("diffscaler_core.training.loop.choose", never)
    resumed = trained(sd3, pictures, words, folder=folder, **settings)
    assert same(resumed, whole)
    assert RankChoice.of(state).ranks == {
        name.partition(".")[2]: len(own.get("down", ())) for name, own in whole.layers.items()
    }
    with pytest.raises(DiffScalerError, match="rank_budget 60%, now 3"):
        trained(sd3, pictures, words, folder=folder, **{**settings, "rank_budget": 3})


def test_few_pictures_are_said_at_the_first_step(sd3, pictures, words, tmp_path):
    said = []
    trained(sd3, pictures, words, lambda p: said.append(p.advice), folder=tmp_path,
            rank="auto", rank_budget=2, steps=3)  # fmt: skip
    assert "6 pictures are few to choose ranks" in said[0][0]
    assert said[1:] == [(), ()]
    assert read_log(tmp_path / "log.jsonl")[0]["advice"] == list(said[0])


def test_each_task_of_a_run_gets_the_ranks_it_would_get_alone(sd3, pictures, words):
    data, chosen = data_of(sd3, pictures), {}
    halves = [data.select([0, 1, 2]), data.select([3, 4, 5])]
    runs = [TaskRun(f"t{i}", half, words=words) for i, half in enumerate(halves)]
    config = config_of(rank="auto", rank_budget=2, steps=3)
    tasks = train_tasks(sd3, runs, config, on_ranks=chosen.__setitem__)
    assert list(chosen) == ["t0", "t1"]
    for run in runs:
        assert chosen[run.name] == choose_ranks(sd3, run.data, config, words=words)
        ranks = {n: len(own.get("down", ())) for n, own in tasks[run.name].layers.items()}
        assert ranks == {f"transformer.{n}": r for n, r in chosen[run.name].ranks.items()}


def test_methods_without_subspaces_have_nothing_to_choose(sd3, pictures, words):
    task = trained(sd3, pictures, words, method="bitfit", rank="auto", steps=2)
    assert all(set(own) == {"shift"} for own in task.layers.values())
    with pytest.raises(DiffScalerError, match="'bitfit' has no subspaces"):
        choose_ranks(sd3, data_of(sd3, pictures), config_of(method="bitfit"), words=words)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_budget": "0.0001%"}, "scales and shifts take"),
        ({"shard": True}, "split over devices"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(sd3, pictures, words, changes, said):
    before = state_of(sd3.model)
    with pytest.raises(DiffScalerError, match=said) as caught:
        trained(sd3, pictures, words, rank="auto", **changes)
    assert "\n" not in str(caught.value)
    assert untouched(sd3.model, before)


def test_weights_that_nothing_can_differentiate_are_no_hindrance(sd3, pictures, words):
    """As in a quantised base: the layers compute with their weights, but have none to look at."""
    data = data_of(sd3, pictures)
    usual = choose_ranks(sd3, data, config_of(), words=words)
    for target in find_targets(sd3.model):
        layer = resolve(sd3.model, target.name)
        weight = layer.weight.detach().half().float()  # exactly as int8 would round: once
        layer.weight.data.copy_(weight)
    halved = choose_ranks(sd3, data, config_of(), words=words)
    for target in find_targets(sd3.model):
        layer = resolve(sd3.model, target.name)
        packed = layer.weight.detach().half()
        del layer.weight
        layer.register_buffer("weight", packed)
        layer.forward = lambda x, own=layer: nn.functional.linear(x, own.weight.float(), own.bias)
    hidden = choose_ranks(sd3, data, config_of(), words=words)
    assert hidden == halved
    assert hidden.ranks.keys() == usual.ranks.keys()


def test_the_chart_has_a_row_per_kind_and_a_column_per_block():
    names = ["blocks.0.attn.to_q", "blocks.0.ff.net.2", "blocks.1.attn.to_q", "proj_out"]
    cells, blocks, kinds = placed(names)
    assert (blocks, kinds) == (["block 0", "block 1", ""], ["attn.to_q", "ff.net.2", "proj_out"])
    assert cells == dict(zip(names, [(0, 0), (1, 0), (0, 1), (2, 2)], strict=True))
    _, several, _ = placed(["double.0.q", "single.0.q"])
    assert several == ["double.0", "single.0"]
