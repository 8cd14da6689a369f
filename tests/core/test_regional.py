"""Masked tasks in one pass, against a loop over tokens that is written from the formula."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscaler_core.affiner import Affiner, apply_folded, fold
from diffscaler_core.regional import apply_factors, apply_regional, factors_for, fold_regional
from diffscaler_core.targets import geometry_of

WIDE = {"dtype": torch.float64}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 100 * seed))


def affiner(layer: nn.Module, seed: int, rank: int = 3, parts: str = "sbu", **facts) -> Affiner:
    """A task with parts of "s" (scale), "b" (shift), "u" (subspace)."""
    out, *inner = layer.weight.shape
    return Affiner(
        rand(out, seed=seed) * 0.3 if "s" in parts else None,
        rand(out, seed=seed + 1) * 0.3 if "b" in parts else None,
        rand(rank, *inner, seed=seed + 2) if "u" in parts else None,
        rand(out, rank, seed=seed + 3) * 0.3 if "u" in parts else None,
        **facts,
    )


def several(layer: nn.Module) -> list[Affiner]:
    """Tasks that differ in everything a task may differ in."""
    return [
        affiner(layer, 1, gain=0.5),
        affiner(layer, 5, rank=2, activation="identity", parts="su"),
        affiner(layer, 9, parts="sb", scale_includes_bias=True),
        affiner(layer, 13, rank=1, parts="u"),
    ]


def one_token(task: Affiner, hidden: Tensor, wx: Tensor, bias: Tensor, strengths: Tensor) -> Tensor:
    """What one task changes on one token: its Δ from Wx, without the layer's output."""
    scale, shift, subspace = strengths.tolist()
    change = torch.zeros_like(wx)
    if task.scale is not None:
        base = wx + bias if task.scale_includes_bias else wx
        change += scale * task.scale.double() * base
    if task.shift is not None:
        change += shift * task.shift.double()
    if task.up is not None:
        act = hidden.clamp(min=0) if task.activation == "relu" else hidden
        change += subspace * task.gain * (task.up.double() @ act)
    return change


def by_token(x: Tensor, layer: nn.Linear, tasks, weights: Tensor, gates: Tensor) -> Tensor:
    """The formula for a Linear, token after token; weights (R, K, 3), gates (R, n, K)."""
    x, matrix, bias = x.double(), layer.weight.double(), layer.bias.double()
    out = torch.empty(*x.shape[:-1], len(bias), **WIDE)
    for row, token in itertools.product(*map(range, x.shape[:2])):
        wx = matrix @ x[row, token]
        out[row, token] = wx + bias
        for k, task in enumerate(tasks):
            hidden = wx if task.down is None else task.down.double() @ x[row, token]
            change = one_token(task, hidden, wx, bias, weights[row, k])
            out[row, token] += float(gates[row, token, k]) * change
    return out


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 6).requires_grad_(False)


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, 3, stride=2, padding=1).requires_grad_(False)


def gates_of(rows: int, tokens: int, tasks: int = 4) -> Tensor:
    return torch.rand(rows, tokens, tasks, generator=torch.Generator().manual_seed(7))


def strengths_of(*shape: int) -> Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(8)) * 2 - 0.5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("own_strengths", [False, True])
def test_linear_is_the_formula_token_by_token(
    linear: nn.Linear, rows: int, own_strengths: bool
) -> None:
    tasks, x = several(linear), rand(3, 5, 7)
    weights = strengths_of(3, 4) if own_strengths else strengths_of(4)
    gates = gates_of(rows, 5)
    folded = fold_regional(tasks, linear.bias)
    got = apply_regional(x, linear(x), folded, weights, gates)
    wanted = by_token(x, linear, tasks, weights.expand(3, 4, 3), gates.expand(3, 5, 4))
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)


def test_any_choice_of_parts_is_the_formula(linear: nn.Linear) -> None:
    x, weights = rand(2, 5, 7), strengths_of(2)
    kinds = ["s", "b", "u", "sb", "su", "bu", "sbu"]
    for first, second in itertools.product(kinds, kinds):
        tasks = [affiner(linear, 1, parts=first), affiner(linear, 5, parts=second)]
        folded = fold_regional(tasks, linear.bias)
        for rows in (1, 2):
            gates = gates_of(rows, 5, 2)
            got = apply_regional(x, linear(x), folded, weights, gates)
            wanted = by_token(x, linear, tasks, weights.expand(2, 2, 3), gates.expand(2, 5, 2))
            assert got.shape == wanted.shape
            torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)


