"""The parameter census: counts written down a second time, by hand, from published sizes."""

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("peft", minversion="0.18")

from diffscaler_core import METHODS, find_targets, new_task

ROOT = Path(__file__).resolve().parents[2]
census = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "census.py")))

WIDTH, BLOCKS = 1152, 28
#: (in, out) of one block's layers, in widths: q, k, v, attention's output, MLP, adaLN.
DIT_LAYERS = [(1, 1)] * 4 + [(1, 4), (4, 1), (1, 6)]


def by_hand(rank: int, layers: list[tuple[int, int]]) -> int:
    """2 Σ out + r Σ (in + out), over all blocks of DiT-XL/2."""
    vectors = 2 * sum(out for _, out in layers)
    subspaces = rank * sum(inner + out for inner, out in layers)
    return BLOCKS * WIDTH * (vectors + subspaces)


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    return census.build("DiT-XL/2")


@pytest.mark.parametrize("rank", [4, 8])
def test_dit_xl_2_at_rank_4_lies_in_the_published_band(dit: nn.Module, rank: int) -> None:
    names = [t.name for t in find_targets(dit) if "timestep_embedder" not in t.name]
    task = new_task(dit, rank=1, targets=names)
    assert len(task.layers) == BLOCKS * len(DIT_LAYERS)
    assert census.at_rank(task, rank) == by_hand(rank, DIT_LAYERS)
    fused = [(1, 3), (1, 1), (1, 4), (4, 1), (1, 6)]  # q, k and v in one layer, as the original
    original = 675_129_632  # the original's one embedder for all blocks, of 28 here
    for layers in (DIT_LAYERS, fused) if rank == 4 else ():
        assert 0.003 < by_hand(rank, layers) / original < 0.010
    if rank == 8:  # just above the band: 1.02 % of the original
        assert round(by_hand(rank, fused) / 1e6, 2) == 6.90


def test_the_whole_dit_is_counted_by_hand_too(dit: nn.Module) -> None:
    inside = 2 * WIDTH + sum(inner * out * WIDTH**2 + out * WIDTH for inner, out in DIT_LAYERS)
    inside -= 2 * WIDTH  # its norms have no weights
    times = (256 + 1) * WIDTH + (WIDTH + 1) * WIDTH
    inside += times + 1001 * WIDTH
    ends = (4 * 2 * 2 + 1) * WIDTH + (WIDTH + 1) * 2 * WIDTH + (WIDTH + 1) * 2 * 2 * 8
    assert census.size_of(dit) == BLOCKS * inside + ends


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "subspace" in m.parts])
@pytest.mark.parametrize("family", ["dit", "sd15"])
def test_a_count_at_another_rank_is_the_task_s(
    tiny: Callable[[str], nn.Module], name: str, family: str
) -> None:
    model = tiny(family)
    one = new_task(model, name, 1, "all")
    for rank in (1, 4, 32):  # 32: more than some layers are wide
        assert census.at_rank(one, rank) == new_task(model, name, rank, "all").num_parameters


def test_peft_counts_a_lora_as_we_do(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], nn.Module]
) -> None:
    monkeypatch.setitem(census.theirs.__globals__, "build", lambda _: tiny("sd15").to("meta"))
    rows = {
        method: (layers, count) for method, _, layers, count in census.theirs("", ["to_q", "conv1"])
    }
    targets = find_targets(tiny("sd15"), ["to_q", "conv1"])
    kernels = [torch.Size(t.kernel).numel() for t in targets]
    expected = sum(
        8 * (t.in_features * k + t.out_features) for t, k in zip(targets, kernels, strict=True)
    )
    assert rows["peft lora"] == (len(targets), expected)
    assert rows["peft dora"] == (len(targets), expected + sum(t.out_features for t in targets))
    assert rows["peft ia3"] == (len(targets), sum(t.out_features for t in targets))
