"""Experts and a router: the paper's equation, which expert a row runs, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffscaler_core import DiffScalerError, UnknownNameError, attach
from diffscaler_core.systems.experts import experts
from diffscaler_core.systems.posterior import MODES, exact_posterior, mixed, weights_of
from diffscaler_core.systems.router import Router
from diffscaler_core.systems.router_training import accuracy_over
from diffscaler_core.training import Objective, sample_latents

from .toy_experts import PARTS, Made, make, nothing


@pytest.fixture(scope="module")
def made() -> Made:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make()
    finally:
        torch.set_num_threads(before)


# --- the equation ---------------------------------------------------------------------------------


def field(x_t: Tensor, points: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[ε | x_t] for data that are these points, written out."""
    logs = torch.stack([-((x_t - alpha * p) ** 2).sum(1) / (2 * sigma**2) for p in points], 1)
    chance = torch.exp(logs - logs.max(1, keepdim=True).values)
    chance = chance / chance.sum(1, keepdim=True)
    return (x_t - alpha * (chance @ points)) / sigma


@pytest.fixture
def clusters() -> list[Tensor]:
    """40 points in 4 clusters of different sizes."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.2 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    sizes = (4, 8, 12, 16)
    return [
        centre + 0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
        for centre, n in zip(centres, sizes, strict=True)
    ]


@pytest.mark.parametrize("sigma", [0.2, 0.4, 0.6])
def test_with_the_exact_posterior_the_mixture_is_the_field_of_all_data(
    clusters: list[Tensor], sigma: float
) -> None:
    alpha = (1 - sigma**2) ** 0.5
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x_t = alpha * torch.cat(clusters) + sigma * noise
    whole = field(x_t, torch.cat(clusters), alpha, sigma)
    own = torch.stack([field(x_t, points, alpha, sigma) for points in clusters])
    posterior = exact_posterior(x_t, clusters, alpha, sigma)
    assert float((mixed(own, posterior) - whole).abs().max()) < 1e-9
    uniform = torch.full_like(posterior, 0.25)  # the mechanism off
    assert float((mixed(own, uniform) - whole).abs().max()) > 0.5
    # without the sizes of the parts it is another field
    evened = posterior / torch.tensor([4.0, 8.0, 12.0, 16.0])
    evened = evened / evened.sum(1, keepdim=True)
    assert float((mixed(own, evened) - whole).abs().max()) > 1e-6


def test_modes_keep_what_they_say() -> None:
    posterior = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.02, 0.95, 0.02, 0.01]])
    assert weights_of(posterior, "top1").tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    top2 = weights_of(posterior, "top2")
    assert torch.allclose(top2[0], torch.tensor([0.625, 0.375, 0, 0]))
    assert torch.equal(weights_of(posterior, "full"), posterior / posterior.sum(1, keepdim=True))
    nucleus = weights_of(posterior, "nucleus")  # the first that hold 0.9
    assert (nucleus > 0).tolist() == [[True, True, True, False], [False, True, False, False]]
    for mode in MODES:
        assert torch.allclose(weights_of(posterior, mode).sum(1), torch.ones(2))
    with pytest.raises(UnknownNameError, match="top1, top2, full, nucleus"):
        weights_of(posterior, "top3")


@pytest.mark.parametrize("kind", ["flow", "flow_reversed", "epsilon"])
def test_noise_levels_are_read_off_the_models_own_clock(kind: str) -> None:
    table = None if kind.startswith("flow") else torch.linspace(0.999, 0.001, 50)
    objective = Objective(kind, 1000.0, table)
    timestep, alpha, sigma = objective.at(torch.tensor([0.1, 0.5, 0.9]))
    for found, expected in zip(objective.levels_of(timestep), (alpha, sigma), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


# --- a router and two experts ---------------------------------------------------------------------


def union(made: Made) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh pictures of both colours, noise and times."""
    x0 = torch.cat([made.fresh[part].latents[0] for part in PARTS])  # type: ignore[index]
    generator = torch.Generator().manual_seed(7)
    return x0, torch.randn(x0.shape, generator=generator), torch.rand(len(x0), generator=generator)


def loss(made: Made, denoiser: object) -> float:
    x0, noise, t = union(made)
    timestep, x_t = made.denoiser.objective.noisy(x0, noise, t)
    with torch.no_grad():
        output = denoiser(x_t, timestep, {})  # type: ignore[operator]
        return float(made.denoiser.objective.loss(output, x0, noise, t).mean())


def test_the_router_knows_at_low_noise_and_guesses_at_pure_noise(made: Made) -> None:
    parts = [made.fresh[part] for part in PARTS]
    found = accuracy_over(made.denoiser, made.router, parts, nothing, (0.05, 0.3, 1.0))
    assert found[0.05] > 0.9
    assert found[0.3] > 0.9
    assert abs(found[1.0] - 0.5) < 0.15
    blind = Router(PARTS, made.router.site, made.router.width)  # the mechanism off: not trained
    torch.nn.init.zeros_(blind.last.weight)
    off = accuracy_over(made.denoiser, blind, parts, nothing, (0.05,))
    assert abs(off[0.05] - 0.5) < 0.15
    assert made.router.facts["accuracy_by_noise"]
    assert made.router.num_parameters < 100


