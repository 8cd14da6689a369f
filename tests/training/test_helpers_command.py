"""`diffscaler train` with repa, debias and refine: what it is told, what it writes."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("typer.testing")

from diffscaler_core import load_task
from diffscaler_core.training.run_folder import read_log

from .runs import same
from .test_command import one_line, run, train


@pytest.fixture
def told(words_file):
    return ["--words", words_file, "--name", "t"]


def test_an_alignment_is_logged_and_no_path_goes_into_the_file(base, pictures, told, tmp_path):
    from diffscaler_core.evaluation.features import POCKET

    out, plain = tmp_path / "aligned.safetensors", tmp_path / "plain.safetensors"
    more = ["--repa", POCKET, "--repa-until", 0.7, "--repa-width", 16]
    result = train(base, pictures, out, *told, *more)
    assert result.exit_code == 0, result.output
    entries = read_log(tmp_path / "aligned" / "log.jsonl")
    assert ["alignment" in entry for entry in entries] == [True, True, False]
    task = load_task(out)
    assert task.info["training"]["repa"] == "features.safetensors"
    assert str(POCKET.parent) not in json.dumps(dict(task.info))
    assert train(base, pictures, plain, *told).exit_code == 0
    assert not same(load_task(plain), task)
    assert run("train", tmp_path / "aligned" / "config.toml", "--plan").exit_code == 0
    refused = train(base, pictures, tmp_path / "x.safetensors", *told, "--repa", "nowhere")
    one_line(refused, "no picture encoder 'nowhere'")


def test_hidden_groups_are_told_and_kept(base, pictures, told, tmp_path):
    usual, even = tmp_path / "usual.safetensors", tmp_path / "even.safetensors"
    assert train(base, pictures, usual, *told).exit_code == 0
    more = ["--debias", 1, "--debias-from", usual]
    result = train(base, pictures, even, *told, *more)
    assert result.exit_code == 0, result.output
    assert "'blue', 3 pictures: 50% at" in result.stderr
    kept = json.loads((tmp_path / "even" / "groups.json").read_text())
    assert len(kept["pictures"]) == 6
    again = tmp_path / "again.safetensors"
    written = tmp_path / "even" / "config.toml"
    assert run("train", written, "--out", again, "--folder", tmp_path / "f").exit_code == 0
    assert same(load_task(again), load_task(even))
    refused = train(base, pictures, tmp_path / "x.safetensors", *told, *more, "--accumulate", 2)
    one_line(refused, "not the sum of its parts")


def test_a_refine_task_needs_plain_pictures_alone(base, pictures, told, tmp_path):
    files = {}
    for strength in (1, 0.4):
        out = tmp_path / f"refine{strength}.safetensors"
        more = ["--control", "refine", "--control-strength", strength]
        result = train(base, pictures, out, *told, *more)
        assert result.exit_code == 0, result.output
        files[strength] = load_task(out)
        assert files[strength].info["control"]["kind"] == "refine"
    assert not same(files[1], files[0.4])
    for more in (["--control", "edges", "--control-strength", 0.5],
                 ["--control", "refine", "--control-strength", 2]):  # fmt: skip
        refused = train(base, pictures, tmp_path / "x.safetensors", *told, *more)
        one_line(refused, "control_strength")
