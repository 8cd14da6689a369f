"""Tasks beside what else ComfyUI does to a model: LoRAs, quantised files, offloading, compiling."""

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .formula import close, lora_for, reference_over


def test_over_a_stock_lora_that_patches_weights_and_biases(tiny: Any, clean: Any) -> None:
    import comfy.sd

    model = clean(tiny.load("tiny_sd3"))
    lora, task = lora_for(tiny, model), tiny.task(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)  # type: ignore[attr-defined]
    plain = tiny.apply(model, task)
    before = tiny.run(plain)
    result = tiny.run(tiny.apply(patched, task))
    assert close(result, tiny.run(reference_over(tiny, lora, task)), 2e-5)
    assert torch.equal(tiny.run(plain), before)  # the bias it remembers is not the LoRA's
    import comfy.model_management

    comfy.model_management.unload_all_models()  # type: ignore[attr-defined]


def test_over_a_stock_bypass_lora(tiny: Any) -> None:
    import comfy.sd

    model = tiny.load("tiny_sd3")
    lora, task = lora_for(tiny, model), tiny.task(model)
    lora = {key: tensor for key, tensor in lora.items() if "diff_b" not in key}
    load = comfy.sd.load_bypass_lora_for_models  # type: ignore[attr-defined]
    bypass, _ = load(model, None, lora, 1.0, 0)
    alone = tiny.run(bypass)
    states: list[Any] = []

    def watch(executor: Any, *arguments: Any, **options: Any) -> Any:
        def forwards() -> Any:
            return [m.__dict__.get("forward") for m in executor.class_obj.modules()]

        states.append(forwards())
        result = executor(*arguments, **options)
        states.append(forwards())
        return result

    watched = bypass.clone()
    watched.add_wrapper_with_key("apply_model", "watch", watch)
    result = tiny.run(tiny.apply(watched, task))
    assert close(result, tiny.run(reference_over(tiny, lora, task)), 2e-5)
    assert sum(forward is not None for forward in states[0]) > 10  # the bypass LoRA's own
    assert all(state == states[0] for state in states)
    assert torch.equal(tiny.run(bypass), alone)


def test_under_stock_lora_hooks_with_keyframes(tiny: Any) -> None:
    """Hooked weights change in the middle of sampling, biases too."""
    import comfy.hooks

    model = tiny.load("tiny_sd3")
    lora, task = lora_for(tiny, model), tiny.task(model)

    def hooked(seed: int, *frames: tuple[float, float]) -> Any:
        hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)  # type: ignore[attr-defined]
        frame_group = comfy.hooks.HookKeyframeGroup()  # type: ignore[attr-defined]
        for strength, start in frames:
            frame_group.add(comfy.hooks.HookKeyframe(strength, start))  # type: ignore[attr-defined]
        hooks.set_keyframes_on_hooks(frame_group)
        return comfy.hooks.set_hooks_for_conditioning(tiny.prompt(seed), hooks)  # type: ignore[attr-defined]

    patched = tiny.apply(model, task)
    base = tiny.run(patched)
    whole = tiny.run(patched, hooked(1, (1.0, 0.0)), hooked(2, (1.0, 0.0)))
    assert close(whole, tiny.run(reference_over(tiny, lora, task)), 2e-5)
    late = tiny.run(patched, hooked(1, (0.5, 0.0), (1.0, 0.5)), hooked(2, (0.5, 0.0), (1.0, 0.5)))
    assert not close(late, whole, 1e-3)
    assert close(tiny.run(patched), base, 2e-6)


def _effect(tiny: Any, model: Any, task: Any) -> Tensor:
    return tiny.call(tiny.apply(model, task)) - tiny.call(model)


@pytest.mark.parametrize("file", ["tiny_flux_float8_e4m3fn", "tiny_flux_int8_tensorwise"])
def test_on_quantised_layers(tiny: Any, clean: Any, tiny_models: Path, file: str) -> None:
    """The same effect as on the weights that the quantised ones stand for."""
    values = load_file(tiny_models / f"{file}.safetensors")
    plain = {}
    for name, tensor in values.items():
        if not name.endswith((".weight_scale", ".comfy_quant")):
            scale = values.get(f"{name.removesuffix('.weight')}.weight_scale")
            plain[name] = tensor if scale is None else (tensor.float() * scale).to(torch.bfloat16)
    save_file(plain, tiny_models / f"plain_{file}.safetensors")
    model = clean(tiny.load(file))
    quantised = model.model.diffusion_model.double_blocks[0].img_mlp[0]
    assert not isinstance(quantised, nn.Linear)
    assert torch.equal(tiny.run(tiny.apply(model, tiny.task(model, std=0))), tiny.run(model))
    task = tiny.task(model, std=0.05)
    effect = _effect(tiny, model, task)
    wanted = _effect(tiny, tiny.load(f"plain_{file}"), task)
    assert (effect - wanted).norm() < 0.03 * wanted.norm()


