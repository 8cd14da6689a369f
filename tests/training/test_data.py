from itertools import chain

import pytest
import torch
from PIL import Image

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training.data.prepare import (
    TrainingData,
    encode_folder,
    encode_pictures,
    find_pictures,
    load_picture,
    vae_decode,
    vae_encode,
)


def same(pixels):
    return pixels


def numbered(count, views=1, prompts=2):
    """Data whose latents say which picture (and, in thousands, which view) they are."""
    x0 = torch.arange(float(count)) + 1000 * torch.arange(float(views)).unsqueeze(1)
    names = tuple(f"p{i}" for i in range(prompts))
    return TrainingData(x0.view(views, count, 1, 1, 1), torch.arange(count) % prompts, names)


def shown(data, size, seed, steps):
    return [data.batch(size, seed, step).x0.flatten().tolist() for step in steps]


def test_class_folders_and_captions_name_the_prompts(pictures):
    Image.new("RGB", (16, 16)).save(pictures / "loose.png")
    (pictures / "blue" / "1.txt").write_text("a blue one\n")
    prompts = [picture.prompt for picture in find_pictures(pictures, "mine")]
    assert prompts == ["blue", "a blue one", "blue", "mine", "red", "red", "red"]


def test_a_folder_becomes_latents_with_their_prompts(pictures):
    data = encode_folder(pictures, 16, same, flip=True, batch=4)
    assert data.latents.shape == (2, 6, 3, 16, 16)
    assert data.prompts == ("blue", "red")
    assert data.index.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.latents[1], data.latents[0].flip(-1))
    assert not torch.equal(data.latents[1], data.latents[0])
    assert float(data.latents.min()) >= -1
    assert float(data.latents.max()) == 1
    assert data.shape == (3, 16, 16)
    assert len(set(data.image_ids)) == 6


def test_a_batch_follows_from_its_number_alone():
    data = numbered(10, views=2)
    forth = shown(data, 3, 4, range(30))
    back = shown(numbered(10, views=2), 3, 4, reversed(range(30)))
    assert forth == back[::-1]
    assert forth != shown(data, 3, 5, range(30))
    assert len({tuple(batch) for batch in forth}) > 25


