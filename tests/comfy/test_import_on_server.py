"""Importing a LoRA behind a real server, beside ComfyUI's own LoRA loader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

POCKET = "diffscaler_pocket.safetensors"
MODEL = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "diffusion_models" / POCKET
Graph = dict[str, Any]


def _node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def write_lora(path: Path, seed: int) -> None:
    """A random LoRA of the pocket base in kohya's naming, with a text encoder's layer."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(str(MODEL), "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    for key, (out, width, *_) in ((k, s) for k, s in shapes.items() if k.endswith("to_q.weight")):
        for layer, rows in (("attn_qkv", 3 * out), ("attn_proj", out)):
            name = f"lora_unet_joint_blocks_{key.split('.')[1]}_x_block_{layer}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=g) * 0.1
            tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 2, generator=g) * 0.1
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    assert tensors
    for part, shape in (("down", (2, 8)), ("up", (8, 2))):
        key = f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{part}.weight"
        tensors[key] = torch.ones(shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def graph(prefix: str, stock: str) -> Graph:
    """The pocket base with ComfyUI's LoRA loader and with the imported task."""
    nodes = {
        "model": _node("UNETLoader", unet_name=POCKET, weight_dtype="default"),
        "words": _node("DiffScalerLoadTask", task_name="words.safetensors"),
        "positive": _node("DiffScalerTaskConditioning", task=["words", 0], prompt="cat"),
        "negative": _node("DiffScalerTaskConditioning", task=["words", 0], prompt=""),
        "latent": _node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "stock": _node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=stock, strength_model=1.0
        ),
        "import": _node("DiffScalerImportLoRA", lora_name="l.safetensors"),
        "ours": _node("DiffScalerApplyTask", model=["model", 0], task=["import", 0], strength=1.0),
    }
    for name in ("model", "stock", "ours"):
        nodes[f"sample_{name}"] = _node(
            "KSampler",
            model=[name, 0],
            seed=0,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="normal",
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            denoise=1.0,
        )
        nodes[f"save_{name}"] = _node(
            "SaveLatent", samples=[f"sample_{name}", 0], filename_prefix=f"{prefix}/{name}"
        )
    return nodes


def latents(server: Any, prefix: str, stock: str = "l.safetensors") -> dict[str, torch.Tensor]:
    server.run(graph(prefix, stock))
    folder = server.log.parent / "output" / prefix
    return {
        name: load_file(folder / f"{name}_00001_.latent")["latent_tensor"]
        for name in ("model", "stock", "ours")
    }


def test_the_import_node_does_what_comfyuis_loader_does(server: Any) -> None:
    file = server.log.parent / "models" / "loras" / "l.safetensors"
    write_lora(file, 1)
    first = latents(server, "import_1")
    assert (first["ours"] - first["model"]).abs().max() > 1e-2
    torch.testing.assert_close(first["ours"], first["stock"], atol=1e-4, rtol=1e-4)
    write_lora(file, 2)  # an overwritten file is read again
    write_lora(file.with_name("other.safetensors"), 2)  # ComfyUI's loader would not read it again
    second = latents(server, "import_2", "other.safetensors")
    assert (second["ours"] - first["ours"]).abs().max() > 1e-2
    torch.testing.assert_close(second["ours"], second["stock"], atol=1e-4, rtol=1e-4)


def test_it_says_what_was_left_out_or_refuses(server: Any) -> None:
    write_lora(server.log.parent / "models" / "loras" / "l.safetensors", 3)
    node = _node("DiffScalerImportLoRA", lora_name="l.safetensors")
    history = server.run({"import": node})
    (text,) = history["outputs"]["import"]["text"]
    assert "left out: 2 text encoder tensors" in text
    assert "kohya naming" in text
    node["inputs"]["text_encoder"] = "refuse"
    with pytest.raises(Exception, match="text encoder"):
        server.run({"import": node})
