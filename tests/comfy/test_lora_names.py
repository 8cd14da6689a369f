"""What LoRA files call layers: against ComfyUI's and diffusers' own maps, at full size, on meta."""

import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
build = runpy.run_path(str(HERE / "test_keymap_full_size.py"))["build"]

#: Full-size model -> its family.
FAMILIES = {
    "sd3_medium": "sd3",
    "sd35_medium": "sd3",
    "flux1_dev": "flux",
    "chroma": "chroma",
    "qwen_image": "qwen_image",
    "wan21_i2v_14b": "wan",
    "z_image": "z_image",
    "sd15": "unet2d_condition",
    "sd21": "unet2d_condition",
    "sdxl": "unet2d_condition",
    "sdxl_refiner": "unet2d_condition",
}
NAMINGS = ("diffusers", "kohya", "comfyui")


@pytest.fixture(scope="module")
def part(pack: ModuleType) -> Callable[[str], ModuleType]:
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, part: Any) -> tuple[str, Any, Any]:
    """Gives (family, diffusers' model, ComfyUI's), both without weights."""
    theirs, model = build(request.param)
    return FAMILIES[request.param], theirs, model


def spans(names: Any, place: Any, width: int, rows: int) -> dict[str, tuple[int, int, bool]]:
    """Returns diffusers name -> (first row, rows, swapped) of what a native layer holds."""
    unit, found, start = rows // sum(place.sizes), {}, 0
    swapped = place.swap == "always" or (place.swap == "if_two" and rows == 2 * width)
    for name, size in zip(place.names, place.sizes, strict=True):
        found[name] = (start, size * unit, swapped)
        start += size * unit
    return found


def test_native_names_are_comfyuis(case: tuple[str, Any, Any], part: Any) -> None:
    family, _, model = case
    names, targets = part("diffscaler_core.lora.names"), part("diffscaler_core.targets")
    native = {t.name: t for t in targets.all_targets(model.diffusion_model)}
    table = names.places(family, "dotted")
    ours = {}
    for name, target in native.items():
        own = spans(names, table[name], target.in_features, target.out_features)
        ours |= {layer: (name, *span) for layer, span in own.items()}
    theirs = {}
    for layer, place in part("nodes.keymap").placements(model).items():
        name = place.module.removeprefix("diffusion_model.")
        size = native[name].out_features - place.start if place.size is None else place.size
        theirs[layer] = (name, place.start, size, place.swapped)
    assert ours == theirs


def test_every_name_comfyui_reads_is_read(case: tuple[str, Any, Any], part: Any) -> None:
    import comfy.lora

    family, _, model = case
    names, keymap = part("diffscaler_core.lora.names"), part("nodes.keymap")
    places = keymap.placements(model)
    native = {p.module.removeprefix("diffusion_model.") for p in places.values()}
    known = {spell(name) for name in (*places, *native) for spell in (str, names.flat)}
    read = set()
    for key, to in comfy.lora.model_lora_keys_unet(model, {}).items():
        module, start = (to, 0) if isinstance(to, str) else (to[0], (to[1] or (0, 0))[1])
        prefix, rest = names.split_prefix(key.replace(".processor.", "."))
        rest += ".0" if rest.endswith(".to_out") else ""
        if rest in known:  # no norm, no table, and no name of a sister architecture
            first = places[names.places(family, names.PREFIXES[prefix])[rest].names[0]]
            assert (first.module, first.start) == (module.removesuffix(".weight"), start), key
            read.add(prefix)
    assert {"lora_unet_", "diffusion_model."} <= read
    assert family not in ("sd3", "flux") or {"transformer.", "lora_transformer_"} <= read


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_layer_goes_out_and_back(
    case: tuple[str, Any, Any], part: Any, naming: str, tmp_path: Path
) -> None:
    family, theirs, _ = case
    task = full_task(part, theirs, family)
    if naming != "comfyui" and family not in ("sd3", "flux", "unet2d_condition"):
        pytest.skip("one naming shows the table, and these are large")
    file = part("diffscaler_core.lora.write").export_lora(task, tmp_path / "l.safetensors", naming)
    back = part("diffscaler_core.lora.read").import_lora(file)
    assert back.info["base"]["family"] == family
    assert back.info["base"]["fingerprint"] == task.info["base"]["fingerprint"]
    same(task, back)


def same(task: Any, back: Any) -> None:
    assert back.layers.keys() == task.layers.keys()
    assert back.info["gain"] == task.info["gain"]
    for layer, own in task.layers.items():
        assert back.layers[layer].keys() == own.keys(), layer
        for part, tensor in own.items():
            assert back.layers[layer][part].dtype == tensor.dtype
            assert torch.equal(back.layers[layer][part], tensor), (layer, part)


def full_task(part: Any, theirs: Any, family: str) -> Any:
    """A rank-1 task on every layer a family has, in float16 and with nothing zero."""
    targets = list(part("diffscaler_core.targets").all_targets(theirs))
    task = part("diffscaler_core.task")
    component = part("diffscaler_core.targets").component_of(theirs)
    layers = {
        f"{component}.{t.name}": {
            "down": torch.rand(1, t.in_features, *t.kernel, dtype=torch.float16) + 0.5,
            "up": torch.rand(t.out_features, 1, dtype=torch.float16) + 0.5,
        }
        for t in targets
    }
    base = task.base_facts(theirs, targets) | {"family": family}
    info = {"name": "full", "method": "lora", "activation": "identity", "gain": 1.0, "base": base}
    return task.TaskAdapter(layers, info)
