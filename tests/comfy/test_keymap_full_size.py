"""The key maps against both hosts' real full-size models, on the meta device: names and shapes.

And against diffusers' own conversions of the published checkpoints, row by row: each row of a
native weight carries its number through diffusers' conversion, and must arrive where the map says.
"""

import importlib
import logging
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FULL_SIZE = runpy.run_path(str(Path(__file__).with_name("full_size.py")))["FULL_SIZE"]

#: Family -> the function of diffusers.loaders.single_file_utils that converts its checkpoints.
CONVERSIONS = {
    "sd35_medium": "convert_sd3_transformer_checkpoint_to_diffusers",
    "flux1_dev": "convert_flux_transformer_checkpoint_to_diffusers",
    "flux2_dev": "convert_flux2_transformer_checkpoint_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "auraflow_03": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "z_image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "wan21_i2v_14b": "convert_wan_transformer_to_diffusers",
    "wan21_vace_1b": "convert_wan_transformer_to_diffusers",
    "ltx_video": "convert_ltx_transformer_checkpoint_to_diffusers",
    "ltx2": "convert_ltx2_transformer_to_diffusers",
    "hunyuan_video": "convert_hunyuan_video_transformer_to_diffusers",
    "hidream": "convert_hidream_transformer_to_diffusers",
    "krea2": "convert_krea2_transformer_checkpoint_to_diffusers",
    "sd15": "convert_ldm_unet_checkpoint",
    "sdxl": "convert_ldm_unet_checkpoint",
}
#: Native layers that diffusers keeps in another model.
ONLY_COMFYUI = {"ltx2": r"_embeddings_connector\."}
#: ComfyUI's names -> those of the published checkpoint, where ComfyUI renames on loading.
_SCALES = (("query_norm.weight", "query_norm.scale"), ("key_norm.weight", "key_norm.scale"))
PUBLISHED = {
    "flux1_dev": _SCALES,
    "chroma": (*_SCALES, *((f"norms.{i}.weight", f"norms.{i}.scale") for i in range(5))),
    "hunyuan_video": (
        ("_in.in_layer", "_in.mlp.0"),
        ("_in.out_layer", "_in.mlp.2"),
        ("vector_in.mlp.0", "vector_in.in_layer"),
        ("vector_in.mlp.2", "vector_in.out_layer"),
        ("t_embedder.in_layer", "t_embedder.mlp.0"),
        ("t_embedder.out_layer", "t_embedder.mlp.2"),
        ("c_embedder.in_layer", "c_embedder.linear_1"),
        ("c_embedder.out_layer", "c_embedder.linear_2"),
        ("self_attn.qkv", "self_attn_qkv"),
        ("self_attn.proj", "self_attn_proj"),
        ("_attn.qkv", "_attn_qkv"),
        ("_attn.proj", "_attn_proj"),
        ("_mod.lin.", "_mod.linear."),
        (".modulation.lin.", ".modulation.linear."),
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
        ("in.mlp.fc1.", "in.mlp.0."),
        ("in.mlp.fc2.", "in.mlp.2."),
        ("t_embedder.mlp.fc1.", "t_embedder.mlp.0."),
        ("t_embedder.mlp.fc2.", "t_embedder.mlp.2."),
    ),
    "sd15": (("", "model.diffusion_model."),),
    "sdxl": (("", "model.diffusion_model."),),
}