def test_together_they_are_better_on_all_data_than_either_alone(made: Made) -> None:
    alone = {}
    for part, task in made.tasks.items():
        with made.denoiser.attached({part: task}):
            alone[part] = loss(made, made.denoiser)
    found = {}
    for mode in ("top1", "full"):
        with experts(made.denoiser, made.tasks, made.router, nothing, mode) as both:
            found[mode] = loss(made, both.denoiser)
    assert found["top1"] < 0.8 * min(alone.values())
    assert found["full"] < 0.8 * min(alone.values())
    swapped = {"red": made.tasks["blue"], "blue": made.tasks["red"]}  # the router misled
    with experts(made.denoiser, swapped, made.router, nothing) as wrong:
        assert loss(made, wrong.denoiser) > max(alone.values())


def test_each_row_runs_its_own_expert_in_one_forward(made: Made) -> None:
    x0, noise, _ = union(made)
    x0, noise = x0[::16], noise[::16]  # four red, four blue
    t = torch.full((8,), 0.2)
    timestep, x_t = made.denoiser.objective.noisy(x0, noise, t)
    with experts(made.denoiser, made.tasks, made.router, nothing) as both, torch.no_grad():
        made.toy.calls.clear()
        output = both.denoiser(x_t, timestep, {})
        assert made.toy.calls == [8, 8]  # the router's look (it ends at its block) and the forward
        assert both.rows_run == 8
        assert both.chosen is not None
        assert both.chosen.argmax(1).tolist() == [0] * 4 + [1] * 4
        both.denoiser(x_t, timestep, {})
        assert both.switches == 1
        both.denoiser(x_t.flip(0), timestep, {})
        assert both.switches == 2
    for rows, part in ((slice(0, 4), "red"), (slice(4, 8), "blue")):
        with attach(made.toy, made.tasks[part]), torch.no_grad():
            assert torch.allclose(output[rows], made.toy(x_t, timestep)[rows], atol=1e-6)


@pytest.mark.parametrize("most", [None, 5])
def test_the_full_mix_is_the_weighted_sum_of_all_experts(made: Made, most: int | None) -> None:
    x0, noise, _ = union(made)
    t = torch.full((6,), 0.97)
    timestep, x_t = made.denoiser.objective.noisy(x0[61:67], noise[61:67], t)
    with torch.no_grad():
        with experts(
            made.denoiser, made.tasks, made.router, nothing, "full", most_rows=most
        ) as both:
            output = both.denoiser(x_t, timestep, {})
            weights = both.chosen
            assert both.rows_run == 12
        each = []
        for part in PARTS:
            with attach(made.toy, made.tasks[part]):
                each.append(made.toy(x_t, timestep))
    assert weights is not None
    assert 0.01 < float(weights.min()) < 0.5  # so that there is something to mix
    assert torch.allclose(output, mixed(torch.stack(each), weights), atol=1e-5)


def test_guidances_two_halves_are_looked_at_once(made: Made) -> None:
    x0, noise, _ = union(made)
    timestep, x_t = made.denoiser.objective.noisy(x0[:4], noise[:4], torch.full((4,), 0.4))
    with experts(made.denoiser, made.tasks, made.router, nothing) as both, torch.no_grad():
        single = both.denoiser(x_t, timestep, {})
        made.toy.calls.clear()
        double = both.denoiser(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), {})
        assert made.toy.calls == [4, 8]
    assert torch.allclose(double[:4], single, atol=1e-6)
    assert torch.allclose(double[4:], single, atol=1e-6)


def test_samples_are_of_one_colour_each_and_the_base_is_left_as_it_was(made: Made) -> None:
    noise = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    before = made.toy(noise, torch.full((12,), 0.5))
    with experts(made.denoiser, made.tasks, made.router, nothing) as both:
        drawn = sample_latents(both.denoiser, {}, {}, noise, steps=12)
    lean = drawn.mean((2, 3))[:, 0] - drawn.mean((2, 3))[:, 2]
    assert bool((lean.abs() > 0.8).all())  # red or blue, nothing between
    assert bool((lean > 0).any())
    assert bool((lean < 0).any())
    assert torch.equal(made.toy(noise, torch.full((12,), 0.5)), before)


def test_what_does_not_belong_together_is_refused(made: Made) -> None:
    def refused(**changes: object) -> str:
        given = {
            "denoiser": made.denoiser, "tasks": made.tasks, "router": made.router, "mode": "top1",
        }  # fmt: skip
        with (
            pytest.raises(DiffScalerError) as error,
            experts(**{**given, **changes}, told=nothing),  # type: ignore[arg-type]
        ):
            pass
        return str(error.value)

    assert "no task is called 'blue'" in refused(tasks={"red": made.tasks["red"]})
    assert "top1, top2" in refused(mode="best")
    site = made.router.site
    other = type(site)(site.block, site.blocks, site.pool, {"class": "Flux", "fingerprint": "0"})
    assert "was trained on a Flux" in refused(router=Router(PARTS, other, made.router.width))
    deep = type(site)(site.block, 7, site.pool, site.base)
    assert "of 7 of a Toy" in refused(router=Router(PARTS, deep, made.router.width))
    narrow = Router(PARTS, site, 5)
    x = torch.zeros(2, 3, 8, 8)
    with (
        experts(made.denoiser, made.tasks, narrow, nothing) as both,
        pytest.raises(DiffScalerError, match="reads 5 features and the block has 24"),
    ):
        both.denoiser(x, torch.zeros(2), {})
