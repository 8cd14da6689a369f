import math

import pytest
import torch

from diffscaler_core.errors import UnknownNameError
from diffscaler_core.training.objective import (
    KINDS,
    Objective,
    band_means,
    chain_weights,
    combine,
    convert,
    draw_times,
    log_snr,
    loss_weights,
    noise_band,
    separate,
    shift_for,
    shifted,
)

BARS = torch.linspace(0.9999, 0.002, 1000, dtype=torch.float64) ** 2


def some(seed=0, shape=(5, 3, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x0, noise


def test_flow_starts_at_data_and_ends_at_noise():
    x0, noise = some()
    x0, noise = x0.float(), noise.float()
    objective = Objective("flow", 1000.0)
    for t, expected in ((0.0, x0), (1.0, noise)):
        timestep, x_t = objective.noisy(x0, noise, torch.full((5,), t))
        assert torch.equal(x_t, expected)
        assert torch.equal(timestep, torch.full((5,), 1000 * t))


def test_flow_target_is_the_velocity_of_the_path():
    x0, noise = some()
    objective, step = Objective("flow"), 1e-4
    t = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    (_, before), (_, after) = (objective.noisy(x0, noise, s) for s in (t, t + step))
    target = combine("flow", x0, noise, 1 - t, t)
    torch.testing.assert_close((after - before) / step, target, rtol=1e-6, atol=1e-6)
    assert torch.equal(combine("flow_reversed", x0, noise, 1 - t, t), -target)


def test_reversed_flow_runs_its_clock_backwards():
    objective = Objective("flow_reversed", 1.0)
    timestep, alpha, sigma = objective.at(torch.tensor([0.0, 0.25, 1.0]))
    assert timestep.tolist() == [1.0, 0.75, 0.0]
    assert sigma.tolist() == [0.0, 0.25, 1.0]
    assert alpha.tolist() == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_ddpm_agrees_with_the_scheduler(kind):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(prediction_type={"v": "v_prediction"}.get(kind, kind))
    x0, noise = (tensor.float() for tensor in some())
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    objective = Objective(kind, alphas_cumprod=scheduler.alphas_cumprod)
    timestep, x_t = objective.noisy(x0, noise, t)
    assert timestep.tolist() == [0, 100, 500, 900, 999]
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, timestep))
    _, alpha, sigma = objective.at(t)
    target = combine(kind, x0, noise, alpha, sigma)
    expected = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, timestep)
    torch.testing.assert_close(target, expected)


