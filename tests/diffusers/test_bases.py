"""Bases in other dtypes, quantised, offloaded, checkpointed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffscaler_core import DiffScalerError
from diffscaler_core.pipelines import attachments


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator).to(dtype),
        "pooled_projections": torch.randn(batch, 12, generator=generator).to(dtype),
        "timestep": torch.ones(batch) * 500,
    }


def outputs(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model(**inputs(dtype), return_dict=False)[0]


def gradients(pipe: Any) -> list[Tensor]:
    parameters = list(attachments(pipe)["transformer"].requires_grad_().parameters())
    output = pipe.transformer(**inputs(), return_dict=False)[0]
    return list(torch.autograd.grad(output.square().sum(), parameters, materialize_grads=True))


def test_gradient_checkpointing_gives_the_same_gradients(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    pipe.transformer.requires_grad_(False).train()
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    plain = gradients(pipe)
    pipe.transformer.enable_gradient_checkpointing()
    checkpointed = gradients(pipe)
    assert len(plain) == len(checkpointed) > 50
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


def test_a_bfloat16_base_runs_a_float32_task(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    task = sd3_case.task(pipe, "a", 1)
    before = outputs(pipe.transformer)
    pipe.load_diffscaler(task)
    effect = outputs(pipe.transformer) - before
    half = sd3_case.pipe().to(torch.bfloat16)
    half_before = outputs(half.transformer, torch.bfloat16)
    half.load_diffscaler(task)
    half_effect = outputs(half.transformer, torch.bfloat16) - half_before
    assert half_effect.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in attachments(half)["transformer"].parameters())
    assert (half_effect - effect).norm() < 0.2 * effect.norm()  # the base rounds so coarsely
    half.disable_diffscaler()
    assert torch.equal(outputs(half.transformer, torch.bfloat16), half_before)


def test_a_pipeline_moved_to_another_dtype_takes_its_tasks_along(sd3_case: Any) -> None:
    pipe, direct = sd3_case.pipe(), sd3_case.pipe().to(torch.bfloat16)
    task = sd3_case.task(pipe, "a", 1)
    pipe.load_diffscaler(task)
    outputs(pipe.transformer)
    pipe.to(torch.bfloat16)
    moved = outputs(pipe.transformer, torch.bfloat16)
    direct.load_diffscaler(task)
    expected = outputs(direct.transformer, torch.bfloat16)
    torch.testing.assert_close(moved, expected, atol=3e-2, rtol=3e-2)


def test_an_int8_base_shows_the_same_effect_and_refuses_to_fuse(sd3_case: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    pipe, int8 = sd3_case.pipe(), sd3_case.pipe()
    quantization.quantize_(int8.transformer, quantization.Int8WeightOnlyConfig())
    task = sd3_case.task(pipe, "a", 1, "scale_shift")
    before, int8_before = outputs(pipe.transformer), outputs(int8.transformer)
    rounding = (int8_before - before).norm()
    assert rounding > 0
    for each in (pipe, int8):
        each.load_diffscaler(task)
    effect = outputs(pipe.transformer) - before
    int8_effect = outputs(int8.transformer) - int8_before
    assert (int8_effect - effect).norm() < 0.02 * effect.norm()
    with pytest.raises(DiffScalerError, match="quantised"):
        int8.fuse_diffscaler()
    int8.unload_diffscaler()
    assert torch.equal(outputs(int8.transformer), int8_before)


def test_float8_storage_shows_the_same_effect_and_refuses_to_fuse(sd3_case: Any) -> None:
    pipe, float8 = sd3_case.pipe(), sd3_case.pipe()
    float8.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    task = sd3_case.task(pipe, "a", 1, "scale_shift")
    before, float8_before = outputs(pipe.transformer), outputs(float8.transformer)
    for each in (pipe, float8):
        each.load_diffscaler(task)
    effect = outputs(pipe.transformer) - before
    float8_effect = outputs(float8.transformer) - float8_before
    assert (float8_effect - effect).norm() < 0.1 * effect.norm()
    with pytest.raises(DiffScalerError, match="quantised"):
        float8.fuse_diffscaler()
    float8.disable_diffscaler()
    assert torch.equal(outputs(float8.transformer), float8_before)


def offloads() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    hooks = pytest.importorskip("diffusers.hooks")

    def sequential(model: Any) -> None:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)

    def whole(model: Any) -> None:
        accelerate.cpu_offload_with_hook(model, torch.device("cpu"))

    def group(model: Any) -> None:
        device = torch.device("cpu")
        hooks.apply_group_offloading(model, device, device, "leaf_level")

    yield from (sequential, whole, group)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["sequential", "whole", "group"])
def test_offloaded_models_carry_tasks(sd3_case: Any, kind: int, when: str) -> None:
    offload = list(offloads())[kind]
    pipe, plain = sd3_case.pipe(), sd3_case.pipe()
    task = sd3_case.task(pipe, "a", 1)
    before = outputs(plain.transformer)
    plain.load_diffscaler(task)
    expected = outputs(plain.transformer)
    if when == "before":
        offload(pipe.transformer)
    pipe.load_diffscaler(task)
    if when == "after":
        offload(pipe.transformer)
    assert torch.equal(outputs(pipe.transformer), expected)
    with pipe.diffscaler_rows(["a", None]):
        rows = outputs(pipe.transformer)
    torch.testing.assert_close(rows[0], expected[0])
    torch.testing.assert_close(rows[1], before[1])
    pipe.unload_diffscaler()
    assert torch.equal(outputs(pipe.transformer), before)


@pytest.mark.parametrize("kind", [0, 2], ids=["sequential", "group"])
def test_fusing_into_weights_that_are_elsewhere_is_refused(sd3_case: Any, kind: int) -> None:
    pipe = sd3_case.pipe()
    list(offloads())[kind](pipe.transformer)
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1, "scale_shift"))
    with pytest.raises(DiffScalerError, match="fuse before enabling offload"):
        pipe.fuse_diffscaler()
