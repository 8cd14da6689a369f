import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from diffscaler_core import TaskFileError, new_task, save_task
from diffscaler_core.describe_file import describe_file, file_row, file_values
from diffscaler_core.foreign import class_of, file_facts, names_of_original

typer_testing = pytest.importorskip("typer.testing")

A, B = torch.zeros(4, 8), torch.zeros(8, 4)
FILES = {
    "lora kohya": ({"lora_unet_a.lora_down.weight": A, "lora_unet_a.lora_up.weight": B}, "kohya"),
    "lora PEFT": (
        {"base_model.model.a.lora_A.weight": A, "base_model.model.a.lora_B.weight": B},
        "PEFT",
    ),
    "lora diffusers": (
        {"transformer.a.lora_A.weight": A, "transformer.a.lora_B.weight": B},
        "diffusers",
    ),
    "lora old": ({"unet.a.to_q.lora.down.weight": A, "unet.a.to_q.lora.up.weight": B}, "diffusers"),
    "lora ComfyUI": (
        {"diffusion_model.a.lora_down.weight": A, "diffusion_model.a.lora_up.weight": B},
        "ComfyUI",
    ),
    "dora": (
        {
            "lora_unet_a.dora_scale": B[:, :1],
            "lora_unet_a.lora_down.weight": A,
            "lora_unet_a.lora_up.weight": B,
        },
        "kohya",
    ),
    "loha": (
        {f"lora_unet_a.hada_w{i}_{ab}": t for i in "12" for ab, t in (("a", B), ("b", A))},
        "kohya",
    ),
    "lokr": ({"lycoris_a.lokr_w1": A, "lycoris_a.lokr_w2": B}, "kohya"),
    "oft": ({"oft_unet_a.oft_blocks": torch.zeros(2, 4, 4)}, "kohya"),
    "diff": ({"diffusion_model.a.diff": B, "diffusion_model.a.diff_b": B[0]}, "ComfyUI"),
}


def written(tensors, path, metadata=None):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)


@pytest.mark.parametrize("name", FILES)
def test_adapters_of_other_tools_are_known_by_their_header(name, tmp_path):
    tensors, naming = FILES[name]
    path = tmp_path / "a.safetensors"
    written(tensors, path)
    facts = file_facts(path)
    assert facts.kind.name == name.partition(" ")[0]
    assert facts.naming == naming
    assert facts.layers == 1
    assert facts.parameters == sum(t.numel() for t in tensors.values())
    if "oft" not in name and "lokr" not in name and "diff" not in facts.kind.name:
        assert list(facts.ranks.values()) == [4]
        assert "rank        4" in describe_file(path)
    assert facts.kind.can in describe_file(path)


def test_layers_and_their_ranks_are_listed(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        f"transformer.{n}.lora_{ab}.weight": torch.zeros(*shape)
        for n, rank in (("x", 4), ("y", 4), ("z", 2))
        for ab, shape in (("A", (rank, 8)), ("B", (8, rank)))
    }
    save_file(tensors, path, {"modelspec.architecture": "flux-1-dev/lora"})
    text = describe_file(path, layers=True)
    assert "2 to 4 (4 in 2 layers, 2 in 1 layers)" in text
    assert "  transformer.z: rank 2" in text
    assert "flux-1-dev" in text
    assert file_values(path, layers=True)["ranks_by_layer"] == {
        "transformer.x": 4,
        "transformer.y": 4,
        "transformer.z": 2,
    }


def test_checkpoints_tell_family_and_what_else_they_hold(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": A.half(),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
        "text_encoders.clip_l.x": A,
    }
    save_file(tensors, path)
    facts = file_facts(path)
    assert (facts.kind.name, facts.family, facts.naming) == ("checkpoint", "sd3", "original")
    assert facts.parts == ("VAE", "text encoders")
    assert sum(facts.dtypes.values()) == pytest.approx(1)
    assert names_of_original(tensors) is not None


def test_our_own_tasks_are_described_without_their_tensors(model, tmp_path):
    path = save_task(new_task(model, rank=3, name="mine"), tmp_path / "mine.safetensors")
    raw = path.read_bytes()
    whole = describe_file(path)
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    path.write_bytes(raw[:start] + b"\xff" * (len(raw) - start))  # every tensor is NaN now
    assert describe_file(path) == whole
    assert "mine" in whole
    assert file_row(path)[:2] == ("mine.safetensors", "DiffScaler task")


def test_no_safetensors_is_one_clear_line(tmp_path):
    path = tmp_path / "a.safetensors"
    for data in (b"", b"PK\x03\x04" + bytes(40), b"\x80\x02" + bytes(40), b"<html>" * 9):
        path.write_bytes(data)
        with pytest.raises(TaskFileError, match=r"'a\.safetensors'") as caught:
            describe_file(path)
        assert "\n" not in str(caught.value)
    header = json.dumps({"x": [1]}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TaskFileError, match="malformed"):
        describe_file(path)


def test_a_header_with_a_whole_tag_table_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    tags = json.dumps({f"tag {i}": i for i in range(200_000)})
    written(FILES["lora kohya"][0], path, {"ss_tag_frequency": tags})
    assert file_facts(path).kind.name == "lora"


def test_several_files_are_a_table_and_bad_ones_are_named(model, tmp_path):
    from diffscaler_core.commands import app

    save_task(new_task(model, rank=3, name="mine"), tmp_path / "mine.safetensors")
    written(FILES["loha"][0], tmp_path / "loha.safetensors")
    (tmp_path / "bad.ckpt").write_bytes(b"PK" + bytes(40))
    paths = [str(tmp_path / n) for n in ("mine.safetensors", "loha.safetensors", "bad.ckpt")]
    result = typer_testing.CliRunner().invoke(app, ["info", *paths])
    assert result.exit_code == 1
    assert "pickle" in result.stderr
    for word in ("mine.safetensors", "DiffScaler task", "loha.safetensors", "LoHa"):
        assert word in result.stdout
    result = typer_testing.CliRunner().invoke(app, ["info", "--json", *paths[:2]])
    assert [one["kind"] for one in json.loads(result.stdout)] == ["task", "loha"]


def test_unknown_names_are_no_family():
    assert class_of(["a.weight"]) is None
    assert names_of_original(["a.weight"]) is None
