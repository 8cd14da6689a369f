"""Control pictures made on the fly: of the very view that is trained on, the same every time."""

import sys

import pytest
import torch
from PIL import Image

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import encode_folder, encode_pictures
from diffscaler_core.training.data.controls import CONTROLS, made
from diffscaler_core.training.data.streaming import stream


def same(pixels):
    return pixels


@pytest.fixture
def drawn(tmp_path):
    """Eight pictures, not symmetric, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        small = (torch.rand(6, 6 + i, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(small).resize((60 + 10 * i, 60)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_has_its_pictures_shape_and_range_and_shows_less(drawn, name):
    data = encode_folder(drawn, 32, same, control_from=name, flip=True, crops=1)
    assert data.control.shape == data.latents.shape
    assert float(data.control.abs().max()) <= 1
    again = encode_folder(drawn, 32, same, control_from=name, flip=True, crops=1)
    assert torch.equal(again.control, data.control)
    assert float((data.control - data.latents).abs().mean()) > 0.01
    for view in range(4):  # of the view itself, as it is
        for i in range(8):
            expected = made(CONTROLS[name], data.latents[view, i])
            assert torch.equal(data.control[view, i], expected)
    grey = encode_folder(drawn, 32, same, control_from=name, channels=1)
    assert grey.control.shape == (1, 8, 1, 32, 32)


def test_edges_are_those_that_comfyuis_own_node_finds(drawn):
    canny = pytest.importorskip("kornia.filters").canny
    data = encode_folder(drawn, 32, same, control_from="edges")
    for picture, control in zip(data.latents[0], data.control[0], strict=True):
        found = canny((picture[None] + 1) / 2, 0.1, 0.2)[1]
        assert torch.equal(control, found[0].expand(3, -1, -1) * 2 - 1)
    assert set(data.control.unique().tolist()) == {-1.0, 1.0}


def test_a_hole_is_grey_leaves_the_rest_and_lies_elsewhere_in_each_picture(drawn):
    data = encode_folder(drawn, 64, same, control_from="mask")
    holes = (data.control[0] == 0).all(1)
    for picture, control, hole in zip(data.latents[0], data.control[0], holes, strict=True):
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None])  # a rectangle
        assert 0.05 < float(hole.float().mean()) < 0.6
        assert torch.equal(control[:, ~hole], picture[:, ~hole])
    assert len({tuple(hole.flatten().tolist()) for hole in holes}) == 8


def test_a_users_function_makes_controls_too(drawn):
    seeds = []

    def darker(pixels, seed):
        seeds.append(seed)
        return pixels / 2

    data = encode_folder(drawn, 32, same, control_from=darker, flip=True)
    assert torch.equal(data.control, data.latents / 2)
    assert len(set(seeds)) == 16
    assert all(seed >= 0 for seed in seeds)


def test_a_cached_control_is_told_from_its_picture_and_from_other_controls(drawn, tmp_path):
    encoded = []

    def encode(pixels):
        encoded.append(len(pixels))
        return pixels

    def run(control_from):
        encoded.clear()
        options = {"cache": tmp_path / "cache", "encoder_key": "k", "crops": 1}
        data = encode_folder(drawn, 32, encode, control_from=control_from, **options)
        return data, sum(encoded)

    edges, count = run("edges")
    assert count == 32
    blur, count = run("blur")
    assert count == 16  # the pictures were there
    assert not torch.equal(edges.control, blur.control)
    again, count = run("edges")
    assert count == 0
    assert torch.equal(again.control, edges.control)
    for _ in range(2):  # nobody can name what a function does
        own, count = run(lambda pixels, seed: -pixels)
        assert count == 16
        assert torch.equal(own.control, -own.latents)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda pixels, seed: pixels[:1], "must give a tensor of the picture's own shape"),
        (lambda pixels, seed: None, "gave NoneType"),
        (lambda pixels, seed: pixels / 0, "gave NaN or Inf"),
        (lambda pixels, seed: int("x"), "'<lambda>' failed: invalid literal"),
    ],
)
def test_a_function_that_makes_no_control_is_one_error_and_no_bad_picture(drawn, function, said):
    with pytest.raises(DiffScalerError) as caught:
        encode_folder(drawn, 32, same, control_from=function, skip_bad=True)
    assert said in str(caught.value)


def test_what_cannot_be_meant_is_said(drawn, monkeypatch):
    with pytest.raises(DiffScalerError, match=r"unknown control .* 'eges'; known: edges, blur"):
        encode_folder(drawn, 32, same, control_from="eges")
    with pytest.raises(DiffScalerError, match=r"either found .* or made"):
        encode_folder(drawn, 32, same, control=True, control_from="edges")
    monkeypatch.setitem(sys.modules, "kornia.filters", None)
    with pytest.raises(DiffScalerError, match="pip install kornia"):
        encode_folder(drawn, 32, same, control_from="edges")


def test_pictures_in_memory_have_their_controls_made_or_given_at_their_size():
    pictures = torch.rand(3, 3, 32, 24) * 2 - 1
    load = pictures.__getitem__
    data = encode_pictures(load, ["a"] * 3, same, control_from="grey", flip=True)
    luma = (pictures * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(data.control[0], luma.expand_as(pictures))
    torch.testing.assert_close(data.control[1], luma.flip(-1).expand_as(pictures))
    with pytest.raises(DiffScalerError, match="control picture 1 is 24x16, its picture 24x32"):
        encode_pictures(load, ["a"] * 3, same, load_control=lambda i: pictures[i, :, :16])


def test_a_stream_makes_the_same_controls_whenever_a_batch_is_asked_for(drawn):
    datasets = pytest.importorskip("datasets")
    files = sorted(str(path) for path in drawn.glob("*.png"))
    table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    data = stream(table, 32, same, control_from="mask", flip=True, validation=2)
    rest, held = data.split(0.5)
    first = rest.batch(4, 7, 0)
    for picture, control in zip(first.x0, first.control, strict=True):
        assert torch.equal(control, made(CONTROLS["mask"], picture))
    later = rest.batch(4, 7, 3)
    assert torch.equal(rest.batch(4, 7, 0).control, first.control)
    assert torch.equal(rest.batch(4, 7, 3).control, later.control)
    (kept,) = held.whole(8)
    assert kept.control.shape == (2, 3, 32, 32)
    with pytest.raises(DiffScalerError, match="either found"):
        stream(table, 32, same, control=True, control_from="mask")
