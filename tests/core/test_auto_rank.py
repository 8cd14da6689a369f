"""Ranks from spectra under a budget: arithmetic alone."""

import itertools
import json

import pytest
import torch

from diffscaler_core.auto_rank import RankChoice, Spectrum, allocate, budget_of, rank_at
from diffscaler_core.errors import DiffScalerError


def spectra_of(**layers):
    return {name: Spectrum(tuple(gains), cost) for name, (gains, cost) in layers.items()}


def test_planted_rank_is_found():
    generator = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(40, 5, generator=generator)).Q
    data = torch.randn(500, 5, generator=generator) @ planted.T
    data += 0.02 * torch.randn(500, 40, generator=generator)
    energies = torch.linalg.svdvals(data).square()
    assert rank_at(energies, 0.99) == 5
    assert rank_at(energies, 1.0) == 40


@pytest.mark.parametrize(
    ("energies", "share", "rank"),
    [([1, 9], 0.9, 1), ([1, 9], 0.91, 2), ([0.0, 0.0], 0.9, 0), ([], 0.5, 0), ([3], 1.0, 1)],
)
def test_rank_at_a_share_of_energy(energies, share, rank):
    assert rank_at(energies, share) == rank


def test_no_other_choice_of_the_same_numbers_is_worth_more():
    """Against every choice there is, where units cost the same: greedy is then exact."""
    generator = torch.Generator().manual_seed(1)
    for budget in range(0, 13):
        gains = torch.rand(4, 3, generator=generator).sort(1, descending=True).values.tolist()
        spectra = {f"l{i}": Spectrum(tuple(own), 1) for i, own in enumerate(gains)}
        ranks = allocate(spectra, budget)
        best = max(
            sum(sum(own[:r]) for own, r in zip(gains, chosen, strict=True))
            for chosen in itertools.product(range(4), repeat=4)
            if sum(chosen) <= budget
        )
        assert sum(sum(spectra[n].gains[:r]) for n, r in ranks.items()) == pytest.approx(best)


def test_the_budget_is_never_exceeded_and_what_is_left_buys_nothing():
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        spectra = {
            f"l{i}": Spectrum(
                tuple(torch.rand(6, generator=generator).sort(descending=True).values.tolist()),
                int(torch.randint(3, 40, (1,), generator=generator)),
            )
            for i in range(7)
        }
        budget = int(torch.randint(0, 400, (1,), generator=generator))
        ranks = allocate(spectra, budget)
        spent = sum(spectra[n].cost * r for n, r in ranks.items())
        assert spent <= budget
        assert all(spent + s.cost > budget or ranks[n] == 6 for n, s in spectra.items())


def test_a_unit_is_bought_by_its_worth_per_number():
    spectra = spectra_of(cheap=([1.0, 0.9], 10), dear=([5.0, 0.1], 100))
    assert allocate(spectra, 20) == {"cheap": 2, "dear": 0}
    assert allocate(spectra, 119) == {"cheap": 2, "dear": 0}
    assert allocate(spectra, 120) == {"cheap": 2, "dear": 1}


def test_ties_go_to_the_earlier_layer():
    spectra = spectra_of(a=([1.0, 1.0], 5), b=([1.0, 1.0], 5))
    assert allocate(spectra, 15) == {"a": 2, "b": 1}
    assert allocate(dict(reversed(spectra.items())), 15) == {"b": 2, "a": 1}


def test_what_is_worth_nothing_is_not_bought_and_a_cap_holds():
    spectra = spectra_of(dead=([0.0, 0.0], 1), live=([2.0, 1.0, 0.5], 1))
    assert allocate(spectra, 99) == {"dead": 0, "live": 3}
    assert allocate(spectra, 99, most=2) == {"dead": 0, "live": 2}


@pytest.mark.parametrize(
    ("said", "numbers"),
    [(2, 2 * 30 + 1 * 8), ("3", 3 * 30 + 1 * 8), ("10%", 100 - 20), ("0.1k", 80), ("0.001M", 980)],
)
def test_a_budget_is_a_rank_a_share_or_a_count(said, numbers):
    units, limits = {"wide": 30, "thin": 8}, {"wide": 9, "thin": 1}
    assert budget_of(said, units=units, limits=limits, fixed=20, base=1000) == numbers


@pytest.mark.parametrize("said", [0, -1, "", "auto", "4.5", 4.5, "0%", "nan", "inf", "%", True])
def test_what_is_no_budget_is_refused(said):
    with pytest.raises(DiffScalerError, match="rank_budget must be"):
        budget_of(said, units={"a": 1}, limits={"a": 1}, fixed=0, base=1)


def test_a_budget_that_scales_and_shifts_eat_up_is_refused():
    with pytest.raises(DiffScalerError, match=r"10 numbers; scales and shifts take 9 .* 4 more"):
        budget_of("1%", units={"a": 4}, limits={"a": 9}, fixed=9, base=1000)


def test_a_choice_survives_json():
    spectra = {"a": Spectrum((2.0, 0.25), 12, 0.5), "b": Spectrum((1.0,), 7)}
    choice = RankChoice({"a": 2, "b": 0}, spectra, 31, 64)
    assert RankChoice.of(json.loads(json.dumps(choice.state()))) == choice
    assert (choice.spent, choice.usual) == (24, 2)
    assert choice.kept == pytest.approx(2.25 / 3.25)
    assert choice.confirmed == pytest.approx((0.5 * 2.25 + 1) / 3.25)
    lines = choice.report().splitlines()
    assert lines[0] == choice.summary()
    assert "24 of 31 numbers" in lines[0]
    assert lines[2].split() == ["a", "2", "69.2%", "100%", "2"]
