"""Acceptance test 7.6: the same task gives pictures back, another keeps what the noise holds."""

import dataclasses
import itertools
import math

import pytest
import torch

from diffscaler_core import DiffScalerError
from diffscaler_core.systems.translate import (
    CLEAN,
    Code,
    decode,
    encode,
    levels_of,
    spread_of,
    translate,
)
from diffscaler_core.training.preview import predicted, sampling_times

from .toys import OBJECTIVES, colour_task, correlation, denoiser_of, edges, hue, pictures

SETTINGS = {"steps": 10, "shift": 1.0}


@pytest.fixture(params=OBJECTIVES)
def base(request):
    torch.set_num_threads(1)
    return denoiser_of(request.param)


def tasks_of(base):
    return colour_task(base, "red"), colour_task(base, "blue")


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_the_same_task_gives_the_pictures_back(base, eta):
    red, blue = tasks_of(base)
    x = pictures(4, "red")
    for strength in (1.0, 0.5):
        back = translate(base, x, red, red, eta=eta, strength=strength, **SETTINGS)
        assert (back - x).abs().max() < 1e-4
        other = translate(base, x, red, blue, eta=eta, strength=strength, **SETTINGS)
        # Half-way to noise the base still sees the old colour, and leaves nearly all of it.
        assert (other - x).abs().max() > (0.1 if strength == 1 else 1e-3)
    # without what each step adds, the code's start alone does not give them back
    code, times, levels = encoded(base, x, red, 1.0)
    empty = Code(code.start, tuple(0 * a for a in code.added), code.path)
    with base.attached({"red": red}):
        lost = decode(lambda y, i: predicted(base, y, times[i], {}, {}), empty, levels, 1.0)
    assert (lost - x).abs().max() > 0.1


def encoded(base, x, task, eta):
    times = sampling_times(base.objective, 10, 1.0)
    levels, generator = levels_of(base.objective, times), torch.Generator().manual_seed(0)
    with torch.no_grad(), base.attached({task.name: task}):
        code = encode(
            lambda y, i: predicted(base, y, times[i], {}, {}),
            x, levels, eta, lambda: torch.randn(x.shape, generator=generator),
        )  # fmt: skip
    return code, times, levels


def test_red_becomes_blue_and_keeps_its_edges(base):
    red, blue = tasks_of(base)
    x = pictures(8, "red", seed=3)
    out = translate(base, x, red, blue, strength=1.0, **SETTINGS)
    assert turned(mean_hue(x), 0) < 30
    assert turned(mean_hue(out), 240) < 30
    assert correlation(edges(x), edges(out)).min() > 0.8


def test_fresh_noise_loses_the_edges(base):
    """The mechanism switched off: as much noise, but not the picture's own."""
    red, blue = tasks_of(base)
    x = pictures(8, "red", seed=3)
    code, times, levels = encoded(base, x, red, 1.0)
    generator = torch.Generator().manual_seed(1)
    steps = itertools.pairwise(levels)
    fresh = tuple(
        spread_of(*pair, 1.0) * torch.randn(x.shape, generator=generator) for pair in steps
    )
    with torch.no_grad(), base.attached({"blue": blue}):
        out = decode(
            lambda y, i: predicted(base, y, times[i], {}, {}),
            Code(code.start, fresh, code.path), levels, 1.0,
        )  # fmt: skip
    assert turned(mean_hue(out), 240) < 60
    assert correlation(edges(x), edges(out)).mean() < 0.4


def mean_hue(x):
    return hue(x.mean(0, keepdim=True))


def turned(hues, degrees):
    return ((hues - degrees + 180) % 360 - 180).abs()


def test_the_noise_of_pictures_of_the_task_is_standard_normal(base):
    """z of the paper. A few coarse steps leave x0 uncertain, which makes it a little wider."""
    red, _ = tasks_of(base)
    code, _, levels = encoded(base, pictures(64, "red", seed=5), red, 1.0)
    for pair, added in list(zip(itertools.pairwise(levels), code.added, strict=True))[:-1]:
        z = added / spread_of(*pair, 1.0)
        assert abs(float(z.mean())) < 0.1
        assert float(z.std()) == pytest.approx(1, abs=0.3)


def test_the_spread_is_that_of_the_posterior():
    """Written otherwise: DDIM's σ (arXiv:2010.02502, Eq. 16) and Bayes' rule for a flow."""
    before, after = 0.3, 0.8  # ᾱ
    level, next_level = ((math.sqrt(bar), math.sqrt(1 - bar)) for bar in (before, after))
    ddim = math.sqrt((1 - after) / (1 - before)) * math.sqrt(1 - before / after)
    assert spread_of(level, next_level, 1.0) == pytest.approx(ddim)
    assert spread_of(level, next_level, 0.3) == pytest.approx(0.3 * ddim)
    (a, s), (a2, s2) = (0.3, 0.7), (0.6, 0.4)
    kernel = s**2 - (a / a2) ** 2 * s2**2  # variance of q(x | x')
    bayes = 1 / (1 / s2**2 + (a / a2) ** 2 / kernel)
    assert spread_of((a, s), (a2, s2), 1.0) == pytest.approx(math.sqrt(bayes))
    # the same on ComfyUI's scale, where samples are x0 + σ·ε
    grown = spread_of((1, s / a), (1, s2 / a2), 1.0)
    assert grown * a2 == pytest.approx(math.sqrt(bayes))
    assert spread_of(level, CLEAN, 1.0) == 0


def test_outside_the_mask_lies_the_source(base):
    red, blue = tasks_of(base)
    x, mask = pictures(2, "red"), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    out = translate(base, x, red, blue, mask=mask, strength=1.0, **SETTINGS)
    assert torch.equal(out[..., :8], x[..., :8])
    # The base sees the old colour on the left, so the right follows it some way.
    assert (out[..., 8:] - x[..., 8:]).abs().mean() > 0.02
    assert not torch.equal(translate(base, x, red, blue, **SETTINGS)[..., :8], x[..., :8])


def test_less_strength_changes_less(base):
    red, blue = tasks_of(base)
    x = pictures(4, "red")
    outs = [translate(base, x, red, blue, strength=s, **SETTINGS) for s in (0.1, 0.4, 1.0)]
    changes = [float((out - x).abs().mean()) for out in outs]
    assert changes == sorted(changes)
    assert changes[0] < changes[2] / 2


def test_only_the_target_is_guided(base):
    """Rows of the source's calls are the pictures; the target's are twice as many."""
    rows = []

    def predict(x, timestep, condition):
        rows.append(len(x))
        return base.predict(x, timestep, condition)

    counted = dataclasses.replace(base, predict=predict)
    told = {"context": torch.zeros(2, 1, 1)}
    translate(counted, pictures(2, "red"), source_prompt=told, null=told, guidance=2.0, steps=3)
    assert rows == [2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"eta": 1.5}, {"strength": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(DiffScalerError, match="a translation takes 1 step or more"):
        translate(denoiser_of("flow"), pictures(1, "red"), **wrong)
