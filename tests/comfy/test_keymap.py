"""What the key map refuses, and what it does with names it does not know."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

DIM = 128
SD3 = dict(
    in_channels=16,
    out_channels=16,
    patch_size=2,
    depth=2,
    input_size=None,
    adm_in_channels=16,
    context_embedder_config={
        "target": "torch.nn.Linear",
        "params": {"in_features": 32, "out_features": DIM},
    },
    num_patches=64,
    pos_embed_max_size=8,
    pos_embed_scaling_factor=None,
)


@pytest.fixture(scope="module")
def keymap(part: Any) -> ModuleType:
    return part("nodes.keymap")


@pytest.fixture
def sd3(comfy: ModuleType) -> Any:
    """ComfyUI's own tiny SD3, two blocks wide 128, without weights."""
    import comfy.supported_models

    host = comfy.supported_models.SD3(dict(SD3))
    host.set_inference_dtype(torch.float32, None)
    return host.get_model({}, "", device="meta")


def new_task(part: Any, model: Any, **options: Any) -> Any:
    return part("diffscaler_core").new_task(model, rank=2, name="flowers", **options)


def message(part: Any, act: Callable[[], object]) -> str:
    with pytest.raises(part("diffscaler_core").MismatchError) as caught:
        act()
    return str(caught.value)


def test_another_architecture_is_refused_with_both_names(part: Any, keymap: Any, sd3: Any) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=1)
    task = new_task(part, flux, targets=r"single_.*\.proj_mlp")
    text = message(part, lambda: keymap.native_layers(task, sd3))
    assert "task 'flowers', made for flux (FluxTransformer2DModel) with 2 layers" in text
    assert "does not fit this SD3 (SD3Transformer2DModel)" in text
    assert "2 layers missing, first 'single_transformer_blocks.0.proj_mlp', " in text


def test_another_width_is_refused_and_says_the_shape_met(part: Any, keymap: Any, sd3: Any) -> None:
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        wide = SD3Transformer2DModel(
            num_layers=2, num_attention_heads=3, caption_projection_dim=192, pos_embed_max_size=8
        )
    task = new_task(part, wide, targets=r".*\.0\.attn\.to_[qv]")
    text = message(part, lambda: keymap.native_layers(task, sd3))
    assert "2 of another shape, first 'transformer_blocks.0.attn.to_q is 128x128', " in text
    assert "missing" not in text


def test_the_component_is_the_tasks_only_one_or_the_models_kind(
    part: Any, keymap: Any, sd3: Any
) -> None:
    low = new_task(part, keymap.diffusers_model(sd3), component="transformer_2")
    assert len(keymap.native_layers(low, sd3)) > 0
    text = message(part, lambda: keymap.native_layers(low, sd3, "transformer"))
    assert "it adapts transformer_2, this is a 'transformer'" in text
    both = low.replace(layers={**low.layers, "transformer.transformer_blocks.0.ff.net.2": {}})
    assert list(keymap.native_layers(both, sd3)) == [
        "diffusion_model.joint_blocks.0.x_block.mlp.fc2"
    ]


