"""Tasks on real ComfyUI models: what they compute, and that they leave nothing behind."""

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FAMILIES = ("tiny_sd3", "tiny_flux", "tiny_unet")


class Reference(nn.Module):
    """A layer written out after the paper, in place of the host's own: needs W, knows no host."""

    def __init__(self, layer: Any, tasks: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
        super().__init__()
        self.layer, self.tasks = layer, tasks

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        size = (1,) * (layer.weight.ndim - 2)

        def through(weight: Tensor) -> Tensor:
            if not size:
                return F.linear(x, weight)
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)

        def channels(values: Tensor) -> Tensor:
            return values.view(-1, *size)

        gain = 1 + sum(w * t["scale"] for t, w in self.tasks)
        y = channels(gain) * through(layer.weight)
        if layer.bias is not None:
            y = y + channels(layer.bias)
        for t, w in self.tasks:
            hidden = torch.relu(through(t["down"]))
            up = torch.einsum("or,br...->bo..." if size else "or,...r->...o", t["up"], hidden)
            y = y + w * (channels(t["shift"]) + up)
        return y


def _replace(model: Any, *tasks: tuple[Any, float]) -> Any:
    """Puts references into a model of its own."""
    for name in {n for task, _ in tasks for n in task.component_layers("transformer")}:
        parent, _, leaf = name.rpartition(".")
        owner = model.model.diffusion_model.get_submodule(parent)
        own = [(task.layers[f"transformer.{name}"], w) for task, w in tasks]
        setattr(owner, leaf, Reference(getattr(owner, leaf), own))
    return model


