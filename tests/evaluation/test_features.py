"""The small feature network as it ships, and how networks are found and refused."""

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from diffscaler_core import DiffScalerError, UnknownNameError
from diffscaler_core.evaluation import (
    FEATURES,
    FeatureNet,
    frechet_distance,
    kernel_distance,
    load_features,
)
from diffscaler_core.evaluation.features import POCKET
from diffscaler_core.evaluation.small_net import HEADER
from diffscaler_core.training import find_pictures
from diffscaler_core.training.data.prepare import load_picture

WORDS = ("cat", "frog", "rocket", "star", "guitar", "house")


def pictures_of(folder, size=128):
    return torch.stack([load_picture(one.source, size) for one in find_pictures(folder)])


@pytest.fixture(scope="module")
def sets(drawn):
    """Two draws each of three styles and of new subjects."""
    return {
        name: [pictures_of(drawn(name, 16, own, seed), 64) for seed in (1, 2)]
        for name, own in {"base": WORDS, "ink": WORDS, "neon": WORDS, "smileys": ()}.items()
    }


def test_the_shipped_network_is_small_and_says_what_it_is(net):
    assert POCKET.stat().st_size <= 150_000
    assert net.name == "pocket features"
    assert "only" in net.note
    assert net.size == 64
    assert {"cat", "strawberry", "smile"} <= set(net.classes)
    assert net.heads["style"] == ("plain", "ink", "neon", "blueprint")
    assert load_features().key == net.key


def test_it_tells_sets_apart(net, sets):
    found = {name: [net(half) for half in halves] for name, halves in sets.items()}
    within = max(frechet_distance(a, b) for a, b in found.values())
    between = min(
        frechet_distance(found[a][0], found[b][1]) for a, b in itertools.permutations(found, 2)
    )
    assert between > 5 * within


def test_distances_grow_with_the_share_of_wrong_pictures(net, sets):
    # The only ground truth there is: how many pictures are of another set.
    real, right, wrong = net(sets["base"][0]), net(sets["base"][1]), net(sets["ink"][1])
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    frechet, kernel = [], []
    for share in (0, 0.125, 0.25, 0.5, 0.75, 1):
        swapped = order[: round(share * len(order))]
        made = right.clone()
        made[swapped] = wrong[swapped]
        frechet.append(frechet_distance(real, made))
        kernel.append(kernel_distance(real, made).mean)
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    assert frechet[-1] > 10 * frechet[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda x, n: x + n * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
        lambda x, n: F.interpolate(
            F.interpolate(x, scale_factor=1 / (1 + 2 * n), mode="area"), x.shape[2:]
        ),
        lambda x, n: x.lerp(x.roll(17, 0), n),
    ],
    ids=["noise", "pixels", "ghost"],
)
def test_damaged_pictures_are_farther_the_more_they_are_damaged(net, sets, damage):
    real, other = sets["base"]
    found = [
        frechet_distance(net(real), net(damage(other, amount).clamp(-1, 1)))
        for amount in (0.0, 0.2, 0.5)
    ]
    assert found[0] < found[1] < found[2]


def test_it_reads_what_is_drawn_and_how(net, drawn):
    folder = drawn("neon", 8, WORDS, 3)
    shown = [one.prompt for one in find_pictures(folder)]
    images = pictures_of(folder)
    right = [
        net.classes[i] == word
        for i, word in zip(net.classify(images).argmax(1).tolist(), shown, strict=True)
    ]
    assert sum(right) > 0.9 * len(right)
    assert (net.classify(images, "style").argmax(1) == net.heads["style"].index("neon")).all()
    assert net.classify(images).shape == (len(images), len(net.classes))


def test_size_hardly_matters_and_the_batch_not_at_all(net, drawn):
    large = pictures_of(drawn("base", 4, WORDS, 4))
    small = F.interpolate(large, (64, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(net(large), net(small))
    torch.testing.assert_close(torch.cat([net(large[i : i + 1]) for i in range(8)]), net(large[:8]))
    # Of any sizes, in order.
    mixed = [large[0], small[1], small[2], large[3]]
    torch.testing.assert_close(net.of(iter(mixed)), net(large[:4]))
    assert net.of([]).shape == (0, 64)


def test_grey_pictures_are_grey_in_colour(net):
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)))


def test_a_network_of_ones_own_is_a_function():
    own = FeatureNet("mean colour", 3, lambda images: images.mean((2, 3)))
    x = torch.rand(70, 3, 8, 8)  # more than one batch
    torch.testing.assert_close(own(x), x.mean((2, 3)))
    assert own.classes == ()
    with pytest.raises(UnknownNameError, match="mean colour"):
        own.classify(x)
    wrong = FeatureNet("wrong", 4, lambda images: images.mean((2, 3)))
    with pytest.raises(DiffScalerError, match=r"gave \(70, 3\), not \(70, 4\)"):
        wrong(x)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 8, 8)])
def test_what_is_no_batch_of_pictures_is_refused(net, shape):
    with pytest.raises(DiffScalerError, match="pictures are"):
        net(torch.zeros(shape))


def test_unknown_networks_and_questions_are_named(net):
    with pytest.raises(UnknownNameError, match="'vgg'; known: pocket, inception, <file>"):
        load_features("vgg")
    with pytest.raises(UnknownNameError, match="'mood'; known: word, style, damage"):
        net.classify(torch.zeros(1, 3, 8, 8), "mood")
    assert list(FEATURES) == ["pocket", "inception"]


def test_inception_is_never_downloaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(DiffScalerError, match="pip install torch-fidelity"):
        load_features("inception")


def broken(tmp_path, change):
    tensors = load_file(POCKET)
    with open(POCKET, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length))["__metadata__"]
    change(tensors, metadata)
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: metadata.pop(HEADER), "no feature network"),
        (lambda tensors, metadata: tensors.pop("project.bias"), "other layers.*project.bias"),
        (lambda tensors, metadata: tensors.update(more=torch.zeros(2)), "other layers.*more"),
        (lambda tensors, metadata: tensors["project.bias"].fill_(torch.nan), "NaN"),
        (lambda tensors, metadata: metadata.update({HEADER: "{}"}), "cannot be read"),
        (lambda tensors, metadata: metadata.update({HEADER: "["}), "cannot be read"),
    ],
)
def test_broken_files_are_refused(tmp_path, change, message):
    with pytest.raises(DiffScalerError, match=message) as error:
        load_features(broken(tmp_path, change))
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(DiffScalerError, match="no file"):
        load_features(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(DiffScalerError, match="no safetensors file"):
        load_features(tmp_path / "text.safetensors")
