"""`diffscaler convert`: LoRA files into tasks and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer")
from typer.testing import CliRunner

from diffscaler_core import load_task
from diffscaler_core.commands import app

LAYER = "lora_unet_joint_blocks_0_x_block_attn_proj"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    tensors = {
        f"{LAYER}.lora_down.weight": torch.randn(2, 16),
        f"{LAYER}.lora_up.weight": torch.randn(16, 2),
        f"{LAYER}.alpha": torch.tensor(1.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_there_and_back(lora: Path, tmp_path: Path) -> None:
    task, back = tmp_path / "task.safetensors", tmp_path / "back.safetensors"
    said = run(lora, task, "--name", "mine")
    assert "left out: 1 text encoder tensors" in said
    assert load_task(task).name == "mine"
    assert load_task(task).info["gain"] == 0.5
    run(task, back, "--to", "kohya")
    tensors, again = load_file(lora), load_file(back)
    assert again.keys() == {key for key in tensors if LAYER in key}
    assert all(torch.equal(tensors[key], tensor) for key, tensor in again.items())


def test_from_one_naming_to_another(lora: Path, tmp_path: Path) -> None:
    facts = json.loads(run(lora, tmp_path / "d.safetensors", "--to", "diffusers", "--json"))
    assert facts["to"] == "diffusers"
    assert facts["imported"]["naming"] == "kohya"
    assert facts["layers"] == 1
    keys = load_file(tmp_path / "d.safetensors").keys()
    assert keys == {f"transformer.transformer_blocks.0.attn.to_out.0.lora_{x}.weight" for x in "AB"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--to", "task"], "task already"),
        ([], "task already"),
        (["--to", "webui"], "unknown --to"),
    ],
)
def test_mistakes_are_one_line(
    lora: Path, tmp_path: Path, options: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "task.safetensors"
    run(lora, task)
    result = CliRunner().invoke(app, ["convert", str(task), str(tmp_path / "x"), *options])
    assert result.exit_code == 1
    assert reason in result.output + capfd.readouterr().err
    strict = CliRunner().invoke(app, ["convert", str(lora), str(task), "--strict"])
    assert strict.exit_code == 1
