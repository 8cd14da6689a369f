"""LoRA files in and out, against ComfyUI's own loaders, trainer and extractor."""

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_head_channels=8,
    num_heads=-1,
    context_dim=24,
    use_spatial_transformer=True,
    legacy=False,
    transformer_depth_middle=1,
)
#: Name -> (ComfyUI's model configuration, its `unet_config`); None: a file of the tiny models.
MODELS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "sd15": (
        "SD15",
        UNET
        | dict(num_res_blocks=[2] * 4, channel_mult=[1] * 4, use_linear_in_transformer=False)
        | dict(transformer_depth=[1] * 6 + [0] * 2, transformer_depth_output=[1] * 9 + [0] * 3),
    ),
    "sdxl": (
        "SDXL",
        UNET
        | dict(num_res_blocks=[2] * 3, channel_mult=[1] * 3, use_linear_in_transformer=True)
        | dict(transformer_depth=[0, 0, 1, 1, 1, 1], transformer_depth_output=[0] * 3 + [1] * 6)
        | dict(num_classes="sequential", adm_in_channels=16, model_channels=64),
    ),
    "sd3": None,
    "flux": None,
}
#: Naming -> how the keys of ComfyUI's own map that belong to it begin.
NAMINGS = {
    "comfyui": ("diffusion_model.",),
    "kohya": ("lora_unet_",),
    "diffusers": ("transformer.",),
}


@pytest.fixture(scope="module")
def part(pack: ModuleType) -> Callable[[str], ModuleType]:
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tiny: Any) -> tuple[str, Any]:
    """Gives (name, a loaded `ModelPatcher`)."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    row = MODELS[request.param]
    if row is None:
        patcher = tiny.load(f"tiny_{request.param}")
    else:
        host = getattr(comfy.supported_models, row[0])(dict(row[1]))
        host.set_inference_dtype(torch.float32, None)
        model = host.get_model({}, "", device="cpu")
        g = torch.Generator().manual_seed(0)
        for value in model.diffusion_model.parameters():
            value.requires_grad_(False)
            fan = max(1, value[0].numel()) ** -0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=g) * fan + (value.ndim == 1))
        patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    comfy.model_management.load_models_gpu([patcher])  # type: ignore[attr-defined]
    return request.param, patcher


def run(patcher: Any, name: str) -> Tensor:
    """One call of the denoiser, as a sampler makes it, for two rows."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])  # type: ignore[attr-defined]
    patcher.model.current_patcher = patcher
    g = torch.Generator().manual_seed(0)
    width = {"sd15": 24, "sdxl": 24}.get(name, 32)
    more = {} if name == "sd15" else {"y": torch.randn(2, 16, generator=g)}
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
    x = torch.randn(2, 4 if name.startswith("sd1") or name == "sdxl" else 16, 8, 8, generator=g)
    context = torch.randn(2, 8, width, generator=g)
    with torch.no_grad():
        return patcher.model.apply_model(
            x,
            torch.tensor([0.5, 0.7]),
            c_crossattn=context,
            transformer_options={**options, "cond_or_uncond": [0]},
            **more,
        ).clone()


def random_lora(
    patcher: Any, prefixes: tuple[str, ...], native: bool, rank: int = 2, known: Any = ()
) -> Any:
    """A LoRA on every layer ComfyUI's own map knows under such names.

    Args:
        patcher: The model.
        prefixes: How the names begin.
        native: True: names of ComfyUI's own layers; False: diffusers', of the layers in `known`.
        rank: Of each.
        known: diffusers' names, as ComfyUI's map also holds those of sister architectures.
    """
    import comfy.lora

    spelt = {p + spell for n in known for p in prefixes for spell in (n, n.replace(".", "_"))}
    state = patcher.model.state_dict()
    g = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for key, to in comfy.lora.model_lora_keys_unet(patcher.model, {}).items():
        weight, rows = (to, None) if isinstance(to, str) else (to[0], to[1])
        if not key.startswith(prefixes) or weight not in state or state[weight].ndim < 2:
            continue
        own = "diffusion_model." + key.partition("diffusion_model.")[2]
        flat = "lora_unet_" + weight[len("diffusion_model.") : -len(".weight")].replace(".", "_")
        if native != (key in (flat, own) and rows is None) or key.endswith("pos_embed"):
            continue
        if not native and key not in spelt:
            continue
        out, *window = state[weight].shape
        out = out if rows is None else rows[2]
        ones = (1,) * (len(window) - 1)
        down, up = torch.randn(rank, *window, generator=g), torch.randn(out, rank, generator=g)
        peft = prefixes == ("transformer.",)
        tensors[f"{key}.lora_{'A' if peft else 'down'}.weight"] = down * 0.1
        tensors[f"{key}.lora_{'B' if peft else 'up'}.weight"] = up.view(out, rank, *ones) * 0.1
        if not peft:
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


