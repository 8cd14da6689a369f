"""Stretched positions: equal to the trained ones where both have one, and gone without a trace."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from diffscaler_core import DiffScalerError
from diffscaler_core.pocket import load_pipeline, load_words, prompt_inputs
from diffscaler_core.resolution import at_resolution

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"


def positions(model: Any, tokens: int) -> Tensor:
    """What a patch embedding adds to a square of so many tokens a side, (tokens, tokens, D)."""
    embed, side = model.pos_embed.requires_grad_(False), tokens * model.config.patch_size
    x = torch.randn(1, model.config.in_channels, side, side)
    blind = copy.deepcopy(embed)
    for parameter in blind.parameters():
        parameter.data.zero_()
    blind.__dict__.update({k: v for k, v in embed.__dict__.items() if k == "cropped_pos_embed"})
    return blind(x)[0].unflatten(0, (tokens, tokens))


def trained_tokens(model: Any) -> int:
    return int(model.config.sample_size // model.config.patch_size)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "pocket", "pixart 1024"])
def test_every_trained_position_is_where_it_was(tiny: Any, family: str, factor: int) -> None:
    if family == "pocket":  # its table was stored in 16 bits
        model = load_pipeline(POCKET).transformer
    elif family == "pixart 1024":  # which has an interpolation scale of its own
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16,
            caption_channels=12, sample_size=128, interpolation_scale=2,
        )  # fmt: skip
    else:
        model = tiny(family)
    count = trained_tokens(model)
    own = positions(model, count)
    with at_resolution(model, factor):
        new = positions(model, factor * count)
    assert float((new[::factor, ::factor] - own).abs().max()) == 0.0
    between = (new[1:-factor:factor, ::factor] - own[:-1]).abs()
    assert float(between.max()) > 1e-3


@pytest.mark.parametrize("family", ["dit", "pixart", "sd3", "flux", "flux2", "chroma"])
def test_afterwards_the_model_is_what_it_was(tiny: Any, family: str) -> None:
    model = tiny(family)
    config, weights = dict(model.config), {n: t.clone() for n, t in model.state_dict().items()}
    inner = dict(model.pos_embed.__dict__)
    stretched = at_resolution(model, 2.0)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert list(model.state_dict()) == list(weights)
    with pytest.raises(DiffScalerError, match="stretched already"):
        at_resolution(model, 2)
    pickle.loads(pickle.dumps(copy.deepcopy(model)))
    stretched.remove()
    stretched.remove()
    assert dict(model.config) == config
    assert model.pos_embed.__dict__.keys() == inner.keys()
    assert not model.pos_embed._forward_pre_hooks
    with pytest.raises(RuntimeError), at_resolution(model, 2):
        raise RuntimeError
    assert dict(model.config) == config


@pytest.mark.parametrize("family", ["flux", "flux2", "chroma"])
def test_rotary_positions_are_divided_and_text_stays(tiny: Any, family: str) -> None:
    model, axes = tiny(family), 4 if family == "flux2" else 3
    ids = torch.zeros(5, axes)
    ids[:, 1], ids[:, 2] = torch.arange(5.0), torch.arange(5.0).flip(0)
    large = ids.clone()
    large[:, 1:3] *= 2
    if axes == 4:
        ids[:, 3] = large[:, 3] = torch.arange(5.0)  # where a text token stands
    own = model.pos_embed(ids)
    with at_resolution(model, 2):
        new = model.pos_embed(large.bfloat16())
        between = model.pos_embed(large + torch.tensor([0, 1, 0, 0])[:axes])
    assert all(torch.equal(a, b) for a, b in zip(own, new, strict=True))
    assert not torch.equal(between[0], own[0])


@pytest.mark.parametrize("family", ["unet2d", "sd15", "qwen_image", "z_image", "wan", "sana"])
def test_other_families_are_refused_in_one_line(tiny: Any, family: str) -> None:
    with pytest.raises(DiffScalerError, match="cannot be stretched to 2 times") as error:
        at_resolution(tiny(family), 2)
    assert "SD3Transformer2DModel" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_refused(tiny: Any) -> None:
    model = tiny("sd3")
    for factor in (0, -1, float("nan")):
        with pytest.raises(DiffScalerError, match="positive multiple"):
            at_resolution(model, factor)
    with at_resolution(model, 1):
        assert not model.pos_embed.__dict__.get("cropped_pos_embed")
    with at_resolution(model, 2), pytest.raises(DiffScalerError, match="33 x 33 tokens are more"):
        model.pos_embed(torch.zeros(1, 4, 66, 66))
    model.pos_embed.pos_embed.add_(torch.randn_like(model.pos_embed.pos_embed))
    with pytest.raises(DiffScalerError, match="not a sin-cos one"):
        at_resolution(model, 2)
    assert model.config.sample_size == 16


def test_pipelines_draw_at_the_new_size(cases: Any) -> None:
    pipe = cases["dit"].pipe()
    draw = dict(num_inference_steps=1, output_type="np")
    side = pipe([1], **draw).images.shape[1]
    with at_resolution(pipe.transformer, 2):
        assert pipe([1], **draw).images.shape[1] == 2 * side
    assert pipe([1], **draw).images.shape[1] == side


def test_the_pocket_base_is_nearer_to_its_own_pictures_with_them() -> None:
    """A picture drawn at twice the size, shrunk, against the one of the trained size."""
    pipe = load_pipeline(POCKET)
    pipe.set_progress_bar_config(disable=True)
    words = load_words(POCKET)

    def seen(side: int) -> Tensor:
        latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        if side == 256:
            latents = latents.repeat_interleave(2, 2).repeat_interleave(2, 3)
        call = {**prompt_inputs(words, "sun"), "num_inference_steps": 8, "output_type": "pt"}
        image = pipe(latents=latents, height=side, width=side, **call).images
        return torch.nn.functional.interpolate(image, size=128, mode="area")

    own, naive = seen(128), seen(256)
    with at_resolution(pipe.transformer, 2):
        stretched = seen(256)
    assert (stretched - own).square().mean() < (naive - own).square().mean()
