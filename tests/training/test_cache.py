import copy
import errno
import logging
import os
import shutil
from functools import partialmethod

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training.data import cache as cache_file
from diffscaler_core.training.data.cache import Cache, StoredLatents, cached_texts, encoder_key
from diffscaler_core.training.data.prepare import encode_folder, encode_pictures


class Counting:
    """An encoder that counts the pictures it is given."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 4, 2, 2)
        self.count = 0

    def __call__(self, pixels):
        self.count += len(pixels)
        return self.net(pixels)

    def encode(self, folder, size=16, **options):
        before = self.count
        options = {"cache": folder.with_name("cache"), "encoder_key": "one", **options}
        data = encode_folder(folder, size, self, **options)
        return data, self.count - before


@pytest.fixture
def encoder():
    return Counting()


def files(folder):
    return sorted(folder.with_name("cache").rglob("*.safetensors"))


def test_the_second_run_encodes_nothing_and_is_bit_for_bit_the_first(encoder, pictures):
    options = {"flip": True, "crops": 1, "batch": 4}
    first, encoded = encoder.encode(pictures, **options)
    assert encoded == 6 * 4
    second, encoded = encoder.encode(pictures, **options)
    assert encoded == 0
    assert torch.equal(first.latents, second.latents)
    assert first.image_ids == second.image_ids
    fewer, encoded = encoder.encode(pictures)
    assert encoded == 0
    assert torch.equal(fewer.latents[0], first.latents[0])


def test_without_a_folder_or_a_key_nothing_is_kept(encoder, pictures):
    for options in ({"cache": None}, {"encoder_key": None}):
        assert encoder.encode(pictures, **options)[1] == 6
    assert not files(pictures)


@pytest.mark.parametrize("what", ["pixel", "size", "encoder", "channels"])
def test_what_changes_the_latents_is_encoded_anew(encoder, pictures, what):
    encoder.encode(pictures)
    options, expected = {}, 6
    if what == "pixel":
        image, expected = Image.open(pictures / "red" / "0.png"), 1
        image.putpixel((5, 5), (1, 2, 3))
        image.save(pictures / "red" / "0.png")
    elif what == "size":
        options["size"] = 12
    elif what == "encoder":
        options["encoder_key"] = "two"
    else:
        encoder.net = nn.Conv2d(1, 4, 2, 2)
        options["channels"] = 1
    assert encoder.encode(pictures, **options)[1] == expected
    assert encoder.encode(pictures, **options)[1] == 0


def test_one_control_picture_of_two_pictures_is_cut_as_each_of_them(encoder, pictures):
    edges = pictures.with_name("edges")
    shutil.copytree(pictures, edges)
    edge = (edges / "red" / "0.png").read_bytes()
    for path in edges.rglob("*.png"):
        path.write_bytes(edge)
    options = {"control": edges, "crops": 2}
    first = encoder.encode(pictures, **options)[0]
    second, encoded = encoder.encode(pictures, **options)
    plain = encoder.encode(pictures, cache=None, **options)[0]
    assert encoded == 0
    assert torch.equal(first.control, second.control)
    torch.testing.assert_close(first.control, plain.control)
    torch.testing.assert_close(first.control[0, 3], first.control[0, 4])
    assert float((first.control[1, 3] - first.control[1, 4]).abs().max()) > 0.01


def flipped(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"no tensors at all",
        flipped,
        lambda data: data.replace(b"diffscaler.cache", b"somebody.elses_c"),
        lambda data: b"\xff" * 8 + data[8:],
    ],
    ids=["half", "empty", "text", "one bit", "foreign", "header"],
)
def test_a_harmed_file_is_noticed_and_encoded_anew(encoder, pictures, harm):
    first = encoder.encode(pictures)[0]
    target = files(pictures)[2]
    target.write_bytes(harm(target.read_bytes()))
    second, encoded = encoder.encode(pictures)
    assert encoded == 1
    torch.testing.assert_close(first.latents, second.latents)  # one alone may round differently
    third, encoded = encoder.encode(pictures)
    assert encoded == 0
    assert torch.equal(second.latents, third.latents)


def test_a_file_under_another_ones_name_is_not_believed(encoder, pictures):
    encoder.encode(pictures)
    one, other = files(pictures)[:2]
    shutil.copy(one, other)
    assert encoder.encode(pictures)[1] == 1
    save_file({"x0": torch.zeros(4, 8, 8)}, other)
    assert encoder.encode(pictures)[1] == 1


def full_disk(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_warning_and_training_goes_on(encoder, pictures, monkeypatch, caplog):
    expected = encoder.encode(pictures, cache=None)[0]
    monkeypatch.setattr(cache_file, "write_whole", full_disk)
    with caplog.at_level(logging.WARNING):
        data, _ = encoder.encode(pictures, memory=0)
    assert torch.equal(data.latents, expected.latents)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_warning(encoder, pictures, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    data, _ = encoder.encode(pictures, cache=tmp_path / "file" / "cache")
    assert len(data) == 6
    assert len(caplog.records) == 1


def test_nothing_half_written_stays(encoder, pictures, monkeypatch):
    def crash(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(pictures)
    assert not [path for path in pictures.with_name("cache").rglob("*") if path.is_file()]


def counted(cache, get, read, key):
    read.append(key)
    return get(cache, key)


def test_beyond_the_memory_latents_are_read_batch_by_batch(encoder, pictures, monkeypatch):
    held = encoder.encode(pictures, flip=True)[0]
    each = held.latents[0, 0].nbytes
    for memory, in_memory in ((0, 0), (3 * each, 3)):
        lazy, encoded = encoder.encode(pictures, flip=True, memory=memory)
        assert encoded == 0
        assert isinstance(lazy.latents, StoredLatents)
        assert lazy.latents.shape == held.latents.shape
        read: list[str] = []
        monkeypatch.setattr(Cache, "get", partialmethod(counted, Cache.get, read))
        for step in range(6):
            assert torch.equal(lazy.batch(2, 0, step).x0, held.batch(2, 0, step).x0)
        assert 12 - 2 * 2 * in_memory <= len(read) <= 12
        monkeypatch.undo()
    for mine, theirs in zip(lazy.split(0.4, 1), held.split(0.4, 1), strict=True):
        pairs = zip(mine.whole(2), theirs.whole(2), strict=True)
        assert all(torch.equal(one.x0, other.x0) for one, other in pairs)


def test_the_first_run_too_holds_no_more_than_the_memory(encoder, pictures):
    data = encoder.encode(pictures, memory=1)[0]
    held = [e for view in data.latents.entries for e in view if isinstance(e, torch.Tensor)]
    assert len(held) == 1
    assert torch.equal(data.batch(6, 0, 0).x0, encoder.encode(pictures)[0].batch(6, 0, 0).x0)


def test_latents_that_vanish_during_training_are_named(encoder, pictures):
    data = encoder.encode(pictures, memory=0)[0]
    for path in files(pictures):
        path.unlink()
    with pytest.raises(DiffScalerError, match="gone or broken"):
        data.batch(2, 0, 0)


def test_drawn_pictures_are_cached_by_their_pixels(encoder, tmp_path):
    drawn = torch.rand(3, 3, 8, 8)
    options = {"cache": tmp_path, "encoder_key": "k", "flip": True}
    first = encode_pictures(lambda i: drawn[i], ["a"] * 3, encoder, **options)
    assert encoder.count == 6
    second = encode_pictures(lambda i: drawn[i], ["b"] * 3, encoder, **options)
    assert encoder.count == 6
    assert torch.equal(first.latents, second.latents)
    drawn[1, 0, 0, 0] += 0.01
    encode_pictures(lambda i: drawn[i], ["a"] * 3, encoder, **options)
    assert encoder.count == 8


def test_an_encoder_is_known_by_its_weights_config_and_dtype():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 70), nn.BatchNorm1d(70))
    net.config = {"scaling_factor": 1.0, "_name_or_path": "here"}
    key = encoder_key(net)
    same = copy.deepcopy(net)
    same.config["_name_or_path"] = "there"
    assert encoder_key(same) == key

    def changed(change):
        other = copy.deepcopy(net)
        change(other)
        return encoder_key(other)

    def one_weight(other):
        with torch.no_grad():
            weight = other[0].weight
            weight[7, 123] = torch.nextafter(weight[7, 123], torch.tensor(9.0))

    keys = [
        key,
        changed(one_weight),
        changed(lambda other: other[1].running_mean.add_(1)),
        changed(lambda other: other.config.update(scaling_factor=2.0)),
        changed(lambda other: other.bfloat16()),
        changed(lambda other: setattr(other[1], "weight", None)),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert encoder_key(net.to("meta")) is None


def test_a_real_autoencoder_has_the_same_key_when_it_is_loaded_again(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path)
    assert encoder_key(vae) == encoder_key(diffusers.AutoencoderKL.from_pretrained(tmp_path))
    vae.register_to_config(scaling_factor=0.5)
    assert encoder_key(vae) != encoder_key(diffusers.AutoencoderKL.from_pretrained(tmp_path))


class Texts:
    """A text encoder that pads to a fixed length, or to the longest."""

    def __init__(self, length=None):
        self.length, self.told = length, []

    def __call__(self, texts):
        self.told.append(list(texts))
        longest = self.length or max(map(len, texts))
        context = torch.zeros(len(texts), longest, 2, dtype=torch.bfloat16)
        for i, text in enumerate(texts):
            context[i, : len(text), 0] = torch.tensor([float(ord(letter)) for letter in text])
        return {"context": context, "pooled": context.sum(1)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_new_texts_are_encoded(tmp_path):
    texts = Texts(5)
    cached_texts(texts, ["cat", "dog", ""], "key", tmp_path)
    got = cached_texts(texts, ["", "bird", "cat"], "key", tmp_path)
    assert texts.told == [["cat", "dog", ""], ["bird"]]
    assert equal(got, Texts(5)(["", "bird", "cat"]))
    cached_texts(texts, ["cat"], "other", tmp_path)
    assert texts.told[-1] == ["cat"]
    for key, folder in ((None, tmp_path), ("key", None)):
        assert equal(cached_texts(texts, ["cat"], key, folder), Texts(5)(["cat"]))
        assert texts.told[-1] == ["cat"]


def test_texts_padded_to_the_longest_are_encoded_together(tmp_path):
    texts = Texts()
    for _ in range(2):
        got = cached_texts(texts, ["a", "long"], "key", tmp_path, batch=1)
        assert equal(got, Texts()(["a", "long"]))
