"""Data cut into parts, and the router's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffscaler_core import DiffScalerError
from diffscaler_core.errors import TaskFileError
from diffscaler_core.systems.clusters import k_means
from diffscaler_core.systems.partition import CONFIG, by_cluster, by_folder, write_parts
from diffscaler_core.systems.router import HEADER, Router, Site, load_router, save_router
from diffscaler_core.training.config_file import read_config
from diffscaler_core.training.data.sources import find_examples

SITE = Site(1, 3, 1, {"class": "Toy", "family": "unknown", "fingerprint": "0" * 16, "targets": 3})


# --- parts ----------------------------------------------------------------------------------------


def test_k_means_finds_clusters_and_says_how_tight_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    points = centres[truth] + 0.2 * torch.randn(60, 2, generator=generator)
    order = torch.randperm(60, generator=generator)
    found = k_means(points[order], 3)
    assert torch.equal(found.labels, truth[order])  # the largest first
    assert found.spread < 0.05
    assert torch.equal(k_means(points[order], 3).labels, found.labels)
    loose = k_means(torch.randn(60, 8, generator=generator), 3)
    assert loose.spread > 0.5  # no clusters are said to be none
    with pytest.raises(DiffScalerError, match="1 distinct pictures cannot be cut into 2"):
        k_means(torch.ones(5, 2), 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / "all" / part).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), colour).save(tmp_path / "all" / part / f"{i}.png")
    return tmp_path / "all"


def test_parts_are_lists_and_a_configuration_that_train_takes(folder: Path, tmp_path: Path) -> None:
    examples = find_examples(folder)
    parts = by_folder(examples)
    assert {name: len(own) for name, own in parts.items()} == {"blue": 3, "red": 3}
    written = write_parts(tmp_path / "parts", examples, parts, "assets/pocket")
    for name, path in written.items():
        again = find_examples(path)
        assert [one.source.resolve() for one in again] == [  # type: ignore[union-attr]
            folder / name / f"{i}.png" for i in range(3)
        ]
        assert {one.prompt for one in again} == {name}
    settings = read_config(tmp_path / "parts" / CONFIG)
    assert settings.base == "assets/pocket"
    assert {one.name: Path(one.data) for one in settings.tasks} == written
    assert [one.out.name for one in settings.tasks] == ["blue.safetensors", "red.safetensors"]


def test_what_cannot_be_cut_is_refused(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "beside.png")
    examples = find_examples(folder)
    with pytest.raises(DiffScalerError, match="1 pictures beside 2 sub-folders"):
        by_folder(examples)
    with pytest.raises(DiffScalerError, match="would be one file"):
        write_parts(tmp_path / "out", examples, {"A": [0], "a": [1]}, "b")
    with pytest.raises(DiffScalerError, match="'c' is empty"):
        write_parts(tmp_path / "out", examples, {"a": [0], "c": []}, "b")
    assert not (tmp_path / "out").exists()


def test_clusters_become_parts() -> None:
    found = k_means(torch.tensor([[0.0], [0.1], [5.0], [0.2]]), 2)
    assert by_cluster(found) == {"part1": [0, 1, 3], "part2": [2]}


# --- the router's file ----------------------------------------------------------------------------


def router(hidden: int = 5) -> Router:
    torch.manual_seed(0)
    null = {"context": torch.randn(1, 2, 4), "pooled": torch.randn(1, 3)}
    own = Router(["red", "blue"], SITE, 6, hidden, null, {"accuracy": 0.9})
    own.mean.normal_()
    return own


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_router_comes_back_as_it_was(hidden: int, tmp_path: Path) -> None:
    own = router(hidden)
    back = load_router(save_router(own, tmp_path / "r.safetensors"))
    assert (back.parts, back.site, back.facts) == (own.parts, SITE, {"accuracy": 0.9})
    x, alpha, sigma = torch.randn(4, 6), torch.rand(4), torch.rand(4)
    assert torch.equal(back.posterior(x, alpha, sigma), own.posterior(x, alpha, sigma))
    assert torch.equal(back.null["context"], own.null["context"])
    half = load_router(save_router(own, tmp_path / "h.safetensors", torch.float16))
    close = half.posterior(x, alpha, sigma) - own.posterior(x, alpha, sigma)
    assert 0 < float(close.abs().max()) < 0.01


def test_the_router_is_told_the_noise_and_only_its_ratio() -> None:
    own, x = router(), torch.zeros(1, 6)
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    here = own.posterior(x, alpha, sigma)
    assert torch.allclose(own.posterior(x, alpha / 0.8, sigma / 0.8), here, atol=1e-6)
    assert not torch.allclose(own.posterior(x, sigma, alpha), here, atol=1e-3)
    clean_and_pure = own.posterior(x.repeat(2, 1), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1]))
    assert bool(torch.isfinite(clean_and_pure).all())


def test_a_file_that_is_no_router_is_refused(tmp_path: Path) -> None:
    path = save_router(router(), tmp_path / "r.safetensors")
    tensors = load_file(path)
    told = {
        "version": "1", "parts": ["red", "blue"], "block": 1, "blocks": 3, "pool": 1,
        "base": {"class": "Toy"}, "width": 6, "hidden": 5,
    }  # fmt: skip

    def refused(tensors: dict[str, torch.Tensor], header: Any) -> str:
        metadata = None if header is None else {HEADER: json.dumps(header)}
        save_file(tensors, tmp_path / "bad.safetensors", metadata)
        with pytest.raises(TaskFileError) as error:
            load_router(tmp_path / "bad.safetensors")
        return str(error.value)

    save_file(tensors, tmp_path / "good.safetensors", {HEADER: json.dumps(told)})
    assert load_router(tmp_path / "good.safetensors").parts == ("red", "blue")
    assert "holds no router" in refused(tensors, None)
    assert "version '2'" in refused(tensors, {**told, "version": "2"})
    assert "names its parts" in refused(tensors, {**told, "parts": ["red", "red"]})
    assert "names its parts" in refused(tensors, {**told, "parts": ["red"]})
    assert "block 3" in refused(tensors, {**told, "block": 3})
    assert "width -1" in refused(tensors, {**told, "width": -1})
    assert "hidden 99999999" in refused(tensors, {**told, "hidden": 99999999})
    assert "base" in refused(tensors, {**told, "base": {"class": ["a"]}})
    assert "other tensors" in refused(tensors, {**told, "width": 7})
    assert "other tensors" in refused({**tensors, "more": torch.zeros(1)}, told)
    assert "other tensors" in refused({k: v.long() for k, v in tensors.items()}, told)
    short = {k: v for k, v in tensors.items() if k != "last.bias"}
    assert "'last.bias'" in refused(short, told)
    spoilt = {**tensors, "mean": torch.full((6,), float("nan"))}
    assert "NaN or Inf" in refused(spoilt, told)
    assert "not above 0" in refused({**tensors, "std": torch.zeros(6)}, told)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-8])
    with pytest.raises(TaskFileError):
        load_router(tmp_path / "cut.safetensors")
    with pytest.raises(TaskFileError, match="no file"):
        load_router(tmp_path / "none.safetensors")
    with pytest.raises(TaskFileError, match="must end in"):
        load_router(tmp_path / "r.pt")
