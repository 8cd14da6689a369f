"""What holds for every architecture, through its stock pipeline's own call."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch


def test_an_untrained_task_changes_no_bit(case: Any) -> None:
    from diffscaler_core import new_task

    pipe = case.pipe()
    before = case.run(pipe)
    pipe.load_diffscaler(new_task(case.model(pipe), name="fresh", component=case.component))
    assert pipe.get_list_diffscalers() == {case.component: ["fresh"]}
    assert torch.equal(case.run(pipe), before)


def test_disabling_and_unloading_give_the_base_back_bit_for_bit(case: Any) -> None:
    pipe = case.pipe()
    model = case.model(pipe)
    before, keys = case.run(pipe), list(model.state_dict())
    values = {k: v.clone() for k, v in model.state_dict().items()}
    pipe.load_diffscaler(case.task(pipe, "a", 1))
    changed = case.run(pipe)
    assert (changed - before).abs().max() > 1e-3
    assert list(model.state_dict()) == keys
    pipe.disable_diffscaler()
    assert torch.equal(case.run(pipe), before)
    pipe.enable_diffscaler()
    assert torch.equal(case.run(pipe), changed)
    pipe.unload_diffscaler()
    assert torch.equal(case.run(pipe), before)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert not model._forward_pre_hooks
    assert pipe.get_list_diffscalers() == {}


def test_rows_equal_separate_runs(case: Any) -> None:
    pipe = case.pipe()
    base = case.run(pipe, 3)
    pipe.load_diffscaler(case.task(pipe, "a", 1))
    pipe.load_diffscaler(case.task(pipe, "b", 2))
    pipe.set_diffscaler("a")
    only_a = case.run(pipe, 3)
    pipe.set_diffscaler("b")
    only_b = case.run(pipe, 3)
    with pipe.diffscaler_rows(["a", "b", None]):
        mixed = case.run(pipe, 3)
    expected = torch.stack([only_a[0], only_b[1], base[2]])
    assert (only_a[0] - base[0]).abs().max() > 1e-3
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    assert torch.equal(case.run(pipe, 3), only_b)  # what was set before holds again


def test_rows_follow_the_prompts_with_two_images_each(case: Any) -> None:
    if not case.images:
        pytest.skip("this pipeline makes one image per prompt")
    pipe = case.pipe()
    pipe.load_diffscaler(case.task(pipe, "a", 1))
    only_a = case.run(pipe, 2, num_images_per_prompt=2)
    pipe.disable_diffscaler()
    base = case.run(pipe, 2, num_images_per_prompt=2)
    pipe.enable_diffscaler()
    with pipe.diffscaler_rows(["a", None]):
        mixed = case.run(pipe, 2, num_images_per_prompt=2)
    expected = torch.cat([only_a[:2], base[2:]])
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_a_saved_task_gives_the_same_picture_in_a_new_pipeline(case: Any, tmp_path: Path) -> None:
    pipe = case.pipe()
    pipe.load_diffscaler(case.task(pipe, "a", 1))
    there = pipe.save_diffscaler(tmp_path, "a")
    assert there == tmp_path / "diffscaler.safetensors"
    other = case.pipe()
    other.load_diffscaler(tmp_path, "renamed")
    assert other.get_active_diffscalers() == ["renamed"]
    assert torch.equal(case.run(other), case.run(pipe))


def test_only_the_tasks_parameters_get_gradients(case: Any) -> None:
    from diffscaler_core.pipelines import attachments

    pipe = case.pipe()
    model = case.model(pipe)
    model.requires_grad_(False)
    pipe.load_diffscaler(case.task(pipe, "a", 1))
    attachment = attachments(pipe)[case.component].requires_grad_()
    seen: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda m, a, k, y: seen.append(y[0]), with_kwargs=True)
    undecorated = type(pipe).__call__.__wrapped__
    call = {**case.inputs(1), "num_inference_steps": 1, "output_type": "np"}
    # at its end the pipeline turns its picture into numpy, which gradients forbid
    with torch.enable_grad(), contextlib.suppress(RuntimeError):
        undecorated(pipe, **call)
    handle.remove()
    seen[0].square().mean().backward()
    assert not any(p.grad is not None for p in model.parameters())
    grads = [p.grad for p in attachment.parameters()]
    assert sum(g is not None and bool(g.any()) for g in grads) > len(grads) / 2