def test_one_place_is_not_filled_twice(
    part: Any, keymap: Any, sd3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = keymap.placements(sd3)
    query, key = (f"transformer_blocks.0.attn.to_{x}" for x in "qk")
    task = new_task(part, keymap.diffusers_model(sd3), targets=[query, key])
    monkeypatch.setattr(keymap, "placements", lambda _: {**places, key: places[query]})
    text = message(part, lambda: keymap.native_layers(task, sd3))
    assert "joint_blocks.0.x_block.attn.qkv (two layers, one place)" in text


def test_one_part_of_a_fused_layer_leaves_the_others_alone(
    part: Any, keymap: Any, sd3: Any
) -> None:
    task = new_task(part, keymap.diffusers_model(sd3), targets=r".*\.1\.attn\.to_k")
    own = {
        name: torch.ones_like(t)
        for name, t in task.layers["transformer.transformer_blocks.1.attn.to_k"].items()
    }
    task = task.replace(layers={"transformer.transformer_blocks.1.attn.to_k": own})
    layers = keymap.native_layers(task, sd3)
    assert list(layers) == ["diffusion_model.joint_blocks.1.x_block.attn.qkv"]
    (fused,) = layers.values()
    rows = torch.zeros(3 * DIM)
    rows[DIM : 2 * DIM] = 1
    assert torch.equal(fused["scale"], rows)
    assert torch.equal(fused["shift"], rows)
    assert torch.equal(fused["up"], rows[:, None].expand(-1, 2))
    assert fused["down"].shape == (2, DIM)


def test_native_names_are_taken_as_they_are(part: Any, keymap: Any, sd3: Any) -> None:
    task = new_task(part, sd3.diffusion_model).with_info(naming="native")
    layers = keymap.native_layers(task, sd3)
    assert {name.removeprefix("diffusion_model.") for name in layers} == set(
        task.component_layers("transformer")
    )
    foreign = new_task(part, keymap.diffusers_model(sd3)).with_info(naming="native")
    assert "layers missing" in message(part, lambda: keymap.native_layers(foreign, sd3))


def test_an_unknown_architecture_keeps_its_own_names(part: Any, keymap: Any, sd3: Any) -> None:
    diffusers_names = new_task(part, keymap.diffusers_model(sd3))
    type(sd3).__name__ = "SD9"
    try:
        places = keymap.placements(sd3)
        assert all(place.module == "diffusion_model." + name for name, place in places.items())
        task = new_task(part, keymap.diffusers_model(sd3))
        assert len(keymap.native_layers(task, sd3)) == len(task.layers)
        text = message(part, lambda: keymap.native_layers(diffusers_names, sd3))
        assert "an architecture whose names DiffScaler does not know" in text
    finally:
        type(sd3).__name__ = "SD3"


def test_layers_that_are_not_the_models_have_no_diffusers_name(
    part: Any, keymap: Any, sd3: Any
) -> None:
    text = message(part, lambda: keymap.diffusers_layers({"diffusion_model.nowhere": {}}, sd3))
    assert "no name for 1 layers of this SD3 (SD3Transformer2DModel): 'diffusion_model.n" in text


def test_a_new_task_on_fused_layers_keeps_its_hidden_units_in_every_part(
    part: Any, keymap: Any, sd3: Any
) -> None:
    name = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    new = {
        "scale": torch.arange(3.0 * DIM),
        "down": torch.randn(2, DIM),
        "up": torch.zeros(3 * DIM, 2),
    }
    named = keymap.diffusers_layers({name: new}, sd3)
    assert [n.rpartition(".")[2] for n in named] == ["to_q", "to_k", "to_v"]
    for i, own in enumerate(named.values()):
        assert torch.equal(own["scale"], new["scale"][i * DIM : (i + 1) * DIM])
        assert torch.equal(own["down"], new["down"])
        assert own["up"].shape == (DIM, 2)
    assert len({own["down"].data_ptr() for own in named.values()}) == 3  # each its own memory


@pytest.mark.parametrize(
    ("kind", "module", "layout"),
    [
        ("PixArt", "diffusion_model.blocks.3.cross_attn.kv_linear", "flat"),
        ("PixArt", "blocks.3.cross_attn.q_linear", "batch"),
        ("HunyuanDiT", "mlp_t5.2", "fold"),
        ("CogVideoX", "patch_embed.proj", "fold"),
        ("WAN21", "time_embedding.0", "fold"),
        ("LTXV", "adaln_single.emb.timestep_embedder.linear_1", "fold"),
        ("SD3", "x_embedder.proj", "batch"),
        ("SomethingNew", "x_embedder.proj", "batch"),
    ],
)
def test_row_layouts(keymap: Any, kind: str, module: str, layout: str) -> None:
    config = type("Config", (), {"unet_config": {}})()
    model = type(kind, (), {"model_config": config})()
    assert keymap.native_row_layout(model, module) == layout


def test_every_rule_is_about_something(keymap: Any) -> None:
    import comfy.model_base
    import comfy.utils
    import diffusers

    for row in keymap.ARCHITECTURES:
        assert hasattr(diffusers, row.diffusers)
        assert all(hasattr(comfy.model_base, name) for name in row.classes)
        assert not row.table or hasattr(comfy.utils, row.table)
        assert set(row.swapped) <= set(row.rules)
        for pattern in (row.foreign, *row.row_layouts):
            re.compile(pattern)
