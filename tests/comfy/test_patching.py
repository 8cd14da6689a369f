"""Tasks on real ComfyUI models: what they compute, and that they leave nothing behind."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .formula import close, replaced

FAMILIES = ("tiny_sd3", "tiny_flux", "tiny_unet")


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
    assert not close(result, base, 1e-2)
    assert close(result, tiny.run(replaced(tiny.load(family), (task, 1.0))))
    assert torch.equal(tiny.run(model), base)


def test_two_tasks_are_one_parallel_sum_in_any_order(tiny: Any, clean: Any) -> None:
    model = clean(tiny.load("tiny_sd3"))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    result = tiny.run(tiny.apply(tiny.apply(model, a), b, 0.5))
    assert close(result, tiny.run(replaced(tiny.load("tiny_sd3"), (a, 1.0), (b, 0.5))))
    assert close(result, tiny.run(tiny.apply(tiny.apply(model, b, 0.5), a)))
    assert close(result, tiny.run(tiny.patching.apply_tasks(model, [b, a], [0.5, 1.0])))


def test_the_same_task_twice_is_twice_its_strength(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    twice = tiny.apply(tiny.apply(model, task, 0.5), task, 0.25)
    assert close(tiny.run(twice), tiny.run(tiny.apply(model, task, 0.75)))


def test_parts_have_strengths_of_their_own(tiny: Any) -> None:
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    weak = tiny.core.scale_task(task, parts={"scale": 0.5, "shift": 0.0, "subspace": 2.0})
    result = tiny.run(tiny.apply(model, task, {"scale": 0.5, "shift": 0.0, "subspace": 2.0}))
    assert close(result, tiny.run(tiny.apply(model, weak)))


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
    weights = tiny.patching.weights_at

    def noted(entries: Any, sampling: Any, sigma: Tensor, rows: Any) -> Tensor:
        seen.append(float(sigma[0]))
        result = weights(entries, sampling, sigma, rows)
        active.extend([float(sigma[0])] if result.any() else [])
        return result

    monkeypatch.setattr(tiny.patching, "weights_at", noted)
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
    assert close(tiny.run(patched), tiny.run(tiny.apply(model, tiny.core.scale_task(task, 2.0))))


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
    assert not close(result, base, 1e-2)
    assert close(result, tiny.run(replaced(tiny.load(family), (direct, 1.0))))


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
