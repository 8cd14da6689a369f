"""Guidance, translation and experts that are stopped in the middle, and on quantised bases."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .test_experts import Experts
from .test_guidance import guided, loss_of, value
from .test_translate import latent_of, run

GUIDED = ("at the prediction", "through the model")
SYSTEMS = (*GUIDED, "translate", "experts")
QUANTISED = ("tiny_flux_float8_e4m3fn", "tiny_flux_int8_tensorwise")


def drawing(system: str, tiny: Any, pack: ModuleType, model: Any) -> Callable[[], Tensor]:
    """Draws a picture with a system on a tiny model."""
    if system in GUIDED:
        task = tiny.apply(model, tiny.task(model, 1))
        led = guided(pack.nodes, task, loss_of(pack.nodes), 1.0, gradient=system)
        return lambda: tiny.run(led, steps=3)
    if system == "translate":
        one, other = (tiny.apply(model, tiny.task(model, seed, name=str(seed))) for seed in (1, 2))
        node, prompt = pack.nodes.translate.DiffScalerTranslate, tiny.prompt(1)
        return lambda: run(node, one, other, prompt, latent_of(model))
    with torch.inference_mode():
        experts = Experts(tiny, pack, "tiny_sd3")
    routed = pack.nodes.expert_routing.route_experts(model, experts.tasks, experts.router)
    return lambda: tiny.run(routed, steps=3)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("at", [1, 2])
def test_stopped_in_the_middle_nothing_is_left_behind(
    tiny: Any, pack: ModuleType, clean: Any, system: str, at: int
) -> None:
    """As ComfyUI stops a queue: by what it raises between two of the model's layers."""
    import comfy.model_management as management

    stop = management.InterruptProcessingException  # type: ignore[attr-defined]
    model = tiny.load("tiny_sd3")
    with torch.inference_mode():
        base = tiny.run(model)
        clean(model)
        draw = drawing(system, tiny, pack, model)
        whole = draw()
        calls: list[int] = []

        def interrupt(*_: Any) -> None:
            calls.append(1)
            if len(calls) > at:
                raise stop

        layer = model.model.diffusion_model.joint_blocks[0].x_block.mlp.fc1
        handle = layer.register_forward_pre_hook(interrupt)
        with pytest.raises(stop):
            draw()
        handle.remove()
        assert len(calls) == at + 1
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert not management.in_training  # type: ignore[attr-defined]
        assert torch.equal(tiny.run(model), base)
        assert torch.equal(draw(), whole)


@pytest.mark.parametrize("file", QUANTISED)
@pytest.mark.parametrize("gradient", GUIDED)
def test_guidance_leads_a_quantised_base(
    tiny: Any, pack: ModuleType, clean: Any, file: str, gradient: str
) -> None:
    losses = loss_of(pack.nodes)
    with torch.inference_mode():
        model = clean(tiny.load(file))
        task = tiny.apply(model, tiny.task(model, 1))
        plain = tiny.run(task, steps=5)
        led = tiny.run(guided(pack.nodes, task, losses, 2.0, gradient=gradient), steps=5)
        found, before = (value(pack.nodes, task, losses, one) for one in (led, plain))
    assert found < 0.5 * before


@pytest.mark.parametrize("file", QUANTISED)
def test_translation_on_a_quantised_base_gives_the_latent_back(
    tiny: Any, pack: ModuleType, clean: Any, file: str
) -> None:
    node, prompt = pack.nodes.translate.DiffScalerTranslate, tiny.prompt(1)
    with torch.inference_mode():
        model = clean(tiny.load(file))
        one, other = (tiny.apply(model, tiny.task(model, i, name=str(i))) for i in (1, 2))
        latent = latent_of(model)
        back, there = (
            run(node, one, to, prompt, latent) - latent["samples"] for to in (one, other)
        )
    assert back.abs().max() < 1e-3
    assert there.abs().max() > 10 * back.abs().max()


@pytest.mark.parametrize("file", QUANTISED)
def test_experts_on_a_quantised_base_run_by_row(
    tiny: Any, pack: ModuleType, clean: Any, file: str
) -> None:
    with torch.inference_mode():
        experts = Experts(tiny, pack, file)
        clean(experts.model)
        (plain,) = experts.calls(experts.model)
        posterior = experts.balance(plain.x[:4], plain.sigma[:4])
        chosen = posterior.argmax(1).tolist()
        assert sorted(chosen) == [0, 0, 1, 1]
        (mixed,) = experts.calls(experts.put())
        alone = [experts.calls(tiny.apply(experts.model, task))[0] for task in experts.tasks]
    for row in range(8):
        own, other = (alone[k].output[row] for k in (chosen[row % 4], 1 - chosen[row % 4]))
        apart = (own - other).norm()
        assert (mixed.output[row] - own).norm() < 0.03 * apart