def test_on_an_fp8_cast_by_the_stock_loader(tiny: Any, clean: Any) -> None:
    model = clean(tiny.load("tiny_flux", "fp8_e4m3fn"))
    assert model.model.get_dtype() == torch.float8_e4m3fn
    assert torch.equal(tiny.run(tiny.apply(model, tiny.task(model, std=0))), tiny.run(model))
    task = tiny.task(model, std=0.05)
    rounded = tiny.load("tiny_flux")
    for parameter in rounded.model.diffusion_model.parameters():
        parameter.data = parameter.to(torch.float8_e4m3fn).float()
    effect, wanted = _effect(tiny, model, task), _effect(tiny, rounded, task)
    assert (effect - wanted).norm() < 0.03 * wanted.norm()


def test_on_partially_loaded_models_with_patched_biases(tiny: Any) -> None:
    import comfy.model_management
    import comfy.sd

    model = tiny.load("tiny_sd3")
    lora, task = lora_for(tiny, model), tiny.task(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)  # type: ignore[attr-defined]
    patched = tiny.apply(patched, task)
    full = tiny.call(patched)
    patched.detach()
    comfy.model_management.unload_all_models()  # type: ignore[attr-defined]
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert sum(bool(getattr(m, "bias_function", ())) for m in patched.model.modules()) > 10
        assert close(tiny.call_loaded(patched), full)
    finally:
        patched.unpatch_model(torch.device("cpu"))


def test_on_another_model_object_of_a_clone(tiny: Any, clean: Any) -> None:
    """What dynamic VRAM and several GPUs do: a clone that runs on a freshly loaded model."""
    model, other = clean(tiny.load("tiny_sd3")), clean(tiny.load("tiny_sd3"))
    patched = tiny.apply(model, tiny.task(model))
    moved = patched.clone(model_override=(other.model, ({}, {}, {}, set())))
    assert moved.model is other.model
    assert torch.equal(tiny.run(moved), tiny.run(patched))


def test_on_a_clone_for_another_gpu(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    patched = tiny.apply(tiny.apply(model, tiny.task(model, 1)), tiny.task(model, 2), 0.5)
    clone = patched.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert clone.model is not model.model
    assert len(clone.get_additional_models_with_key("diffscaler")) == 2
    assert torch.equal(tiny.run(clone), tiny.run(patched))


@pytest.mark.slow
@pytest.mark.parametrize("compile_first", [True, False])
def test_under_torch_compile_strengths_change_without_recompiling(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, compile_first: bool
) -> None:
    import torch._dynamo
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules import mmdit
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model: Any) -> Any:
        clone = model.clone()
        set_torch_compile_wrapper(clone, "eager")
        return clone

    # On the CPU the default attention looks at the free memory, and recompiles when it changes.
    monkeypatch.setattr(mmdit, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    model = tiny.load("tiny_sd3")
    layers = [name for name in tiny.layers(model) if "joint_blocks.1" in name]
    task = tiny.task(model, std=0.1, layers=layers)
    base = compiled(model)

    def patched(strength: float) -> Any:
        if compile_first:
            return tiny.apply(base, task, strength)
        return compiled(tiny.apply(model, task, strength))

    assert close(tiny.run(patched(1.0)), tiny.run(tiny.apply(model, task)))
    before = tiny.run(base)
    assert close(before, tiny.run(model))
    torch._dynamo.utils.counters.clear()
    for i in range(20):
        tiny.run(patched(0.1 * (i + 1)), steps=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert close(tiny.run(patched(1.0)), tiny.run(tiny.apply(model, task)))
    assert torch.equal(tiny.run(base), before)
    torch._dynamo.reset()


def test_memory_is_accounted_and_given_back(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    import comfy.model_management as management

    management.unload_all_models()
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    patched = tiny.apply(model, task)
    other = tiny.apply(model, task, 0.3)
    tiny.run(patched)
    tiny.run(other)
    kinds = [type(loaded.model).__name__ for loaded in management.loaded_models()]
    assert kinds.count("TaskParameters") == 1  # shared by both models
    (known,) = [m for m in management.loaded_models() if type(m.model).__name__ == "TaskParameters"]
    parameters = known.model
    folded = 4 * task.num_parameters  # float32 here
    assert known.model_size() == task.nbytes + parameters.folded_bytes
    assert 0 < parameters.folded_bytes <= folded
    del known, parameters, patched, other, task
    gc.collect()
    with caplog.at_level(logging.WARNING):
        management.cleanup_models_gc()
        management.cleanup_models()
    assert "leak" not in caplog.text
    assert "TaskParameters" not in [type(m.model).__name__ for m in management.loaded_models()]