def test_a_layer_without_a_bias_and_tasks_in_other_slots(linear: nn.Linear) -> None:
    bare = nn.Linear(7, 6, bias=False).requires_grad_(False)
    tasks, x = several(bare), rand(2, 5, 7)
    weights, gates, slots = strengths_of(6), gates_of(2, 5, 6), [4, 0, 5, 2]
    got = apply_regional(x, bare(x), fold_regional(tasks, None, slots), weights, gates)
    bare.bias = nn.Parameter(torch.zeros(6), requires_grad=False)
    own = weights[slots].expand(2, 4, 3)
    wanted = by_token(x, bare, tasks, own, gates[..., slots])
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)


def test_one_vector_a_row(linear: nn.Linear) -> None:
    tasks, x, weights, gates = several(linear), rand(3, 7), strengths_of(3, 4), gates_of(3, 1)
    got = apply_regional(x, linear(x), fold_regional(tasks, linear.bias), weights, gates)
    wanted = by_token(x.unsqueeze(1), linear, tasks, weights, gates).squeeze(1)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)


def test_one_gate_for_all_tokens_and_rows_that_repeat_or_run_on(linear: nn.Linear) -> None:
    """Rows may fold with something else into the first dimension, or make one run of tokens."""
    tasks, x = several(linear), rand(6, 5, 7)
    folded, weights, gates = fold_regional(tasks, linear.bias), strengths_of(3, 4), gates_of(3, 1)
    every = gates.expand(3, 5, 4).repeat_interleave(2, dim=0)
    wanted = by_token(x, linear, tasks, weights.repeat_interleave(2, dim=0), every)
    repeated = gates.repeat_interleave(2, dim=0)
    got = apply_regional(x, linear(x), folded, weights, repeated, row_repeats=2)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-6)
    run = x.reshape(1, 30, 7)
    flat = every.reshape(1, 30, 4)
    got = apply_regional(run, linear(run), folded, weights, flat, row_repeats=10)
    torch.testing.assert_close(got.double().view(6, 5, 6), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_convolution_is_the_formula_place_by_place(conv: nn.Conv2d, rows: int) -> None:
    tasks, x, weights = several(conv), rand(2, 4, 9, 7), strengths_of(2, 4)
    y = conv(x)
    size = y.shape[-2:]
    gates = torch.rand(rows, 4, *size, generator=torch.Generator().manual_seed(7))
    geometry = geometry_of(conv)
    folded = fold_regional(tasks, conv.bias)
    got = apply_regional(x, y, folded, weights, gates, geometry)
    # a convolution is a Linear on the window under each place
    windows = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    flat = nn.Linear(36, 6).requires_grad_(False)
    flat.weight.data, flat.bias.data = conv.weight.flatten(1), conv.bias
    as_linear = [
        Affiner(
            t.scale,
            t.shift,
            None if t.down is None else t.down.flatten(1),
            t.up,
            activation=t.activation,
            gain=t.gain,
            scale_includes_bias=t.scale_includes_bias,
        )
        for t in tasks
    ]
    every = gates.flatten(2).transpose(1, 2).expand(2, -1, -1)
    wanted = by_token(windows, flat, as_linear, weights, every).transpose(1, 2).view_as(y)
    torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=1e-6)


