"""Extraction on diffusers' own models; the page's examples run as they stand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscaler_core import load_task
from diffscaler_core.extraction import extract_task
from diffscaler_core.foreign import class_of

from .tiny_models import TINY

typer_testing = pytest.importorskip("typer.testing")
ROOT = Path(__file__).resolve().parents[2]


def moved(model: Any, by: float = 0.02) -> Any:
    generator = torch.Generator().manual_seed(0)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return tuned


def made(family: str) -> Any:
    torch.manual_seed(0)
    cls, config = TINY[family]
    return cls(**config)


@pytest.mark.parametrize("family", TINY)
def test_state_dicts_of_every_family_tell_their_class_and_layers(family: str) -> None:
    model = made(family)
    tuned = moved(model)
    assert class_of(model.state_dict()) == type(model).__name__
    found = extract_task(tuned, model, 2)
    by_names = extract_task(tuned.state_dict(), model.state_dict(), 2)
    assert by_names.task.layers.keys() == found.task.layers.keys()
    assert by_names.task.info["base"] == found.task.info["base"]
    for layer, own in found.task.layers.items():
        assert all(torch.equal(t, by_names.task.layers[layer][n]) for n, t in own.items())
    left = {one.name for one in found.report.left_out}
    held = {name.partition(".")[2] for name in found.task.layers}
    assert {n.rpartition(".")[0] in held or n in left for n, _ in model.named_parameters()} == {
        True
    }


def test_the_command_reads_a_pipelines_folder_and_writes_nothing_for_a_wrong_pair(
    tmp_path: Path,
) -> None:
    from diffscaler_core.commands import app

    model = made("sd3")
    for name, net in (("base", model), ("tuned", moved(model)), ("other", made("flux"))):
        net.save_pretrained(tmp_path / name / "transformer")
        (tmp_path / name / "model_index.json").write_text("{}")
    out = tmp_path / "mine.safetensors"

    def run(*arguments: Any) -> Any:
        return typer_testing.CliRunner().invoke(app, [str(a) for a in arguments])

    result = run("extract", tmp_path / "other", tmp_path / "base", "-o", out)
    assert result.exit_code == 1
    assert "no fine-tune of" in result.stderr
    assert not out.exists()
    result = run("extract", tmp_path / "tuned", tmp_path / "base", "-o", out, "--rank", "3")
    assert result.exit_code == 0, result.output
    assert "of the change kept" in result.stdout
    wanted = extract_task(moved(model), model, 3).task
    task = load_task(out)
    assert task.name == "mine"
    for layer, own in wanted.layers.items():
        assert all(torch.equal(t, task.layers[layer][n]) for n, t in own.items())
    small = tmp_path / "small.safetensors"
    assert run("resize", out, "-o", small, "--rank", "1").exit_code == 0
    assert {len(t["down"]) for t in load_task(small).layers.values() if "down" in t} == {1}
    assert run("average", out, out, "-o", small).exit_code == 0
    assert load_task(small).num_parameters == task.num_parameters