def test_the_v_target_ends_at_noise_and_at_minus_data():
    x0, noise = some()
    one, zero = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    assert torch.equal(combine("v", x0, noise, one, zero), noise)
    assert torch.equal(combine("v", x0, noise, zero, one), -x0)


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_conversions_agree_with_the_definitions(old, new, path):
    x0, noise = some()
    sigma = torch.tensor([0.01, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    alpha = 1 - sigma if path == "flow" else (1 - sigma**2).sqrt()
    a, s = alpha.view(5, 1, 1, 1), sigma.view(5, 1, 1, 1)
    x_t = a * x0 + s * noise
    naive = {
        "x0": x0, "epsilon": noise, "v": a * noise - s * x0,
        "flow": noise - x0, "flow_reversed": x0 - noise,
    }  # fmt: skip
    torch.testing.assert_close(convert(naive[old], old, new, x_t, alpha, sigma), naive[new])


def test_separate_recovers_data_and_noise_at_the_end_points():
    x0, noise = some()
    for kind, a, s in (("flow", 1.0, 0.0), ("flow", 0.0, 1.0), ("v", 1.0, 0.0), ("v", 0.0, 1.0)):
        alpha, sigma = torch.tensor(a).double(), torch.tensor(s).double()
        p = combine(kind, x0, noise, alpha, sigma)
        found = separate(kind, p, a * x0 + s * noise, alpha, sigma)
        torch.testing.assert_close(found, (x0, noise))


def test_a_learned_variance_is_left_out_of_the_loss():
    x0, noise = (tensor.float() for tensor in some())
    t = torch.full((5,), 0.4)
    plain = Objective("epsilon", alphas_cumprod=BARS)
    learned = Objective("epsilon", alphas_cumprod=BARS, learned_sigma=True)
    output = torch.randn(5, 6, 4, 4)
    loss = learned.loss(output, x0, noise, t)
    assert torch.equal(loss, plain.loss(output[:, :3], x0, noise, t))
    expected = ((output[:, :3] - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_times_lie_where_their_density_says():
    generator = torch.Generator().manual_seed(0)
    t = draw_times(20_000, "logit_normal", generator=generator)
    assert t.min() > 0
    assert t.max() < 1
    assert abs(float(t.median()) - 0.5) < 0.01
    inside = float(((t > 0.2689414) & (t < 0.7310586)).float().mean())  # sigmoid of ±1
    assert abs(inside - math.erf(1 / math.sqrt(2))) < 0.01
    moved = draw_times(20_000, "uniform", shift=3.0, generator=generator)
    assert abs(float(moved.median()) - 0.75) < 0.01


def test_shift_keeps_the_ends_and_agrees_with_the_scheduler():
    diffusers = pytest.importorskip("diffusers")
    t = torch.linspace(0.1, 1, 10)
    assert shifted(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=10, shift=3.0)
    torch.testing.assert_close(shifted(t, 3.0).flip(0), scheduler.sigmas[:10])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["flow", "ddpm"])
def test_what_can_be_known_at_the_ends_is_finite_and_right(kind, path):
    """A grid that holds both ends, in float64; what a kind cannot know there is named."""
    count = 101
    t = torch.linspace(0, 1, count, dtype=torch.float64)
    alpha = 1 - t if path == "flow" else (math.pi / 2 * t).cos()
    sigma = t if path == "flow" else (math.pi / 2 * t).sin()
    if path == "ddpm":  # cos(π/2) is 6e-17 in floating point
        alpha[-1] = 0.0
    x0, noise = some(shape=(count, 2, 3))
    a, s = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1)
    found = separate(kind, combine(kind, x0, noise, alpha, sigma), a * x0 + s * noise, alpha, sigma)
    knows_x0 = torch.ones(count, dtype=torch.bool)
    knows_noise = knows_x0.clone()
    knows_x0[-1] = kind != "epsilon"
    knows_noise[0] = kind != "x0"
    for own, truth, known in ((found[0], x0, knows_x0), (found[1], noise, knows_noise)):
        assert not torch.isfinite(own[~known]).any()
        torch.testing.assert_close(own[known], truth[known], rtol=1e-9, atol=1e-9)


def test_a_flows_log_snr_clock_runs_both_ways_and_to_its_ends():
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    clock = log_snr(1 - t, t)
    assert clock[0] == math.inf
    assert clock[-1] == -math.inf
    assert bool((clock.diff() < 0).all())
    torch.testing.assert_close(Objective("flow").time_of(clock), t, rtol=0, atol=1e-12)
    assert float(log_snr(torch.tensor(0.5), torch.tensor(0.5))) == 0


@pytest.mark.parametrize("last", [0.002, 0.0])
def test_a_ddpms_log_snr_clock_finds_every_step_again(last):
    bars = torch.linspace(0.9999, last, 1000, dtype=torch.float64) ** 2
    objective = Objective("v", alphas_cumprod=bars)
    clock = log_snr(bars.sqrt(), (1 - bars).sqrt())
    t = objective.time_of(clock)
    assert objective.at(t)[0].tolist() == list(range(1000))
    torch.testing.assert_close(t, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert objective.at(objective.time_of(torch.tensor([99.0, -99.0])))[0].tolist() == [0, 999]
    between = objective.time_of((clock[500:501] + clock[501:502]) / 2)
    assert 500.5 / 1000 < float(between) < 501.5 / 1000


def test_one_log_snr_is_the_same_noise_on_every_base():
    wanted = torch.tensor([4.0, 0.0, -3.0], dtype=torch.float64)
    for objective in (Objective("flow"), Objective("epsilon", alphas_cumprod=BARS)):
        _, alpha, sigma = objective.at(objective.time_of(wanted))
        torch.testing.assert_close(log_snr(alpha, sigma).double(), wanted, rtol=0, atol=0.02)


def test_times_have_the_density_of_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    count = 40_000
    theirs = training_utils.compute_density_for_timestep_sampling(
        "logit_normal", count, 0.5, 0.8, generator=torch.Generator().manual_seed(1)
    )
    generator = torch.Generator().manual_seed(2)
    ours = draw_times(count, "logit_normal", mean=0.5, std=0.8, generator=generator)
    grid = torch.linspace(0, 1, 201)
    share = [torch.searchsorted(t.sort().values, grid) / count for t in (theirs, ours)]
    gap = float((share[0] - share[1]).abs().max())
    assert gap < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov, one in a thousand


def test_times_are_a_function_of_the_generator_and_some_are_uniform():
    def drawn(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return draw_times(5000, "logit_normal", mean=4.0, std=0.1, generator=generator, **more)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert float((drawn(1) < 0.9).float().mean()) == 0
    assert abs(float((drawn(1, uniform_share=0.5) < 0.5).float().mean()) - 0.25) < 0.03


def test_bigger_pictures_shift_as_in_the_flux_pipeline():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    t = torch.linspace(0.05, 1, 20)
    for tokens in (256, 1024, 4096):
        expected = scheduler.time_shift(calculate_shift(tokens), 1.0, t)
        torch.testing.assert_close(shifted(t, shift_for(tokens)), expected)
    assert shift_for(256) < shift_for(4096)
    other = scheduler.time_shift(calculate_shift(5000, 256, 8192, 0.5, 0.9), 1.0, t)
    torch.testing.assert_close(shifted(t, shift_for(5000, large=(8192, 0.9))), other)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_min_snr_is_that_of_diffusers_scripts(kind):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler()
    steps = torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, steps)
    theirs = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    theirs = theirs / (snr if kind == "epsilon" else snr + 1)
    objective = Objective(kind, alphas_cumprod=scheduler.alphas_cumprod)
    ours = objective.weights((steps + 0.5) / 1000, "min_snr", gamma=5.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_min_snr_at_the_ends_is_finite():
    alpha, sigma = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = {"epsilon": [0, 1], "x0": [5, 0], "v": [0, 0], "flow": [0, 0]}
    for kind, values in expected.items():
        assert loss_weights("min_snr", kind, alpha, sigma).tolist() == values


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_same_error_of_x0_alike_whatever_is_predicted(kind):
    """Written the other way round: convert a wrong prediction to x0, weigh its error there."""
    x0, noise = some()
    sigma = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    flow = kind.startswith("flow")
    alpha = 1 - sigma if flow else (1 - sigma**2).sqrt()
    a, s = alpha.view(5, 1, 1, 1), sigma.view(5, 1, 1, 1)
    truth = combine(kind, x0, noise, alpha, sigma)
    wrong = truth + 0.1 * torch.randn(x0.shape, dtype=torch.float64)
    found, _ = separate(kind, wrong, a * x0 + s * noise, alpha, sigma)
    snr = (alpha / sigma) ** 2
    expected = snr.clamp(max=5.0) * ((found - x0) ** 2).mean((1, 2, 3))
    ours = loss_weights("min_snr", kind, alpha, sigma) * ((wrong - truth) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(ours, expected)


def test_cosmap_is_that_of_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    t = torch.linspace(0, 1, 50)
    theirs = training_utils.compute_loss_weighting_for_sd3("cosmap", t)
    torch.testing.assert_close(Objective("flow").weights(t, "cosmap"), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5])
def test_chain_weights_mirror_each_other_and_are_diff_tunings_densities(tau):
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    adapt, retain = chain_weights(t, tau)
    torch.testing.assert_close(adapt, retain.flip(0))
    drawn = torch.arange(1, 1001, dtype=torch.float64) ** tau  # as train.py writes them
    torch.testing.assert_close(adapt.mean(), torch.tensor(1.0).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(adapt, drawn / drawn.mean(), rtol=0, atol=5e-3)
    assert bool((adapt.diff() > 0).all()) == (tau > 0)
    bars = Objective("epsilon", alphas_cumprod=BARS)
    assert torch.equal(bars.weights(t, "chain", tau=tau), adapt)
    assert torch.equal(bars.weights(t, "chain", tau=tau, retain=True), retain)


def test_the_loss_is_the_plain_one_times_its_weights():
    x0, noise = (tensor.float() for tensor in some())
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    objective, output = Objective("flow"), torch.randn(5, 3, 4, 4)
    plain = objective.loss(output, x0, noise, t)
    for weighting, more in (("min_snr", {"gamma": 2.0}), ("chain", {"tau": 2.0}), ("cosmap", {})):
        own = objective.loss(output, x0, noise, t, weighting, **more)
        assert own.dtype == torch.float32
        assert own.shape == (5,)
        torch.testing.assert_close(own, plain * objective.weights(t, weighting, **more))
        assert not torch.allclose(own, plain)


def test_losses_are_told_apart_by_noise():
    t = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.8, 1.0])
    assert noise_band(t).tolist() == [0, 0, 1, 1, 3, 3]
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, 4.0], requires_grad=True)
    means = band_means(losses, t)
    assert not means.requires_grad
    torch.testing.assert_close(means, torch.tensor([2.0, 6.0, math.nan, 3.0]), equal_nan=True)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="unknown objective 'edm'; known: x0, epsilon"):
        Objective("edm")
    with pytest.raises(UnknownNameError, match="timestep scheme"):
        draw_times(2, "mode")
    with pytest.raises(UnknownNameError, match="unknown weighting 'p2'; known: none, min_snr"):
        loss_weights("p2", "flow", torch.zeros(1), torch.ones(1))
