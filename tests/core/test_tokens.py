"""Latents as tokens: written once more with loops and torch's own unfold."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.families import FAMILIES, TokenForm, token_form
from diffscaler_core.tokens import (
    Embedding,
    embed_input,
    fitted,
    mixed_rows,
    pack,
    patch_of,
    token_mask,
    unpack,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(kind: str, features: int = 16, order: str = "cpq", patch: int = 2) -> Embedding:
    return Embedding("embed", features, (), TokenForm(kind, order, patch))


def conv(channels: int = 4, *stride: int, kind: str = "nchw") -> Embedding:
    return Embedding("embed", channels, stride or (2, 2), TokenForm(kind))


CONV3D = Embedding("embed", 4, (1, 2, 2), TokenForm("ncfhw"))


def test_packing_is_unfolding():
    x = rand(2, 4, 6, 10)
    assert torch.equal(pack(x), F.unfold(x, 2, stride=2).transpose(1, 2))
    assert torch.equal(pack(x, 1), x.flatten(2).transpose(1, 2))
    assert torch.equal(unpack(pack(x), 6, 10), x)


def test_the_other_order_counts_channels_fastest():
    x, tokens = rand(1, 3, 4, 6), pack(rand(1, 3, 4, 6), 2, "pqc")
    for row, column, p, q, c in itertools.product(range(2), range(3), range(2), range(2), range(3)):
        got = tokens[0, row * 3 + column, (p * 2 + q) * 3 + c]
        assert got == x[0, c, row * 2 + p, column * 2 + q]


@pytest.mark.parametrize("order", ["cpq", "pqc"])
def test_frames_lie_one_after_the_other(order):
    video = rand(2, 4, 3, 4, 6)
    got = embed_input(video, linear("packed_frames", order=order))
    wanted = torch.cat([pack(video[:, :, f], 2, order) for f in range(3)], dim=1)
    assert torch.equal(got, wanted)
    folded = embed_input(video, conv(4, kind="ncfhw"))  # CogVideoX: frames in the rows
    assert torch.equal(folded, torch.cat([v.transpose(0, 1) for v in video]))
    assert torch.equal(embed_input(video, CONV3D), video)
    assert embed_input(video[:, :, 0], CONV3D).shape == (2, 4, 1, 4, 6)


def test_a_convolution_takes_latents_as_they_are():
    x = rand(2, 4, 8, 6)
    assert embed_input(x, conv(4)) is x
    odd = embed_input(rand(1, 4, 7, 5), conv(4))
    assert torch.equal(odd, F.pad(rand(1, 4, 7, 5), (0, 1, 0, 1), mode="replicate"))
    frames = embed_input(rand(1, 4, 2, 7, 5), CONV3D)
    assert frames.shape == (1, 4, 2, 8, 6)


def test_the_side_of_a_patch():
    assert patch_of(conv(4), 4) == 2
    assert patch_of(linear("packed2", 64), 16) == 2
    assert patch_of(linear("packed", 128, patch=1), 128) == 1
    assert patch_of(linear("patchified", 64, patch=0), 16) == 2  # nobody knows the family
    assert patch_of(linear("patchified", 16, patch=0), 16) == 1


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 32, 64])
def test_another_vaes_latents_are_refused_even_where_the_numbers_would_fit(channels):
    with pytest.raises(DiffScalerError, match=f"has {channels} channels as latents, but 'embed'"):
        patch_of(linear("packed2", 64), channels)  # 4·4·4 is 64, and yet no patch of Flux
    with pytest.raises(DiffScalerError, match="base's own VAE"):
        patch_of(conv(16), channels)


def test_only_pictures_and_videos_are_latents():
    for shape in ((4, 8, 8), (1, 4), (1, 4, 1, 1, 8, 8)):
        with pytest.raises(DiffScalerError, match="control latents are"):
            embed_input(rand(*shape), conv(4))


def test_the_table_knows_every_familys_form():
    for family in FAMILIES.values():
        for name in family.classes:
            form = token_form(name)
            assert form == (family.tokens, family.patch_order, family.patch)
    assert token_form("SomethingElse") is None


def test_one_row_serves_the_batch_and_one_picture_all_frames():
    y = torch.zeros(2, 6, 8)
    assert fitted(rand(1, 6, 8), 1, y, linear("patchified")).shape == (1, 6, 8)
    assert fitted(rand(2, 6, 8), 2, y, linear("patchified")).shape == (2, 6, 8)
    still = rand(2, 6, 8)
    video = fitted(still, 2, torch.zeros(2, 18, 8), linear("packed_frames"))
    assert torch.equal(video, torch.cat([still] * 3, dim=1))
    rows = fitted(rand(2, 8, 4, 4), 2, torch.zeros(6, 8, 4, 4), conv(4, kind="ncfhw"))
    assert torch.equal(rows, rand(2, 8, 4, 4)[[0, 0, 0, 1, 1, 1]])
    clip = fitted(rand(3, 8, 4, 4), 1, torch.zeros(6, 8, 4, 4), conv(4, kind="ncfhw"))
    assert torch.equal(clip, rand(3, 8, 4, 4)[[0, 1, 2, 0, 1, 2]])
    deep = fitted(rand(2, 8, 1, 4, 4), 2, torch.zeros(2, 8, 3, 4, 4), CONV3D)
    assert torch.equal(deep, rand(2, 8, 1, 4, 4).expand(2, 8, 3, 4, 4))


def test_what_the_model_appends_gets_nothing():
    added = rand(2, 6, 8)
    for kind in ("packed2", "packed", "filled"):
        longer = fitted(added, 2, torch.zeros(2, 10, 8), linear(kind))
        assert torch.equal(longer[:, :6], added)
        assert not longer[:, 6:].any()


def test_a_list_of_samples_is_filled_up_one_by_one():
    added = rand(2, 6, 8)
    flat = fitted(added, 2, torch.zeros(64, 8), linear("list"))
    assert torch.equal(flat.view(2, 32, 8)[:, :6], added)
    assert not flat.view(2, 32, 8)[:, 6:].any()
    shared = fitted(added[:1], 1, torch.zeros(96, 8), linear("list"))
    assert torch.equal(shared.view(3, 32, 8)[:, :6], added[:1].expand(3, -1, -1))


@pytest.mark.parametrize(
    ("added", "y", "embedding"),
    [
        ((1, 8, 4, 4), (2, 8, 4, 6), conv(4)),
        ((2, 8, 4, 4), (3, 8, 4, 4), conv(4)),
        ((1, 6, 8), (2, 4, 8), linear("packed2")),
        ((1, 6, 8), (2, 8, 8), linear("patchified")),
        ((2, 6, 8), (96, 8), linear("list")),
        ((2, 8, 2, 4, 4), (2, 8, 3, 4, 4), CONV3D),
        ((4, 8, 4, 4), (6, 8, 4, 4), conv(4, kind="ncfhw")),
    ],
)
def test_what_does_not_fit_is_said_with_both_shapes(added, y, embedding):
    with pytest.raises(DiffScalerError, match="one control picture for all rows or one per row"):
        fitted(rand(*added), added[0], torch.zeros(*y), embedding)


def test_a_mask_is_averaged_over_each_token():
    mask = (rand(2, 1, 32, 48) > 0).float()
    wanted = mask.view(2, 4, 8, 6, 8).mean((2, 4))
    latents = rand(2, 4, 8, 12)
    grid = token_mask(mask, latents, conv(4), torch.zeros(2, 8, 4, 6))
    torch.testing.assert_close(grid, wanted.unsqueeze(1))
    tokens = token_mask(mask, latents, linear("packed2"), torch.zeros(2, 24, 8))
    torch.testing.assert_close(tokens, wanted.flatten(1).unsqueeze(2))
    frames = token_mask(mask, latents, linear("packed_frames"), torch.zeros(2, 72, 8))
    torch.testing.assert_close(frames, tokens.repeat(1, 3, 1))
    deep = token_mask(mask, latents, CONV3D, torch.zeros(2, 8, 3, 4, 6))
    torch.testing.assert_close(deep, wanted.view(2, 1, 1, 4, 6))
    assert grid.dtype == token_mask(mask.double(), latents, conv(4), torch.zeros(2, 8, 4, 6)).dtype


def test_a_mask_on_a_video_that_folds_frames_into_rows_serves_each_rows_frames():
    mask = torch.stack([torch.zeros(1, 8, 12), torch.ones(1, 8, 12)])
    embedded = torch.ones(6, 8, 4, 6)  # two rows of three frames
    factors = token_mask(mask, rand(2, 4, 3, 8, 12), conv(4, kind="ncfhw"), embedded)
    assert torch.equal((embedded * factors).amax((1, 2, 3)), torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_rows_without_latents_are_zeros_with_the_factor_0():
    own = [rand(4, 2, 2, seed=i) for i in range(2)]
    latents, rows = mixed_rows([own[0], None, own[1]])
    assert torch.equal(latents, torch.stack([own[0], torch.zeros(4, 2, 2), own[1]]))
    assert rows.tolist() == [1.0, 0.0, 1.0]
    for wrong in ([None, None], [], [own[0], rand(4, 2, 3)]):
        with pytest.raises(DiffScalerError, match="latents of one shape"):
            mixed_rows(wrong)