def test_gates_of_one_are_the_stack_without_regions(linear: nn.Linear, conv: nn.Conv2d) -> None:
    for layer, x in ((linear, rand(3, 5, 7)), (conv, rand(3, 4, 9, 7))):
        tasks, y, weights = several(layer), layer(x), strengths_of(3, 4)
        geometry = geometry_of(layer)
        plain = apply_folded(x, y, fold(tasks, weights, layer.bias), geometry)
        ones = torch.ones(1, 4, 1, 1) if geometry else torch.ones(1, 1, 4)
        got = apply_regional(x, y, fold_regional(tasks, layer.bias), weights, ones, geometry)
        torch.testing.assert_close(got, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_where_gates_are_zero_the_output_is_the_layer_s_bit_for_bit(
    linear: nn.Linear, conv: nn.Conv2d, dtype: torch.dtype
) -> None:
    for layer, x in ((linear, rand(3, 5, 7)), (conv, rand(3, 4, 9, 7))):
        tasks, geometry = several(layer), geometry_of(layer)
        x, y = x.to(dtype), layer(x).to(dtype)
        before = y.clone()
        folded = fold_regional(tasks, layer.bias).to(y.device, dtype)
        for rows in (1, 3):
            gates = gates_of(rows, 5).to(dtype)
            gates[:, 2:] = 0
            if geometry is not None:
                gates = gates.transpose(1, 2).unsqueeze(-1)  # zero from the third row of places on
            got = apply_regional(x, y, folded, torch.ones(4, 3), gates, geometry)
            still, moved = (slice(None), slice(2, None)), (slice(None), slice(0, 2))
            if geometry is not None:
                still, moved = (slice(None), *still), (slice(None), *moved)
            assert torch.equal(got[still], y[still])
            assert not torch.equal(got[moved], y[moved])
            assert torch.equal(y, before)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_small_scales_survive_in_16_bits(linear: nn.Linear, dtype: torch.dtype, bits: int) -> None:
    """1 + a would round to 1 here, for every token alike; y + a y does for half of them only."""
    small = 0.75 * 2.0**-bits
    assert torch.ones((), dtype=dtype) + small == 1
    task = Affiner(torch.full((6,), small), None, rand(2, 7), torch.zeros(6, 2))
    x = rand(4, 200, 7).to(dtype)
    y = linear(x.float()).to(dtype)
    folded = fold_regional([task], None).to(y.device, dtype)
    for gates in (torch.ones(1, 200, 1), torch.ones(4, 200, 1)):
        got = apply_regional(x, y, folded, torch.ones(1, 3), gates.to(dtype))
        moved = (got.double() - y.double()).abs().sum() / (small * y.double()).abs().sum()
        assert 0.7 < float(moved) < 1.6


def test_overflow_in_float16_stays_out_of_places_without_the_task(linear: nn.Linear) -> None:
    task = affiner(linear, 1, parts="u")
    x = rand(1, 2, 7).half() * 30000
    gates = torch.tensor([[[0.0], [1.0]]]).half()
    y = rand(1, 2, 6).half()
    folded = fold_regional([task], None).to(y.device, y.dtype)
    got = apply_regional(x, y, folded, torch.ones(1, 3), gates)
    assert torch.equal(got[0, 0], y[0, 0])


def test_factors_are_made_once_for_many_calls(linear: nn.Linear) -> None:
    tasks, weights, gates = several(linear), strengths_of(4), gates_of(1, 5)
    folded = fold_regional(tasks, linear.bias)
    factors = None
    for seed in range(3):
        x = rand(3, 5, 7, seed=seed)
        y = linear(x)
        factors = factors or factors_for(y, folded, weights, gates)
        kept = [t.clone() for t in factors if t is not None]
        got = apply_factors(x, y, folded, factors)
        assert torch.equal(got, apply_regional(x, y, folded, weights, gates))
        assert all(torch.equal(a, b) for a, b in zip(kept, factors, strict=True))


def test_gradients_reach_the_layers_before(linear: nn.Linear) -> None:
    tasks, weights, gates = several(linear), strengths_of(4), gates_of(2, 5).double()
    folded = fold_regional(tasks, linear.bias).to(torch.device("cpu"), torch.float64)
    layer, x = linear.double(), rand(2, 5, 7).double().requires_grad_()

    def run(x: Tensor) -> Tensor:
        return apply_regional(x, layer(x), folded, weights, gates)

    assert torch.autograd.gradcheck(run, (x,))


def test_a_task_with_nothing_changes_nothing(linear: nn.Linear) -> None:
    x = rand(2, 5, 7)
    y = linear(x)
    folded = fold_regional([Affiner()], linear.bias)
    assert apply_regional(x, y, folded, torch.ones(1, 3), gates_of(1, 5, 1)) is y
