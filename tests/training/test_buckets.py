"""How pictures are cut: to the square, to buckets of other shapes, at random places."""

import io
import math

import pytest
import torch
from PIL import Image, ImageOps

from diffscaler_core.training.data.pixels import (
    View,
    bucket_sizes,
    cropped_share,
    cut,
    decode_picture,
    nearest_bucket,
    picture_size,
    views_of,
)
from diffscaler_core.training.data.prepare import encode_folder, load_picture


def same(pixels):
    return pixels


def gradient(width, height):
    """A picture whose red says how far right, and whose green how far down a pixel is."""
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (right, down, Image.new("L", (width, height))))


def as_bytes(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("size", "factor"), [(64, 16), (512, 16), (1024, 32), (30, 1)])
def test_buckets_are_of_about_equal_area_and_of_aspects_up_to_two(size, factor):
    found = bucket_sizes(size, factor)
    assert (size, size) in found
    assert {(w, h) for h, w in found} == set(found)
    assert all(h % factor == w % factor == 0 for h, w in found)
    assert all(h * w <= size * size for h, w in found)
    assert all(0.5 <= h / w <= 2 for h, w in found)
    assert len(found) <= 40
    if size >= 512:
        assert all(h * w > 0.85 * size * size for h, w in found)
        assert max(w / h for h, w in found) > 1.7


def test_pictures_go_to_the_bucket_nearest_in_aspect_ratio():
    options = bucket_sizes(512, 16)
    for height, width in [(100, 175), (300, 100), (1000, 1001), (480, 640), (901, 1000)]:
        nearest = nearest_bucket((height, width), options)
        losses = {option: cropped_share((height, width), option) for option in options}
        assert losses[nearest] <= min(losses.values()) + 0.02
    assert nearest_bucket((700, 700), options) == (512, 512)


@pytest.mark.slow  # importing diffusers' training_utils takes long
def test_pictures_go_where_diffusers_would_put_them():
    training_utils = pytest.importorskip("diffusers.training_utils")
    find = getattr(training_utils, "find_nearest_bucket", None)
    if find is None:
        pytest.skip("this diffusers has no find_nearest_bucket")
    options = bucket_sizes(512, 16)
    generator = torch.Generator().manual_seed(0)
    for height, width in torch.randint(200, 2000, (300, 2), generator=generator).tolist():
        ours, theirs = (
            nearest_bucket((height, width), options),
            options[find(height, width, options)],
        )
        metric = [abs(height * w - width * h) for h, w in (ours, theirs)]
        assert metric[0] == metric[1]
    assert nearest_bucket((700, 700), options) == (512, 512)


def test_a_folder_in_buckets_loses_less_than_in_squares(tmp_path):
    for i, (width, height) in enumerate([(128, 64), (130, 66), (64, 64), (64, 120), (300, 100)]):
        gradient(width, height).save(tmp_path / f"{i}.png")
    square = encode_folder(tmp_path, 64, same)
    data = encode_folder(tmp_path, 64, same, buckets=True, factor=8)
    assert square.latents.shape == (1, 5, 3, 64, 64)
    shapes = {tuple(bucket.shape[-2:]) for bucket in data.buckets}
    assert (64, 64) in shapes
    assert len(shapes) == 3
    assert data.cropped < square.cropped / 2
    seen = set()
    for step in range(20):
        batch = data.batch(2, 0, step)
        seen |= {float(x0.sum()) for x0 in batch.x0}
    assert len(seen) == 5
    assert sum(len(batch.x0) for batch in data.whole(2)) == 5


def test_what_is_cropped_away_is_told():
    assert cropped_share((100, 100), (64, 64)) == 0
    assert cropped_share((100, 200), (64, 64)) == pytest.approx(0.5)
    assert cropped_share((200, 100), (64, 64)) == pytest.approx(0.5)


def test_the_middle_is_kept_as_pillow_would():
    image = gradient(50, 31)
    ours = cut(image, (16, 24), View())
    theirs = ImageOps.fit(image, (24, 16), Image.Resampling.LANCZOS)
    values = torch.tensor(list(theirs.tobytes())).view(16, 24, 3).permute(2, 0, 1)
    assert torch.equal(((ours + 1) * 127.5).round().long(), values)
    assert torch.equal(cut(image, (16, 24), View(mirror=True)), ours.flip(-1))


def test_random_crops_lie_anywhere_and_follow_from_their_number():
    image = gradient(128, 128)
    views = [cut(image, (32, 32), View(crop=i), seed=5) for i in range(1, 17)]
    assert torch.equal(views[0], cut(image, (32, 32), View(crop=1), seed=5))
    assert not torch.equal(views[0], cut(image, (32, 32), View(crop=1), seed=6))
    lefts = [float(view[0].mean()) for view in views]
    tops = [float(view[1].mean()) for view in views]
    assert max(lefts) - min(lefts) > 0.05
    assert max(tops) - min(tops) > 0.05
    spans = [float(view[0].max() - view[0].min()) / 2 for view in views]
    assert all(0.7 < span <= 1 for span in spans)


def test_a_control_picture_of_another_size_is_cut_like_its_picture():
    for view in views_of(flip=True, crops=3):
        large, small = (cut(gradient(n, n), (32, 32), view, seed=9) for n in (256, 128))
        assert float((large - small).abs().mean()) < 0.02


def test_crops_and_mirrors_are_views():
    assert views_of(False) == (View(),)
    assert views_of(True, 2) == (
        View(), View(True), View(False, 1), View(True, 1), View(False, 2), View(True, 2),
    )  # fmt: skip


def test_the_cameras_rotation_is_applied_to_size_and_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown 90° clockwise
    data = as_bytes(gradient(40, 20), exif=exif)
    assert picture_size(data) == (40, 20)
    turned = decode_picture(data)
    assert turned.size == (20, 40)
    (tmp_path / "a.png").write_bytes(data)
    red = load_picture(tmp_path / "a.png", 20)[0]
    assert float(red[-1].mean()) > float(red[0].mean()) + 0.5  # what was right is now below


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"])
def test_any_kind_of_picture_becomes_rgb(mode, tmp_path):
    name = tmp_path / ("a.png" if mode not in ("CMYK", "F", "I") else "a.tif")
    if mode.startswith("I"):
        image = Image.new(mode, (16, 16), 128 * 256)
    else:
        image = Image.new("L", (16, 16), 128).convert(mode)
    image.save(name)
    got = load_picture(name, 16)
    assert got.shape == (3, 16, 16)
    if mode != "1":
        assert math.isclose(float(got.mean()), 0.0, abs_tol=0.03)
