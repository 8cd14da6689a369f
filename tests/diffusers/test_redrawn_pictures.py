"""Translated and guided pictures of a real pipeline: the pocket base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from diffscaler_core import load_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.systems.guidance import Guide
from diffscaler_core.systems.guidance_losses import make_loss
from diffscaler_core.systems.pictures import fitting, guided_picture, translate_picture

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FEW = {"steps": 4, "size": 64}


@pytest.fixture(scope="module")
def pipe():
    torch.set_num_threads(1)
    return load_pipeline(ASSETS / "pocket")


@pytest.fixture(scope="module")
def words():
    return load_task(ASSETS / "pocket" / "diffscaler" / "words.safetensors")


def pixels(image):
    return np.asarray(image, np.float32) / 255


@pytest.mark.parametrize("exact", [False, True])
def test_a_led_picture_has_the_colour(pipe, words, exact):
    told = {"prompt": "cat", "words": words, "guidance": 1.0, **FEW}
    blue = make_loss("colour", "#2060e0")
    aim = np.array([0x20, 0x60, 0xE0]) / 255
    plain, led = (guided_picture(pipe, Guide([blue], rho, exact), **told) for rho in (0.0, 2.0))
    far, near = (((pixels(i).mean((0, 1)) - aim) ** 2).sum() for i in (plain, led))
    assert near < 0.5 * far


def test_a_translated_picture_is_the_tasks_and_keeps_its_surroundings(pipe, words):
    ink = load_task(ASSETS / "pocket" / "diffscaler" / "ink.safetensors")
    picture = Image.open(ASSETS / "examples" / "control" / "cat.png")
    told = {"prompt": "cat", "words": words, "strength": 0.9, **FEW}
    back = translate_picture(pipe, picture, guidance=1.0, **told)
    drawn = translate_picture(pipe, picture, None, ink, **told)
    assert abs(pixels(drawn) - pixels(back)).mean() > 0.05
    mask = np.zeros((64, 64), np.float32)
    mask[:, 32:] = 1
    half = translate_picture(pipe, picture, None, ink, mask=mask, **told)
    small = picture.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    assert abs(pixels(half) - pixels(small))[:, :32].max() < 1.5 / 255
    assert abs(pixels(half) - pixels(small))[:, 32:].mean() > 0.05


def test_a_picture_keeps_about_its_shape():
    assert fitting(300, 600, 128, 16) == (96, 176)
    assert fitting(10, 4000, 64, 16) == (16, 1280)