@pytest.fixture(scope="module")
def keymap(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.nodes.keymap")


@pytest.fixture(scope="module")
def targets(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.diffscaler_core.targets")


def build(name: str) -> tuple[Any, Any]:
    """Returns a family's (diffusers model, ComfyUI BaseModel), both without weights."""
    import comfy.model_detection as detection
    import diffusers

    logging.disable(logging.WARNING)
    kind, config, native = FULL_SIZE[name]
    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**config)
    if native is None:
        native = detection.unet_config_from_diffusers_unet(theirs.state_dict(), torch.float32)
    host = detection.model_config_from_unet_config(dict(native), theirs.state_dict())
    host.set_inference_dtype(torch.float32, None)
    model = host.get_model({}, "", device="meta")
    logging.disable(logging.NOTSET)
    return theirs, model


def native_shape(place: Any, native: dict[str, Any]) -> tuple[int, ...]:
    out, *rest = native[place.module].shape
    return (out - place.start if place.size is None else place.size, *rest)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_layer_has_its_place(name: str, keymap: ModuleType, targets: ModuleType) -> None:
    import comfy.model_detection as detection

    theirs, model = build(name)
    places = keymap.placements(model)
    native = {"diffusion_model." + t.name: t for t in targets.all_targets(model.diffusion_model)}
    wanted = {t.name: t for t in targets.all_targets(theirs)}
    assert {t.name for t in targets.find_targets(theirs, "blocks")} <= places.keys()
    assert places.keys() == wanted.keys()  # none lost, none invented
    for layer, target in wanted.items():
        assert native_shape(places[layer], native) == target.shape, layer
    rows: dict[str, list[tuple[int, int]]] = {}
    for place in places.values():
        span = (place.start, place.start + native_shape(place, native)[0])
        rows.setdefault(place.module, []).append(span)
    assert rows.keys() == {n for n in native if not re.search(ONLY_COMFYUI.get(name, "^$"), n)}
    for module, spans in rows.items():  # side by side, from the first row to the last
        ends = [0, *(end for _, end in sorted(spans))]
        assert [start for start, _ in sorted(spans)] == ends[:-1], module
        assert ends[-1] == native[module].out_features, module
    state = model.diffusion_model.state_dict()
    found = detection.model_config_from_unet(state, "")
    assert type(found) is type(model.model_config)  # and ComfyUI detects such a checkpoint


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_hollow_model_is_diffusers_to_new_task(
    name: str, keymap: ModuleType, targets: ModuleType, pack: ModuleType
) -> None:
    task = importlib.import_module(f"{pack.__name__}.diffscaler_core.task")
    theirs, model = build(name)
    hollow = keymap.diffusers_model(model)
    for preset in ("blocks", "attention", "mlp", "all"):
        pair = []
        for one in (theirs, hollow):
            try:
                pair.append(targets.find_targets(one, preset))
            except ValueError:  # the family has no such layers
                pair.append(())
        assert set(pair[0]) == set(pair[1]), preset
    facts = [task.base_facts(one, list(targets.all_targets(one))) for one in (theirs, hollow)]
    assert facts[0] == facts[1]


def numbered(model: Any) -> dict[str, torch.Tensor]:
    """Returns the model's state dict with (C_out, 1) weights that hold each row's own number."""
    state = {}
    for i, (key, value) in enumerate(model.diffusion_model.state_dict().items()):
        if value.ndim >= 2 and key.endswith("weight"):
            state[key] = (i * 2.0**20 + torch.arange(len(value), dtype=torch.float64))[:, None]
        else:
            state[key] = torch.zeros(1, dtype=torch.float64).expand(value.shape)
    return state


@pytest.mark.parametrize("name", CONVERSIONS)
def test_rows_lie_where_diffusers_own_conversion_puts_them(name: str, keymap: ModuleType) -> None:
    import diffusers.loaders.single_file_utils as conversions

    theirs, model = build(name)
    state = numbered(model)
    renamed = {}
    for key, value in state.items():
        for ours, published in PUBLISHED.get(name, ()):
            key = key.replace(ours, published) if ours else published + key
        renamed[key] = value
    convert = getattr(conversions, CONVERSIONS[name])
    converted = convert(renamed, config=dict(theirs.config))
    for layer, place in keymap.placements(model).items():
        there = state[place.module.removeprefix("diffusion_model.") + ".weight"][place.start :]
        there = there if place.size is None else there[: place.size]
        if place.swapped:
            there = torch.cat(there.chunk(2)[::-1])
        assert torch.equal(converted[layer + ".weight"], there), layer
