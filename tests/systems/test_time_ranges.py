"""Windows: which hidden units act at which noise level, in the core and in training."""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from diffscaler_core import DiffScalerError, TaskFileError, attach, load_task, new_task, save_task
from diffscaler_core import combine_tasks as combined
from diffscaler_core.average import average_tasks
from diffscaler_core.combine import limit_task
from diffscaler_core.describe import describe
from diffscaler_core.files import read_header
from diffscaler_core.lora import export_lora
from diffscaler_core.resize import resize_task
from diffscaler_core.windows import (
    UnitWindows,
    expert_windows,
    joined,
    limited,
    ranges_of,
    sliding_windows,
)

from .timed import OBJECTIVES, one_window, trained

EDGES = (2.0, 0.0, -1.5)


class Toy(nn.Module):
    """A convolution, and Linears on tokens and on one vector a row."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Module()])
        block = self.transformer_blocks[0]
        block.conv = nn.Conv2d(3, 8, 3, padding=1)
        block.to_q, block.to_k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        block.mod = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        block = self.transformer_blocks[0]
        x = block.conv(x).flatten(2).mT
        x = torch.tanh(block.to_q(x)) * block.to_k(x)
        return x + block.mod(x.mean(1)).unsqueeze(1)


def clean() -> nn.Module:
    """The model once more, without what is attached to the other."""
    torch.manual_seed(0)
    return Toy().requires_grad_(False)


@pytest.fixture
def model() -> nn.Module:
    return clean()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def filled(task, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: {k: 0.4 * torch.randn(t.shape, generator=generator) for k, t in own.items()}
        for name, own in task.layers.items()
    }
    return task.replace(layers=layers)


def expert_task(model, rank=8, name="timed", method="diffscaler", seed=0, **more):
    plan = expert_windows(4, EDGES)
    return filled(new_task(model, method, rank, "all", name, windows=plan, **more), seed)


def cut(task, index):
    """What of a task of four experts acts in one range, as a task without windows."""
    layers = {}
    for name, own in task.layers.items():
        share = len(own["down"]) // 4
        units = slice(index * share, (index + 1) * share)
        layers[name] = {**own, "down": own["down"][units], "up": own["up"][:, units]}
    return task.replace(layers=layers).with_info(windows=None)


LEVELS = {0: 5.0, 1: 1.0, 2: -0.5, 3: -9.0}


def close(a, b):
    return (a - b).abs().max() <= 2e-5 * b.abs().max()


@torch.no_grad()
def run(tasks, x, weights=None, level=None):
    model = clean()
    with attach(model, tasks, weights) as a:
        if level is not None:
            a.set_time(level)
        return model(x)


# what windows are


@pytest.mark.parametrize(("rank", "alpha", "beta"), [(96, 4, 0.8), (8, 4, 0.8), (40, 2, 0.5)])
def test_a_sliding_window_has_its_width_and_slides_late(rank, alpha, beta):
    count = 1000 if rank == 96 else 16
    plan = sliding_windows(16, alpha, beta)
    if count == 1000:  # the paper's own table, a step each
        plan = type(plan)("sliding", tuple(float(-i) for i in range(999)), alpha, beta)
    table = UnitWindows(plan.edges, plan.runs(rank)).table
    width = int(beta * rank)
    assert table.shape == (count, rank)
    assert (table.sum(1) == width).all()
    for i, row in enumerate(table):  # the formula, written out
        start = round((i / (count - 1)) ** alpha * (rank - width))
        assert row.nonzero().flatten().tolist() == list(range(start, start + width))
    overlap = table @ table.T
    assert overlap[0, 1] > overlap[0, -1]
    moved = table[:, 0].bool()
    if rank == 96:  # most of the way is done at high noise
        assert overlap[0, 500] - overlap[0, 999] > overlap[0, 0] - overlap[0, 500]
        assert moved.any()


@pytest.mark.parametrize("count", [2, 3, 5, 16])
@pytest.mark.parametrize("rank", [16, 17, 32])
def test_experts_share_no_unit_and_leave_none_out(count, rank):
    plan = expert_windows(count)
    table = UnitWindows(plan.edges, plan.runs(rank)).table
    assert (table.sum(0) == 1).all()
    sizes = table.sum(1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_ranges_are_half_open_and_a_boundary_is_in_one_only(kind, count):
    objective = OBJECTIVES[kind]
    edges = objective.range_edges(count)
    # PPAP: range i is [iT/N, (i+1)T/N), so t = iT/N is in range i; here range 0 is the cleanest
    if kind == "flow":
        steps = torch.cat([torch.linspace(0, 1, 1001), torch.arange(1, count) / count])
        timestep, wanted = steps * 1000, (steps * count + 1e-6).floor().clamp(max=count - 1)
    else:
        timestep = torch.arange(1000)
        firsts = torch.tensor([i * 1000 // count for i in range(1, count)])
        wanted = (timestep[:, None] >= firsts).sum(1)
    found = ranges_of(edges, objective.log_snr_of(timestep))
    assert torch.equal(found, wanted.long())
    assert set(found.tolist()) == set(range(count))
    for i, edge in enumerate(edges):
        assert int(ranges_of(edges, torch.tensor(edge))) == i + 1
        assert int(ranges_of(edges, torch.tensor(edge + 0.01))) == i
    ends = torch.tensor([float("inf"), float("-inf")])
    assert ranges_of(edges, ends).tolist() == [0, count - 1]


def test_windows_of_several_tasks_are_put_on_common_edges():
    one = UnitWindows((2.0, 0.0), ((0, 1, 2), (1, 3, 1)))
    two = UnitWindows((1.0,), ((1, 2, 3),))
    both = joined([one, None, two], [3, 2, 3])
    levels = torch.tensor([9.0, 1.5, 0.5, -3.0])
    want = torch.cat([one.at(levels), torch.ones(4, 2), two.at(levels)], dim=1)
    assert torch.equal(both.at(levels), want)
    cut_off = limited(one, 3, -1.0, 1.0)
    inside = ((levels > -1) & (levels <= 1)).float()[:, None]
    assert torch.equal(cut_off.at(levels), one.at(levels) * inside)


# what runs


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_at_each_level_only_its_own_units_act(model, x, activation):
    task = expert_task(model, activation=activation)
    seen = []
    with attach(model, task) as a, torch.no_grad():
        for index, level in LEVELS.items():
            a.set_time(level)
            seen.append(model(x))
            assert close(seen[-1], run(cut(task, index), x))
    assert not close(seen[0], seen[1])


def test_rows_at_other_levels_and_with_other_tasks(model, x):
    task, other = expert_task(model), filled(new_task(model, rank=3, targets="all", name="b"), 5)
    tasks = {"timed": task, "b": other}
    levels = torch.tensor(list(LEVELS.values()))
    with attach(model, tasks) as a, torch.no_grad():
        a.set_time(levels)
        got = model(x)
        for i in range(4):
            want = run({"timed": cut(task, i), "b": other}, x[i : i + 1])
            assert close(got[i], want[0])
        a.set_rows(["timed", "b", None, {"timed": 0.5, "b": 2.0}])
        got = model(x)
        assert close(got[0], run(cut(task, 0), x[:1])[0])
        assert close(got[1], run(other, x[1:2])[0])
        assert torch.equal(got[2], clean()(x)[2])
        mixed = run({"t": cut(task, 3), "b": other}, x[3:], {"t": 0.5, "b": 2.0})
        assert close(got[3], mixed[0])
        a.set_time(levels[:2])
        with pytest.raises(DiffScalerError, match="2 noise levels are set for 4 rows"):
            model(x)


def test_strength_0_is_the_base_bit_for_bit_and_so_is_a_removed_task(model, x):
    base = clean()(x)
    with attach(model, expert_task(model), 0.0) as a, torch.no_grad():
        assert torch.equal(model(x), base)
        a.set_time(0.0)
        assert torch.equal(model(x), base)
        a.set_weights(1.0)
        assert not torch.equal(model(x), base)
    with torch.no_grad():
        assert torch.equal(model(x), base)


def test_nobody_runs_a_task_without_its_noise_level(model, x):
    with attach(model, expert_task(model)) as a, torch.no_grad():
        with pytest.raises(DiffScalerError, match=r"set_time\(log_snr\) first"):
            model(x)
        a.requires_grad_(True)
        with pytest.raises(DiffScalerError, match=r"set_time\(log_snr\) first"):
            model(x)
        with pytest.raises(DiffScalerError, match="number or"):
            a.set_time(torch.zeros(2, 2))
        a.requires_grad_(False)
        with pytest.raises(DiffScalerError, match="NaN"):
            a.set_time(float("nan"))


def test_masks_in_the_picture_and_windows_go_together(model, x):
    from diffscaler_core.token_layout import TokenLayout

    task = expert_task(model)
    layout = TokenLayout(1, 4, 4, 1, roles=(("transformer_blocks", "image"),))
    everywhere = torch.ones(1, 1, 4, 4)
    with attach(model, task) as a, torch.no_grad():
        a.set_regions({"timed": everywhere}, layout)
        for level in LEVELS.values():
            a.set_time(level)
            masked = model(x)
            a.set_regions(None)
            assert close(masked, model(x))
            a.set_regions({"timed": everywhere}, layout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_another_range_compiles_nothing_anew(model, x):
    torch._dynamo.reset()
    task = expert_task(model)
    with attach(model, task) as a, torch.no_grad():
        a.set_time(5.0)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(x)
        torch._dynamo.utils.counters.clear()
        for i in range(20):
            a.set_time(list(LEVELS.values())[i % 4])
            assert close(compiled(x), model(x))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()


# files, and what a task can become


def test_a_file_keeps_windows_and_readers_without_them_refuse_it(model, x, tmp_path):
    task = expert_task(model)
    path = save_task(task, tmp_path / "timed.safetensors")
    assert read_header(path).metadata["diffscaler.format"] == "2"
    plain = save_task(cut(task, 0).with_info(windows=None), tmp_path / "plain.safetensors")
    assert read_header(plain).metadata["diffscaler.format"] == "1"
    again = load_task(path)
    assert again.windows == task.windows
    assert again.is_timed
    assert "4 ranges, cut at log-SNR 2, 0, -1.5: an expert for each" in describe(again)
    raw = path.read_bytes()  # as if a reader of version 1 had been given it
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(raw.replace(b'"diffscaler.format":"2"', b'"diffscaler.format":"1"'))
    with pytest.raises(TaskFileError, match="tasks without windows"):
        load_task(broken)
    broken.write_bytes(raw.replace(b'"diffscaler.format":"2"', b'"diffscaler.format":"3"'))
    with pytest.raises(TaskFileError, match="format version '3'"):
        load_task(broken)


@pytest.mark.parametrize(
    "facts",
    [
        "no",
        {"edges": []},
        {"edges": [1.0], "units": {"default": [[0, 1, 7]]}},
        {"edges": [0.0, 1.0], "units": {"default": [[0, 1, 8]]}},
        {"edges": [1.0], "units": {"default": [[0, 3, 8]]}},
        {"edges": [1.0], "units": {"default": [[0, 1, -8], [0, 1, 16]]}},
        {"edges": [1.0], "units": {"default": [[0, 1, 8]], "transformer.gone": [[0, 1, 1]]}},
        {"edges": [1.0], "units": {"default": [[0, 1, 8]]}, "more": 1},
    ],
    ids=["text", "none", "count", "rising", "range", "negative", "other layer", "other key"],
)
def test_broken_windows_are_one_clear_error(model, tmp_path, facts):
    task = expert_task(model).with_info(windows=facts)
    with pytest.raises(TaskFileError, match="windows") as caught:
        save_task(task, tmp_path / "t.safetensors")
    assert "\n" not in str(caught.value)
    json.dumps(facts)


def test_what_cannot_be_said_without_noise_levels_is_refused(model, tmp_path):
    task = expert_task(model, method="lora")
    with pytest.raises(DiffScalerError, match="different noise levels"):
        resize_task(task, 4)
    with pytest.raises(DiffScalerError, match="different noise levels"):
        export_lora(task, tmp_path / "l.safetensors")
    with pytest.raises(DiffScalerError, match="windows"):
        average_tasks([task, task.with_info(windows=None)])
    with pytest.raises(DiffScalerError, match="4 experts cannot share 2 hidden units"):
        new_task(model, rank=2, windows=expert_windows(4))
    with pytest.raises(DiffScalerError, match="no hidden units"):
        new_task(model, "bitfit", targets="all", windows=expert_windows(2))


def test_combined_tasks_act_at_the_levels_that_each_did(model, x):
    one = expert_task(model, method="lora", seed=1)
    two = filled(new_task(model, "lora", 3, "all", "two", activation="relu"), 2)
    three = filled(new_task(model, "diffscaler", 2, "all", "three"), 3)
    whole = combined([one, two, three], [1.0, 0.5, 2.0])
    tasks = {"timed": one, "two": two, "three": three}
    weights = {"timed": 1.0, "two": 0.5, "three": 2.0}
    with attach(model, whole) as a, torch.no_grad():
        for level in LEVELS.values():
            a.set_time(level)
            assert close(model(x), run(tasks, x, weights, level))


def test_two_tasks_share_out_the_noise_levels(model, x, tmp_path):
    layout = filled(new_task(model, "lora", 3, "all", "layout"), 2)
    style = filled(new_task(model, "lora", 2, "all", "style"), 3)
    both = combined([layout, style], ranges=[(None, 0.0), (0.0, None)], name="both")
    both = load_task(save_task(both, tmp_path / "both.safetensors"))
    with attach(model, both) as a, torch.no_grad():
        for level, task in ((-0.5, layout), (0.0, layout), (0.5, style)):
            a.set_time(level)
            assert close(model(x), run(task, x))
    with pytest.raises(DiffScalerError, match="only hidden units can be limited"):
        limit_task(expert_task(model), above=0.0)
    with pytest.raises(DiffScalerError, match="need as many of each"):
        combined([layout, style], ranges=[None])


# training


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("by_row", [True, False])
def test_units_outside_their_window_get_no_gradient_at_all(model, x, lean, by_row, monkeypatch):
    if not lean:
        monkeypatch.setattr("diffscaler_core.stack.AffinerStack._is_lean", lambda *a: False)
    task = expert_task(model)
    with attach(model, task) as a:
        a.requires_grad_(True)
        levels = torch.tensor([5.0, 5.0, -0.5, -0.5]) if by_row else torch.tensor(-0.5)
        a.set_time(levels)
        model(x).square().mean().backward()
        acting = [0, 1, 4, 5] if by_row else [4, 5]
        for name, parameter in a.parameters_of("timed").items():
            if name.endswith((".down", ".up")):
                grad = parameter.grad if name.endswith("down") else parameter.grad.T
                size = grad.flatten(1).abs().sum(1)
                moved = {i for i in range(8) if size[i]}
                assert moved
                assert moved <= set(acting)  # relu may have closed one of these


@pytest.mark.parametrize("groups", [False, True])
def test_gradients_by_row_are_those_of_each_row_alone(model, x, groups):
    task, other = expert_task(model), filled(new_task(model, rank=3, targets="all", name="b"), 5)
    levels = torch.tensor(list(LEVELS.values()))
    names = ["timed", "b"]
    with attach(model, {"timed": task, "b": other}) as a:
        a.requires_grad_(True)
        a.set_weights({"timed": 1.0})
        if groups:
            a.set_groups(names)
        a.set_time(levels)
        model(x).square().sum().backward()
        got = {n: p.grad.clone() for n, p in a.parameters_of("timed").items()}
    total = {n: torch.zeros_like(g) for n, g in got.items()}
    for i in range(2 if groups else 4):
        with attach(model, cut(task, i)) as a:
            a.requires_grad_(True)
            model(x[i : i + 1]).square().sum().backward()
            for n, p in a.parameters_of("timed").items():
                units = slice(2 * i, 2 * i + 2)
                room = total[n]
                room = room[units] if n.endswith("down") else room
                room = room[:, units] if n.endswith("up") else room
                room += p.grad
    for n, own in got.items():
        assert close(own, total[n]), n


def test_a_routed_task_beats_an_unrouted_one_of_its_rank():
    """The task asks for the picture, and above t = 0.5 for its negative."""
    edges = OBJECTIVES["epsilon"].range_edges(2)
    plan = expert_windows(2, edges)
    routed, task = trained("epsilon", plan)
    unrouted, _ = trained("epsilon", None)
    same_window, _ = trained("epsilon", plan, change=one_window)
    assert routed < 0.9 * unrouted
    assert same_window > 0.9 * unrouted  # off: all ranges share one window
    sliding, _ = trained(
        "epsilon", sliding_windows(16, 2.0, 0.5, OBJECTIVES["epsilon"].range_edges(16))
    )
    assert sliding < 0.9 * unrouted
    assert task.windows is not None
