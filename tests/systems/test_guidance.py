"""Acceptance test 8.6: losses fall, what is outside the mask stays, and rho 0 is plain sampling."""

import pytest
import torch
import torch.nn.functional as F

from diffscaler_core import DiffScalerError
from diffscaler_core.errors import UnknownNameError
from diffscaler_core.systems.guidance import Guide, direction, push, sample_guided
from diffscaler_core.systems.guidance_losses import LOSSES, GuidanceLoss, make_loss, parse_colour
from diffscaler_core.training import sample_latents

from .toys import OBJECTIVES, denoiser_of, pictures, textures

SETTINGS = {"steps": 10, "shift": 1.0}
PURPLE = (0.3, -0.5, 0.3)


class Tiny(torch.nn.Module):
    """A classifier of two classes that looks at colour, or a segmenter that does so per pixel."""

    def __init__(self, pixels=False):
        super().__init__()
        self.pixels = pixels

    def forward(self, x):
        redder = x[:, :1] - x[:, 2:]
        redder = redder if self.pixels else redder.mean((2, 3))
        return 4 * torch.cat([redder, -redder], 1)


REFERENCE = textures(1, seed=4)
KINDS = {
    "colour": make_loss("colour", PURPLE),
    "edges": make_loss("edges", REFERENCE),
    "features": make_loss("features", lambda x: F.avg_pool2d(x, 4), REFERENCE),
    "class": make_loss("class", Tiny(), 1),
    "segments": make_loss("class", Tiny(pixels=True), torch.ones(1, 4, 4)),
    "own": GuidanceLoss(lambda x: x[:, 1].amax((1, 2))),
    "latents": GuidanceLoss(lambda x: x.square().mean((1, 2, 3)), on_latents=True),
}
#: How far guidance gets: a loss of edges or of a maximum is no convex bowl.
BOUND = {"own": 0.9, "edges": 0.75}


@pytest.fixture(params=OBJECTIVES)
def base(request):
    torch.set_num_threads(1)
    return denoiser_of(request.param)


def noise(count=4, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def mean_loss(loss, x):
    return float(loss.function(x).mean())


def test_every_kind_is_tried():
    assert LOSSES.keys() <= KINDS.keys()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_guided_samples_have_a_smaller_loss(base, kind, exact):
    loss = KINDS[kind]
    plain = sample_latents(base, {}, {}, noise(), **SETTINGS)
    guided = sample_guided(base, Guide([loss], 0.5, exact), {}, {}, noise(), **SETTINGS)
    assert mean_loss(loss, guided) < BOUND.get(kind, 0.5) * mean_loss(loss, plain)
    away = GuidanceLoss(loss.function, -1.0, on_latents=loss.on_latents)
    worse = sample_guided(base, Guide([away], 0.5, exact), {}, {}, noise(), **SETTINGS)
    assert mean_loss(loss, worse) > mean_loss(loss, plain)


@pytest.mark.parametrize("off", [{"rho": 0.0}, {"losses": []}, {"end": 1.1}])
def test_switched_off_it_is_plain_sampling_to_the_bit(base, off):
    guide = Guide(**{"losses": [KINDS["colour"]], "rho": 0.5, **off})
    plain = sample_latents(base, {}, {}, noise(), **SETTINGS)
    assert torch.equal(sample_guided(base, guide, {}, {}, noise(), **SETTINGS), plain)
    on = Guide([KINDS["colour"]], 0.5)
    assert not torch.equal(sample_guided(base, on, {}, {}, noise(), **SETTINGS), plain)


@pytest.mark.parametrize("exact", [False, True])
def test_outside_the_mask_lies_the_source(base, exact):
    source, mask = pictures(4, "red"), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    guide = Guide([make_loss("colour", PURPLE, where=mask)], 1.0, exact)
    out = sample_guided(
        base, guide, {}, {}, noise(), source=source, mask=mask, strength=0.8, **SETTINGS
    )
    assert (out - source)[..., :8].abs().max() < 1e-5
    assert (out - source)[..., 8:].abs().mean() > 0.05
    free = sample_guided(base, guide, {}, {}, noise(), source=source, strength=0.8, **SETTINGS)
    assert (free - source)[..., :8].abs().max() > 1e-2
    unled = sample_guided(
        base, Guide([]), {}, {}, noise(), source=source, mask=mask, strength=0.8, **SETTINGS
    )
    assert mean_loss(guide.losses[0], out) < 0.5 * mean_loss(guide.losses[0], unled)


def test_a_row_does_not_see_its_neighbours(base):
    guide = Guide([KINDS["colour"], KINDS["edges"]], 0.5, exact=True)
    both = sample_guided(base, guide, {}, {}, noise(2), **SETTINGS)
    alone = sample_guided(base, guide, {}, {}, noise(2)[1:], **SETTINGS)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_guidance_ends_where_it_is_told(base):
    seen = []

    def watched(x):
        seen.append(len(x))
        return x.square().mean((1, 2, 3))

    guide = Guide([GuidanceLoss(watched)], 0.1, start=0.85, end=0.35)
    sample_guided(base, guide, {}, {}, noise(), **SETTINGS)
    assert len(seen) == 5  # of the times 1, 0.9 … 0.1: from 0.8 to 0.4


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_a_push_keeps_the_sample_and_has_the_length_told(kind):
    x0, eps, gradient = textures(2, 1), noise(2, 1), noise(2, 2)
    for sigma in (0.1, 0.7, 1.0):
        s = torch.full((2,), sigma)
        a = 1 - s if kind == "flow" else (1 - s**2).sqrt()
        new, other = push(x0, eps, a, s, gradient, 0.3, kind)
        a, s = a.view(2, 1, 1, 1), s.view(2, 1, 1, 1)
        torch.testing.assert_close(a * new + s * other, a * x0 + s * eps)
        u = eps - x0 if kind == "flow" else a * eps - s * x0
        length = 0.3 * sigma**2 * u.flatten(1).norm(dim=1)
        torch.testing.assert_close((new - x0).flatten(1).norm(dim=1), length, rtol=1e-4, atol=1e-4)
        assert ((new - x0) * gradient).flatten(1).sum(1).max() < 0


def test_a_gradient_of_nothing_moves_nothing():
    assert not direction(torch.zeros(2, 3, 4, 4)).any()
    with pytest.raises(DiffScalerError, match="not finite"):
        direction(torch.full((1, 3, 4, 4), torch.nan))


def test_mistakes_are_told(base):
    scalar = GuidanceLoss(lambda x: x.mean(), name="mine")
    with pytest.raises(DiffScalerError, match=r"'mine' gave \(\) for 4 pictures"):
        sample_guided(base, Guide([scalar]), {}, {}, noise(), **SETTINGS)
    with pytest.raises(DiffScalerError, match="needs a source"):
        sample_guided(base, Guide([]), {}, {}, noise(), mask=torch.ones(1), **SETTINGS)
    with pytest.raises(UnknownNameError, match="unknown guidance loss 'hue'; known: colour"):
        make_loss("hue", 3)
    assert parse_colour("#ff0080") == pytest.approx([1, -1, 0.0039], abs=1e-3)
    for wrong in ("red", "#12345", (1, 2)):
        with pytest.raises(DiffScalerError, match="a colour is"):
            parse_colour(wrong)
