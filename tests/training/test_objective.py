import math

import pytest
import torch

from diffscaler_core.errors import UnknownNameError
from diffscaler_core.training.objective import (
    KINDS,
    Objective,
    combine,
    convert,
    draw_times,
    loss_weights,
    separate,
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


def test_min_snr_is_the_papers_formula():
    sigma = torch.tensor([0.05, 0.4, 0.9])
    alpha = (1 - sigma**2).sqrt()
    snr = (alpha / sigma) ** 2
    capped = snr.clamp(max=5.0)
    torch.testing.assert_close(loss_weights("min_snr", "epsilon", alpha, sigma), capped / snr)
    torch.testing.assert_close(loss_weights("min_snr", "v", alpha, sigma), capped / (snr + 1))
    torch.testing.assert_close(loss_weights("min_snr", "x0", alpha, sigma), capped)
    with pytest.raises(UnknownNameError, match="known: none, cosmap"):
        loss_weights("min_snr", "flow", alpha, sigma)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="unknown objective 'edm'; known: x0, epsilon"):
        Objective("edm")
    with pytest.raises(UnknownNameError, match="timestep scheme"):
        draw_times(2, "mode")