def check(case: Any, part: Any, tensors: dict[str, Tensor], folder: Path) -> Any:
    """Compares the imported task with ComfyUI's two loaders; returns the task."""
    import comfy.sd

    name, patcher = case
    save_file(tensors, folder / "lora.safetensors")
    task = part("diffscaler_core").import_lora(folder / "lora.safetensors")
    got = run(part("nodes.patching").apply_task(patcher, task), name)
    base = run(patcher, name)
    assert (got - base).abs().max() > 1e-2
    loaders = [comfy.sd.load_lora_for_models]
    if not in_parts(patcher, tensors):
        loaders.append(comfy.sd.load_bypass_lora_for_models)
    for load in loaders:
        wanted = run(load(patcher, None, dict(tensors), 1.0, 0.0)[0], name)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(patcher, name), base)
    return task


def in_parts(patcher: Any, tensors: dict[str, Tensor]) -> bool:
    """Says whether a LoRA names q, k or v of a fused layer, which the bypass loader leaves out."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    return any(not isinstance(keys.get(k.partition(".lora_")[0], ""), str) for k in tensors)


def layers_of(patcher: Any, part: Any) -> set[str]:
    return set(part("nodes.keymap").placements(patcher.model))


@pytest.mark.parametrize("naming", [*NAMINGS, "kohya_diffusers"])
def test_an_imported_lora_does_what_comfyuis_loaders_do(
    case: tuple[str, Any], part: Any, naming: str, tmp_path: Path
) -> None:
    name, patcher = case
    unet = name in ("sd15", "sdxl")
    if unet and naming == "diffusers":
        pytest.skip("ComfyUI does not read today's diffusers names of U-Nets")
    if not unet and naming == "kohya_diffusers":
        prefixes, native = ("lora_transformer_",), False
    else:
        prefixes = NAMINGS[naming.partition("_")[0]]
        native = naming in ("comfyui", "kohya")
    tensors = random_lora(patcher, prefixes, native, known=layers_of(patcher, part))
    task = check(case, part, tensors, tmp_path)
    there = {layer.partition(".")[2] for layer in task.layers}
    assert len(there) > 0.6 * len(layers_of(patcher, part)), (len(there), naming)


def test_a_lora_of_comfyuis_own_trainer(case: tuple[str, Any], part: Any, tmp_path: Path) -> None:
    import comfy_extras.nodes_train as trainer

    _, patcher = case
    trained, _ = trainer._setup_lora_adapters(patcher.clone(), {}, "LoRA", torch.float32, 2)
    g = torch.Generator().manual_seed(4)
    tensors = {k: t.detach().clone() for k, t in trained.items()}
    for key, t in tensors.items():
        is_bias = key.endswith(".diff_b") and f"{key[:-7]}.lora_up.weight" in tensors
        if "lora_" in key or is_bias:  # those of norms stay as they start: zero
            t.copy_(torch.randn(t.shape, generator=g) * 0.1)
    if case[0] in ("sd15", "sdxl"):
        # its convolutions are stored flat, and nothing says whether these two are any
        tensors = {k: t for k, t in tensors.items() if ".proj_" not in k}
    task = check(case, part, tensors, tmp_path)
    assert task.info["parts"] == ["shift", "subspace"]
    norm = next((k for k in tensors if k.endswith(".diff") or "norm" in k), None)
    if norm is None:
        return  # a family without trainable norms
    tensors[norm] += 1
    save_file(tensors, tmp_path / "norm.safetensors")
    with pytest.raises(ValueError, match=r"whole weights|names \d+ of"):
        part("diffscaler_core").import_lora(tmp_path / "norm.safetensors")


def test_a_lora_of_comfyuis_own_extractor(case: tuple[str, Any], part: Any, tmp_path: Path) -> None:
    import comfy.sd
    import comfy_extras.nodes_lora_extract as extractor

    _, patcher = case
    lora = random_lora(patcher, NAMINGS["comfyui"], True)
    tuned = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]
    difference = tuned.clone()
    difference.add_patches(patcher.get_key_patches("diffusion_model."), -1.0, 1.0)
    tensors = extractor.calc_lora_model(
        *(difference, 2, "diffusion_model.", "diffusion_model.", {}, extractor.LORAType.STANDARD)
    )
    check(case, part, tensors, tmp_path)


@pytest.mark.parametrize("naming", ["kohya", "comfyui", "diffusers"])
def test_comfyui_reads_what_goes_out(
    case: tuple[str, Any], part: Any, naming: str, tmp_path: Path
) -> None:
    import comfy.sd
    import comfy.utils

    name, patcher = case
    if naming == "diffusers" and name in ("sd15", "sdxl"):
        pytest.skip("ComfyUI does not read today's diffusers names of U-Nets")
    core = part("diffscaler_core")
    hollow = part("nodes.keymap").diffusers_model(patcher.model)
    task = noisy(core.new_task(hollow, "lora", 3, "blocks", gain=0.5))
    if naming != "diffusers":
        targets = r".*(to_out\.0|proj_out|linear_1|norm1\.linear)"
        shift = noisy(core.new_task(hollow, "bitfit", targets=targets))
        layers = {k: {**own, **shift.layers.get(k, {})} for k, own in task.layers.items()}
        task = task.replace(layers=layers)
    file = core.export_lora(task, tmp_path / "out.safetensors", naming)
    got = run(part("nodes.patching").apply_task(patcher, task), name)
    assert (got - run(patcher, name)).abs().max() > 1e-2
    state = comfy.utils.load_torch_file(str(file), safe_load=True)
    wanted = run(comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 0.0)[0], name)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("includes_bias", [False, True])
def test_comfyui_reads_scales_as_differences(
    case: tuple[str, Any], part: Any, includes_bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.sd

    name, patcher = case
    core, keymap = part("diffscaler_core"), part("nodes.keymap")
    run(patcher, name)  # takes off what other tests patched into the weights
    hollow = filled(keymap, patcher.model)
    task = noisy(core.new_task(hollow, "diffscaler", 2, "blocks"))
    shifts = {
        n: {k: t for k, t in own.items() if k != "shift" or has_bias(hollow, n)}
        for n, own in task.layers.items()
    }
    task = task.replace(layers=shifts)
    task = task.with_info(activation="identity", scale_includes_bias=includes_bias)
    got = run(part("nodes.patching").apply_task(patcher, task), name)
    tensors = part("diffscaler_core.lora.write").lora_tensors(task, "comfyui", base=hollow)
    with caplog.at_level(logging.WARNING):
        wanted = run(comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)[0], name)
    assert "not loaded" not in caplog.text
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def has_bias(model: Any, layer: str) -> bool:
    return model.get_submodule(layer.partition(".")[2]).bias is not None


def filled(keymap: ModuleType, model: Any) -> Any:
    """The hollow model of diffusers' names with a ComfyUI model's own weights."""
    hollow = keymap.diffusers_model(model)
    for name, place in keymap.placements(model).items():
        module, source = hollow.get_submodule(name), model.get_submodule(place.module)
        for kind in ("weight", "bias"):
            values = getattr(source, kind)
            if values is None:
                module.register_parameter(kind, None)
                continue
            values = values.detach()[place.start :]
            values = values if place.size is None else values[: place.size]
            values = torch.cat(values.chunk(2)[::-1]) if place.swapped else values
            setattr(module, kind, torch.nn.Parameter(values.clone(), requires_grad=False))
    blocks = type("Config", (), {"layers_per_block": 2})
    hollow.config = blocks()
    return hollow


def noisy(task: Any) -> Any:
    g = torch.Generator().manual_seed(3)
    layers = {
        layer: {n: torch.randn(t.shape, generator=g) * 0.1 for n, t in own.items()}
        for layer, own in task.layers.items()
    }
    return task.replace(layers=layers)


def test_two_imported_loras_in_one_batch(case: tuple[str, Any], part: Any, tmp_path: Path) -> None:
    """Row 0 runs one LoRA, row 1 the other; each is what its stock loader gives alone."""
    import comfy.sd

    name, patcher = case
    files, alone, tasks = [], [], []
    for i in range(2):
        tensors = random_lora(patcher, NAMINGS["kohya"], True, rank=2 + i)
        tensors = {k: t.flip(0) if i and t.ndim else t for k, t in tensors.items()}
        files.append(tmp_path / f"{i}.safetensors")
        save_file(tensors, files[-1])
        tasks.append(part("diffscaler_core").import_lora(files[-1], name=str(i)))
        stock = comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)[0]
        alone.append(run(stock, name))
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    got = routed(part, patcher, tasks, name)
    for row in range(2):
        torch.testing.assert_close(got[row], alone[row][row], atol=1e-5, rtol=1e-5)


def routed(part: Any, patcher: Any, tasks: list[Any], name: str) -> Tensor:
    """Runs one batch with a task a row, by hooks on ComfyUI's own layers."""
    keymap, matching = part("nodes.keymap"), part("diffscaler_core.matching")
    named = {task.name: task for task in tasks}
    layers = {n: keymap.native_layers(task, patcher.model) for n, task in named.items()}
    modules = {m: patcher.model.get_submodule(m) for own in layers.values() for m in own}
    stacks = matching.build_stacks(named, layers, modules)
    for module, stack in stacks.items():
        stack.row_layout = keymap.native_row_layout(patcher.model, module)
        stack.set_weights(torch.eye(2)[..., None].expand(2, 2, 3))  # rows, tasks, parts
    handles = [
        modules[m].register_forward_hook(lambda _, args, y, stack=stack: stack(args[0], y))
        for m, stack in stacks.items()
    ]
    try:
        return run(patcher, name)
    finally:
        for handle in handles:
            handle.remove()