def test_every_epoch_shows_every_picture_once_in_an_order_of_its_own():
    data = numbered(12)
    epochs = [list(chain(*shown(data, 4, 0, range(3 * e, 3 * e + 3)))) for e in range(5)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_an_epochs_last_batch_is_filled_up_from_its_start():
    first, second, last = (set(batch) for batch in shown(numbered(10), 4, 1, range(3)))
    assert len(first) == len(second) == len(last) == 4
    assert first | second | last == set(range(10))


def test_fewer_pictures_than_a_batch_take_turns():
    (batch,) = shown(numbered(3), 8, 0, [5])
    counts = [batch.count(float(i)) for i in range(3)]
    assert sorted(counts) == [2, 3, 3]


def test_views_take_turns_and_keep_their_prompt():
    data = numbered(6, views=2, prompts=3)
    seen = set()
    for step in range(12):
        batch = data.batch(6, 0, step)
        picture, view = batch.x0.flatten() % 1000, batch.x0.flatten() // 1000
        assert torch.equal(batch.index, picture.long() % 3)
        seen |= set(zip(picture.tolist(), view.tolist(), strict=True))
    assert len(seen) == 12
    pairs = [(data.batch(64, 0, step).x0 // 1000).flatten() for step in (0, 1)]
    assert not torch.equal(*pairs)


def test_whole_shows_every_picture_once_as_it_is():
    batches = list(numbered(7, views=2).whole(3))
    assert [len(batch.x0) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.x0 for batch in batches]).flatten().tolist() == list(range(7))
    assert torch.cat([batch.index for batch in batches]).tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_a_split_keeps_each_picture_on_its_side_when_others_come():
    small, large = numbered(60), numbered(100).select(range(5, 100))
    train, validation = small.split(0.2, seed=3)
    assert len(train) + len(validation) == 60
    assert 4 <= len(validation) <= 22
    assert not set(train.image_ids) & set(validation.image_ids)
    both = set(small.image_ids) & set(large.image_ids)
    others = large.split(0.2, seed=3)[1]
    assert set(validation.image_ids) & both == set(others.image_ids) & both
    assert set(validation.image_ids) != set(small.split(0.2, seed=4)[1].image_ids)
    assert train.prompts == validation.prompts == small.prompts
    seen = {x for batch in shown(train, 4, 0, range(40)) for x in batch}
    assert not seen & set(validation.latents.flatten().tolist())


@pytest.mark.parametrize(("share", "sizes"), [(1e-9, (1, 1)), (0.9, (1, 1)), (0, (2, 0))])
def test_a_split_empties_neither_side(share, sizes):
    train, validation = numbered(2).split(share)
    assert (len(train), len(validation)) == sizes
    assert list(validation.whole(2)) == [] or sizes[1]
    assert numbered(1).split(0.5)[0].latents.shape[1] == 1


def test_no_pictures_are_no_batch():
    with pytest.raises(DiffScalerError, match="no pictures"):
        numbered(2).split(0)[1].batch(1, 0, 0)
    with pytest.raises(DiffScalerError, match="no pictures"):
        encode_pictures(lambda i: torch.zeros(3, 8, 8), [], same)


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(DiffScalerError, match="3 pictures but 2 prompt"):
        TrainingData(torch.zeros(1, 3, 1, 1, 1), torch.zeros(2, dtype=torch.long), ("a",))
    with pytest.raises(DiffScalerError, match="one control picture"):
        TrainingData(
            torch.zeros(1, 2, 1, 1, 1),
            torch.zeros(2, dtype=torch.long),
            ("a",),
            control=torch.zeros(1, 1, 1, 1, 1),
        )


def test_pictures_of_different_sizes_go_into_buckets_with_their_control():
    drawn = [torch.full((3, 8, 8 + 8 * (i % 2)), i / 10) for i in range(5)]
    data = encode_pictures(
        lambda i: drawn[i], ["a", "b", "a", "b", "a"], same, load_control=lambda i: -drawn[i]
    )
    assert [tuple(bucket.shape) for bucket in data.buckets] == [(1, 3, 3, 8, 8), (1, 2, 3, 8, 16)]
    assert data.prompts == ("a", "b")
    assert data.shape == (3, 8, 8)
    for step in range(20):
        batch = data.batch(2, 0, step)
        assert torch.equal(batch.control, -batch.x0)
        assert batch.x0.shape[-1] == (8, 16)[int(batch.index[0])]
    train, validation = data.split(0.4)
    assert len(train) + len(validation) == 5
    assert all(torch.equal(batch.control, -batch.x0) for batch in validation.whole(8))


def test_transparent_pictures_lie_on_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((load_picture(tmp_path / "clear.png", 16) == 1).all())
    assert load_picture(tmp_path / "clear.png", 16, channels=1).shape == (1, 16, 16)


def test_an_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(DiffScalerError, match="holds no picture"):
        encode_folder(tmp_path, 16, same)
    with pytest.raises(DiffScalerError, match="is no folder"):
        encode_folder(tmp_path / "nowhere", 16, same)


def test_bad_pictures_are_all_named_before_training(pictures):
    (pictures / "red" / "broken.png").write_bytes(b"no picture at all")
    Image.new("RGB", (4, 40)).save(pictures / "red" / "thin.png")
    (pictures / "red" / "1.txt").write_bytes(b"\xff\xfe caf\xe9")
    with pytest.raises(DiffScalerError, match="3 of 8 pictures cannot be used") as caught:
        encode_folder(pictures, 16, lambda pixels: pytest.fail("encoded before all were tried"))
    assert "red/broken.png (cannot be read: no picture that Pillow knows)" in str(caught.value)
    assert "red/thin.png (4x40 is too small for 16x16)" in str(caught.value)
    assert "red/1.png (1.txt is not UTF-8 text)" in str(caught.value)
    assert "\n" not in str(caught.value)
    data = encode_folder(pictures, 16, same, skip_bad=True)
    assert len(data) == 5
    assert len(data.skipped) == 3


def test_a_truncated_picture_is_refused(pictures):
    whole = (pictures / "red" / "0.png").read_bytes()
    (pictures / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DiffScalerError, match=r"1 of 6 .*red/0\.png"):
        encode_folder(pictures, 16, same)


def test_a_folder_of_only_bad_pictures_is_refused_even_when_skipping(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DiffScalerError, match=r"1 of 1 pictures .*the file is empty"):
        encode_folder(tmp_path, 16, same, skip_bad=True)


def test_a_picture_that_vanishes_after_it_was_found_is_named(pictures):
    gone = pictures / "red" / "2.png"

    def encode(pixels):
        gone.unlink(missing_ok=True)
        return pixels

    whole = gone.read_bytes()
    with pytest.raises(DiffScalerError, match=r"1 of 6 .*red/2\.png \(is no longer there\)"):
        encode_folder(pictures, 16, encode, batch=2)
    gone.write_bytes(whole)
    data = encode_folder(pictures, 16, encode, batch=2, skip_bad=True)
    assert len(data) == len(data.image_ids) == 5
    assert data.skipped == ("red/2.png (is no longer there)",)


def test_a_picture_that_changes_after_it_was_looked_at_is_named(pictures, tmp_path):
    def encode(pixels):
        Image.new("RGB", (20, 20)).save(pictures / "red" / "2.png")
        return pixels

    with pytest.raises(DiffScalerError, match=r"red/2\.png \(changed while it was looked at\)"):
        encode_folder(pictures, 16, encode, batch=2, cache=tmp_path / "c", encoder_key="k")


def test_a_vae_that_overflows_is_named(pictures):
    with pytest.raises(DiffScalerError, match=r"VAE gave NaN or Inf for blue/0\.png"):
        encode_folder(pictures, 16, lambda pixels: pixels / 0)


def test_latents_are_scaled_and_shifted_as_the_pipelines_do():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, scaling_factor=1.5, shift_factor=0.25
    ).eval()
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = vae_encode(vae)(pixels)
        mean = vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, (mean - 0.25) * 1.5)
        shown = vae_decode(vae)(latents)
        torch.testing.assert_close(shown, vae.decode(mean).sample.clamp(-1, 1))
