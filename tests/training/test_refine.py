"""Refining coarse pictures (DiffuseVAE, its first form), and the shipped task that does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffscaler_core import load_task
from diffscaler_core.errors import DiffScalerError, UnknownNameError
from diffscaler_core.training import as_denoiser, encode_folder, encode_pictures, prompts_for
from diffscaler_core.training.command.run_data import _controls
from diffscaler_core.training.data.coarse import KINDS, Coarse, blurred, shrunk, through_jpeg
from diffscaler_core.training.data.controls import CONTROLS, made
from diffscaler_core.training.preview import sample_latents

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "assets" / "examples" / "control"
NAMES = ("cat", "guitar", "penguin", "rocket", "sailboat", "star")
TASK = ROOT / "assets" / "tasks" / "refine.safetensors"


def shown(name):
    values = np.array(Image.open(PICTURES / f"{name}.png").convert("RGB"), dtype=np.float32)
    return torch.from_numpy(values).movedim(-1, 0) / 127.5 - 1


def psnr(one, other):
    return 10 * torch.log10(4 / (one - other).square().flatten(1).mean(1))


def correlation(one, other):
    one, other = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (one, other))
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stronger_the_coarser(kind):
    picture = shown("cat")
    near = [float(psnr(KINDS[kind](picture, s)[None], picture[None])) for s in (0.1, 0.4, 0.7, 1)]
    assert near == sorted(near, reverse=True)
    assert near[0] > near[-1] + 3
    assert 12 < near[-1] < 27


def test_each_kind_is_what_its_name_says():
    picture = shown("guitar")
    assert torch.equal(blurred(picture, 0.15), CONTROLS["blur"](picture, 0))
    assert torch.equal(shrunk(picture, 8), CONTROLS["low_resolution"](picture, 0))
    spectrum = torch.fft.rfft2(blurred(picture, 0.15)).abs()
    assert float(spectrum[:, 20:-20, 20:].sum() / spectrum.sum()) < 0.02
    held = through_jpeg(picture, 90)
    assert float(psnr(held[None], picture[None])) > 25
    grey = through_jpeg(picture[:1], 90)
    assert grey.shape == (1, 128, 128)


def test_a_picture_is_coarse_in_the_same_way_whenever_it_comes_up_and_pictures_differ():
    picture = shown("star")
    make = Coarse()
    assert torch.equal(made(make, picture), made(make, picture.clone()))
    ways = {tuple(make(picture, seed).flatten()[:500].tolist()) for seed in range(12)}
    assert len(ways) >= 6  # of twelve seeds; near quality 1 JPEG has few
    only = Coarse(kinds=("blur",))
    near = [float(psnr(only(picture, seed)[None], picture[None])) for seed in range(12)]
    least, most = (float(psnr(blurred(picture, 0.15 * s)[None], picture[None])) for s in (1, 0.25))
    assert least <= min(near) < max(near) <= most
    mild = Coarse(0.3, ("blur",))
    assert all(float(psnr(mild(picture, s)[None], picture[None])) > least for s in range(12))


def test_strengths_are_told_apart_in_a_cache(tmp_path):
    encoded = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels

    def run(make):
        encoded.clear()
        data = encode_pictures(
            lambda i: shown(NAMES[i]), NAMES, encode, control_from=make, cache=tmp_path,
            encoder_key="k",
        )  # fmt: skip
        return data.control, sum(encoded)

    full, count = run("refine")
    assert count == 12
    again, count = run(Coarse())
    assert (torch.equal(full, again), count) == (True, 0)
    mild, count = run(Coarse(0.3))
    assert (torch.equal(full, mild), count) == (False, 6)


def test_plain_pictures_are_enough_for_the_command_and_strength_is_checked():
    told = _controls("refine", None, strength=0.5)
    assert told == {"control_from": Coarse(0.5)}
    assert _controls("mine", "refine") == {"control_from": Coarse()}
    assert _controls("edges", None) == {"control_from": "edges"}
    with pytest.raises(DiffScalerError, match=r"control_strength 0\.5 says how coarse .* 'edges'"):
        _controls("edges", None, strength=0.5)
    for strength in (0, 1.5):
        with pytest.raises(DiffScalerError, match="above 0 and at most 1"):
            Coarse(strength)
    with pytest.raises(UnknownNameError, match="'blurr'; known: blur"):
        Coarse(kinds=("blurr",))
    with pytest.raises(DiffScalerError, match="at least one kind"):
        Coarse(kinds=())
    data = encode_folder(PICTURES, 64, lambda pixels: pixels, control_from="refine")
    assert data.control.shape == data.latents.shape


@pytest.fixture(scope="module")
def refined():
    """Returns (coarse pictures, what is said) -> pictures in ten steps; False: without the task."""
    from diffscaler_core.pocket import load_pipeline

    base = as_denoiser(load_pipeline(ROOT / "assets" / "pocket"))
    words = load_task(ROOT / "assets" / "pocket" / "diffscaler" / "words.safetensors")
    prompts, task = prompts_for(base, NAMES, "stored", words=words), load_task(TASK)

    @torch.no_grad()
    def draw(coarse, with_task=True, with_words=True, seed=3):
        noise = torch.randn(6, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
        told = prompts(torch.arange(6)) if with_words else prompts.null(6)
        told["control"] = base.encode(coarse)
        with base.held(), base.attached({"refine": task} if with_task else {}):
            return base.decode(sample_latents(base, told, {}, noise, steps=10, guidance=1))

    return draw


@pytest.fixture(scope="module")
def true():
    return torch.stack([shown(name) for name in NAMES])


def sharpness(pictures):
    """Mean square of the Laplacian."""
    x = pictures
    sides = x[..., 2:, 1:-1] + x[..., :-2, 1:-1] + x[..., 1:-1, 2:] + x[..., 1:-1, :-2]
    return (4 * x[..., 1:-1, 1:-1] - sides).square().flatten(1).mean(1)


def test_heavy_jpeg_comes_a_decibel_nearer_to_the_true_pictures(refined, true):
    """Each single result, in ten steps."""
    coarse = torch.stack([through_jpeg(picture, 1) for picture in true])
    near = float(psnr(coarse, true).mean())
    drawn = [refined(coarse, seed=seed) for seed in range(3)]
    assert min(float(psnr(one, true).mean()) for one in drawn) > near + 1
    # each is one sharp guess; what they agree on is nearer still
    assert float(psnr(torch.stack(drawn).mean(0), true).mean()) > near + 1.5
    # without the task the base draws its own picture of the word
    assert float(psnr(refined(coarse, with_task=False), true).mean()) < near - 3


@pytest.mark.xfail(strict=True, reason="a blur gains 0.7 to 0.9 dB, a tiny picture none")
@pytest.mark.parametrize("kind", ["blur", "low_resolution"])
def test_soft_pictures_come_a_decibel_nearer_too(refined, true, kind):
    """What no task here reaches; strict, so that one that does is noticed."""
    coarse = torch.stack([KINDS[kind](picture, 1.0) for picture in true])
    assert float(psnr(refined(coarse), true).mean()) > float(psnr(coarse, true).mean()) + 1


@pytest.mark.parametrize(("kind", "nearer"), [("blur", 0.4), ("low_resolution", -0.2)])
def test_soft_pictures_become_sharp_and_stay_as_near(refined, true, kind, nearer):
    """A blur is near by the square error, and unsharp: a sharp guess can hardly be nearer."""
    coarse = torch.stack([KINDS[kind](picture, 1.0) for picture in true])
    drawn = refined(coarse)
    assert float(psnr(drawn, true).mean()) > float(psnr(coarse, true).mean()) + nearer
    sharp = [float((sharpness(x) / sharpness(true)).mean()) for x in (coarse, drawn)]
    assert sharp[0] < 0.01
    assert sharp[1] > 0.1


def test_a_path_between_two_coarse_pictures_is_a_path_between_two_results(refined, true):
    """Each step takes the result farther from its first end, and nearer to the other."""
    ends = torch.stack([blurred(picture, 0.15) for picture in true])
    path = [
        refined(torch.lerp(ends, ends.roll(1, 0), share), with_words=False)
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    for end, order in ((path[0], 1), (path[-1], -1)):
        far = [float((one - end).square().mean()) for one in path][::order]
        assert far[0] == 0
        assert far == sorted(far)
    # switched off, the coarse picture says nothing
    alone = [refined(own, with_task=False, with_words=False) for own in (ends, ends.roll(1, 0))]
    assert torch.equal(*alone)


def test_a_wrong_coarse_picture_is_followed(refined, true):
    coarse = torch.stack([blurred(picture, 0.15) for picture in true])
    other = coarse.roll(1, 0)
    drawn = refined(other, with_words=False)
    assert float(correlation(drawn, other).mean()) > 0.6
    assert float(correlation(drawn, other).mean()) > float(correlation(drawn, coarse).mean()) + 0.3
    alone = refined(other, with_task=False, with_words=False)
    assert float(correlation(alone, other).mean()) < 0.6


def test_the_shipped_file_is_small_and_says_what_it_is():
    assert TASK.stat().st_size <= 1_200_000
    task = load_task(TASK)
    assert (task.name, task.info["control"]["kind"]) == ("refine", "refine")
    assert {t.dtype for own in task.layers.values() for t in own.values()} == {torch.float16}