def _close(a: Tensor, b: Tensor, by: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= by * b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_is_bit_exact(tiny: Any, clean: Any, family: str) -> None:
    model = clean(tiny.load(family))
    base = tiny.run(model)
    assert torch.equal(tiny.run(tiny.apply(model, tiny.task(model, std=0))), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_result_equals_replaced_modules(tiny: Any, clean: Any, family: str) -> None:
    model = clean(tiny.load(family))
    task = tiny.task(model)
    base = tiny.run(model)
    result = tiny.run(tiny.apply(model, task))
    assert not _close(result, base, 1e-2)
    assert _close(result, tiny.run(_replace(tiny.load(family), (task, 1.0))))
    assert torch.equal(tiny.run(model), base)


def test_two_tasks_are_one_parallel_sum_in_any_order(tiny: Any, clean: Any) -> None:
    model = clean(tiny.load("tiny_sd3"))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    result = tiny.run(tiny.apply(tiny.apply(model, a), b, 0.5))
    assert _close(result, tiny.run(_replace(tiny.load("tiny_sd3"), (a, 1.0), (b, 0.5))))
    assert _close(result, tiny.run(tiny.apply(tiny.apply(model, b, 0.5), a)))
    assert _close(result, tiny.run(tiny.patching.apply_tasks(model, [b, a], [0.5, 1.0])))


def test_the_same_task_twice_is_twice_its_strength(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    twice = tiny.apply(tiny.apply(model, task, 0.5), task, 0.25)
    assert _close(tiny.run(twice), tiny.run(tiny.apply(model, task, 0.75)))


def test_parts_have_strengths_of_their_own(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    weak = tiny.core.scale_task(task, parts={"scale": 0.5, "shift": 0.0, "subspace": 2.0})
    result = tiny.run(tiny.apply(model, task, {"scale": 0.5, "shift": 0.0, "subspace": 2.0}))
    assert _close(result, tiny.run(tiny.apply(model, weak)))


def test_branches_run_in_turn_are_bit_reproducible_and_made_once(
    tiny: Any, clean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = clean(tiny.load("tiny_sd3"))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    made = []

    class Counted(tiny.patching.Carrier):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(tiny.patching, "Carrier", Counted)
    with_a, with_b = tiny.apply(model, a), tiny.apply(model, b)
    branches = [model, with_a, with_b, tiny.apply(with_a, b)]
    first = [tiny.run(branch) for branch in branches]
    for i in (3, 1, 0, 2, 0, 3, 2, 1):
        assert torch.equal(tiny.run(branches[i]), first[i])
    assert len(made) == 3
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))


def test_strength_zero_is_the_model_itself(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    assert tiny.apply(model, tiny.task(model), 0.0) is model


def test_applying_leaves_the_model_object_as_it_was(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    options, wrappers = repr(model.model_options), repr(model.wrappers)
    once = tiny.apply(model, tiny.task(model))
    listed = once.model_options["transformer_options"]["diffscaler"]
    twice = tiny.apply(once, tiny.task(model, 2))
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert len(listed) == 1
    assert len(tiny.patching.tasks_on(twice)) == 2
    assert len(once.get_additional_models_with_key("diffscaler")) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_whatever_is_raised_inside_restores_the_model(tiny: Any, clean: Any, error: Any) -> None:
    import comfy.model_management

    error = error or comfy.model_management.InterruptProcessingException  # type: ignore[attr-defined]
    model = tiny.load("tiny_sd3")
    base = tiny.run(model)
    clean(model)
    patched = tiny.apply(model, tiny.task(model))
    layer = model.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
    with pytest.raises(error):
        tiny.run(patched)
    handle.remove()
    assert torch.equal(tiny.run(model), base)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.3, 0.7), (0.5, 1.0), (0.0, 1.0)])
def test_percent_range_follows_comfyuis_convention(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, start: float, end: float
) -> None:
    """The same steps as a conditioning with that range would have."""
    model = tiny.load("tiny_sd3")
    seen: list[float] = []
    active: list[float] = []
    running = tiny.patching.Carrier.running
    weights = tiny.patching._weights

    def noted(entries: Any, sampling: Any, sigma: Tensor, route: Any) -> Tensor:
        seen.append(float(sigma[0]))
        result = weights(entries, sampling, sigma, route)
        active.extend([float(sigma[0])] if result.any() else [])
        return result

    monkeypatch.setattr(tiny.patching, "_weights", noted)
    assert running is tiny.patching.Carrier.running
    result = tiny.run(tiny.apply(model, tiny.task(model), 1.0, start, end), steps=5)
    sampling = model.get_model_object("model_sampling")
    first, last = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
    assert active == [sigma for sigma in seen if last <= sigma <= first]
    assert len(seen) == 5
    assert 0 < len(active)
    assert (len(active) == 5) == (end - start == 1)
    assert not torch.equal(result, tiny.run(model, steps=5))


def test_ranges_that_never_hold_are_the_base(tiny: Any, clean: Any) -> None:
    model = clean(tiny.load("tiny_sd3"))
    patched = tiny.apply(model, tiny.task(model), 1.0, 0.9999, 1.0)
    assert torch.equal(tiny.run(patched), tiny.run(model))


def _lora(tiny: Any, model: Any) -> dict[str, Tensor]:
    """A LoRA file on every Linear, with changes of the biases too."""
    generator = torch.Generator().manual_seed(7)
    file = {}
    for name in tiny.layers(model):
        module = model.model.diffusion_model.get_submodule(name)
        if module.weight.ndim == 2:
            key = f"diffusion_model.{name}"
            out, width = module.weight.shape
            file[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator) * 0.05
            file[f"{key}.lora_down.weight"] = torch.randn(4, width, generator=generator) * 0.05
            if module.bias is not None:
                file[f"{key}.diff_b"] = torch.randn(out, generator=generator) * 0.05
    return file


def _merged(model: Any, lora: Mapping[str, Tensor], strength: float = 1.0) -> Any:
    """The LoRA added to a model's weights by hand."""
    for name, module in model.model.diffusion_model.named_modules():
        key = f"diffusion_model.{name}"
        if f"{key}.lora_up.weight" in lora:
            product = lora[f"{key}.lora_up.weight"] @ lora[f"{key}.lora_down.weight"]
            module.weight.data = module.weight + strength * product
        if f"{key}.diff_b" in lora:
            module.bias.data = module.bias + strength * lora[f"{key}.diff_b"]
    return model


def _reference_over(tiny: Any, lora: Mapping[str, Tensor], task: Any) -> Any:
    return _replace(_merged(tiny.load("tiny_sd3"), lora), (task, 1.0))


def test_over_a_stock_lora_that_patches_weights_and_biases(tiny: Any, clean: Any) -> None:
    import comfy.sd

    model = clean(tiny.load("tiny_sd3"))
    lora, task = _lora(tiny, model), tiny.task(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)  # type: ignore[attr-defined]
    plain = tiny.apply(model, task)
    before = tiny.run(plain)
    result = tiny.run(tiny.apply(patched, task))
    assert _close(result, tiny.run(_reference_over(tiny, lora, task)), 2e-5)
    assert torch.equal(tiny.run(plain), before)  # the bias it remembers is not the LoRA's
    import comfy.model_management

    comfy.model_management.unload_all_models()  # type: ignore[attr-defined]


def test_over_a_stock_bypass_lora(tiny: Any) -> None:
    import comfy.sd

    model = tiny.load("tiny_sd3")
    lora, task = _lora(tiny, model), tiny.task(model)
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
    assert _close(result, tiny.run(_reference_over(tiny, lora, task)), 2e-5)
    assert sum(forward is not None for forward in states[0]) > 10  # the bypass LoRA's own
    assert all(state == states[0] for state in states)
    assert torch.equal(tiny.run(bypass), alone)


def test_under_stock_lora_hooks_with_keyframes(tiny: Any) -> None:
    """Hooked weights change in the middle of sampling, biases too."""
    import comfy.hooks

    model = tiny.load("tiny_sd3")
    lora, task = _lora(tiny, model), tiny.task(model)

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
    assert _close(whole, tiny.run(_reference_over(tiny, lora, task)), 2e-5)
    late = tiny.run(patched, hooked(1, (0.5, 0.0), (1.0, 0.5)), hooked(2, (0.5, 0.0), (1.0, 0.5)))
    assert not _close(late, whole, 1e-3)
    assert _close(tiny.run(patched), base, 2e-6)


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
    lora, task = _lora(tiny, model), tiny.task(model)
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)  # type: ignore[attr-defined]
    patched = tiny.apply(patched, task)
    full = tiny.call(patched)
    patched.detach()
    comfy.model_management.unload_all_models()  # type: ignore[attr-defined]
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert sum(bool(getattr(m, "bias_function", ())) for m in patched.model.modules()) > 10
        assert _close(tiny.call_loaded(patched), full)
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

    assert _close(tiny.run(patched(1.0)), tiny.run(tiny.apply(model, task)))
    before = tiny.run(base)
    assert _close(before, tiny.run(model))
    torch._dynamo.utils.counters.clear()
    for i in range(20):
        tiny.run(patched(0.1 * (i + 1)), steps=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert _close(tiny.run(patched(1.0)), tiny.run(tiny.apply(model, task)))
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


def test_parameters_follow_when_comfyui_replaces_them(tiny: Any) -> None:
    """Dynamic VRAM puts other Parameter objects in their place."""
    import comfy.utils

    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    patched = tiny.apply(model, task)
    tiny.run(patched)
    parameters = tiny.patching.tasks_on(patched)[0].parameters
    for name, parameter in list(parameters.named_parameters()):
        if not name.endswith("/down"):
            comfy.utils.set_attr_param(parameters, name, parameter * 2)  # type: ignore[attr-defined]
    assert _close(tiny.run(patched), tiny.run(tiny.apply(model, tiny.core.scale_task(task, 2.0))))


def test_wrapper_ignores_any_cast(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    patched = tiny.apply(model, tiny.task(model))
    (wrapper,) = patched.wrappers["apply_model"]["diffscaler"]
    assert wrapper.to(torch.float8_e4m3fn) is wrapper
    assert wrapper.to(device="cpu", dtype=torch.float16) is wrapper


def test_a_wrapper_that_two_parties_brought_works_once(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    patched = tiny.apply(model, tiny.task(model))
    once = tiny.run(patched)
    (wrapper,) = patched.wrappers["apply_model"]["diffscaler"]
    patched.add_wrapper_with_key("apply_model", "another", wrapper)
    assert torch.equal(tiny.run(patched), once)


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_tasks_under_diffusers_names(tiny: Any, pack: Any, clean: Any, family: str) -> None:
    """What a task file holds: q, k, v apart where ComfyUI has them in one layer."""
    model = clean(tiny.load(family))
    hollow = pack.nodes.keymap.diffusers_model(model.model)
    task = tiny.core.new_task(hollow, rank=2, targets="all", name="fresh")
    base = tiny.run(model)
    assert torch.equal(tiny.run(tiny.apply(model, task)), base)
    shifted = {
        name: {**own, "scale": own["scale"] + 0.3, "up": torch.full_like(own["up"], 0.1)}
        for name, own in task.layers.items()
    }
    trained = task.replace(layers=shifted)
    result = tiny.run(tiny.apply(model, trained))
    native = pack.nodes.keymap.native_layers(trained, model.model)
    renamed = {f"transformer.{n.removeprefix('diffusion_model.')}": t for n, t in native.items()}
    direct = trained.replace(layers=renamed).with_info(naming="native")
    assert not _close(result, base, 1e-2)
    assert _close(result, tiny.run(_replace(tiny.load(family), (direct, 1.0))))


def test_a_task_for_another_model_is_refused_at_once(tiny: Any, clean: Any) -> None:
    sd3, flux = clean(tiny.load("tiny_sd3")), clean(tiny.load("tiny_flux"))
    with pytest.raises(tiny.core.MismatchError, match=r"'task'.*does not fit"):
        tiny.apply(flux, tiny.task(sd3))
    assert not tiny.patching.tasks_on(flux)


def test_a_layer_that_is_never_called_is_reported_once(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.load("tiny_sd3")
    model.model.diffusion_model.joint_blocks[0].unused = nn.Linear(4, 4)
    layers = ["joint_blocks.0.unused", "joint_blocks.0.x_block.mlp.fc1"]
    patched = tiny.apply(model, tiny.task(model, layers=layers))
    with caplog.at_level(logging.WARNING):
        tiny.run(patched)
        tiny.run(patched)
    found = [record.getMessage() for record in caplog.records if "never called" in record.message]
    assert len(found) == 1
    assert "'diffusion_model.joint_blocks.0.unused'" in found[0]


def _routed(conditioning: Any, rows: Sequence[Sequence[float]]) -> Any:
    import comfy.conds

    route = comfy.conds.CONDRegular(torch.tensor(rows, dtype=torch.float32))  # type: ignore[attr-defined]
    return [[c, {**more, "model_conds": {"ds_route": route}}] for c, more in conditioning]


def test_rows_of_one_batch_run_their_own_tasks(tiny: Any, clean: Any) -> None:
    model = clean(tiny.load("tiny_sd3"))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    both = tiny.apply(tiny.apply(model, a), b, 0.5)

    def run(rows: Sequence[Sequence[float]]) -> Tensor:
        return tiny.run(both, _routed(tiny.prompt(1), rows), _routed(tiny.prompt(2), rows))

    result = run([[1, 0], [0, 1]])
    assert _close(result[0], tiny.run(tiny.apply(model, a))[0])
    assert _close(result[1], tiny.run(tiny.apply(model, b, 0.5))[1])
    assert torch.equal(run([[0, 0]]), tiny.run(model))
    assert torch.equal(run([[1, 1]]), tiny.run(both))
    with pytest.raises(tiny.core.DiffScalerError, match="routes 3 tasks"):
        run([[1, 0, 1]])
