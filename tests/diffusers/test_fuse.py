"""Folding tasks into the weights, and back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffscaler_core import DiffScalerError, load_task, new_task

METHODS = ["scale_shift", "bitfit", "difffit", "lora"]


def load(case: Any, pipe: Any, method: str, name: str = "t", seed: int = 1) -> None:
    pipe.load_diffscaler(case.task(pipe, name, seed, method))


@pytest.mark.parametrize("method", METHODS)
def test_a_fused_task_gives_the_same_picture(case: Any, method: str) -> None:
    pipe = case.pipe()
    model = case.model(pipe)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    load(case, pipe, method)
    pipe.set_diffscaler("t", 0.7)
    running = case.run(pipe)
    pipe.fuse_diffscaler(partial=True)  # some layers of these models have no bias to shift
    assert list(model.state_dict()) == list(base)
    torch.testing.assert_close(case.run(pipe), running, atol=2e-5, rtol=0)
    pipe.unfuse_diffscaler()
    assert all(torch.equal(base[k], v) for k, v in model.state_dict().items())
    assert torch.equal(case.run(pipe), running)


def test_a_relu_subspace_is_named_or_goes_on_running(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    load(sd3_case, pipe, "diffscaler")
    running, weight = sd3_case.run(pipe), pipe.transformer.transformer_blocks[0].ff.net[2].weight
    before = weight.clone()
    with pytest.raises(DiffScalerError, match=r"'t' \(its relu subspace\).*partial=True"):
        pipe.fuse_diffscaler()
    assert torch.equal(weight, before)
    pipe.fuse_diffscaler(partial=True)
    assert not torch.equal(weight, before)
    torch.testing.assert_close(sd3_case.run(pipe), running, atol=2e-5, rtol=0)
    pipe.unfuse_diffscaler()
    assert torch.equal(weight, before)
    assert torch.equal(sd3_case.run(pipe), running)


def test_several_tasks_fuse_as_their_parallel_sum(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    load(sd3_case, pipe, "scale_shift", "a", 1)
    load(sd3_case, pipe, "lora", "b", 2)
    load(sd3_case, pipe, "bitfit", "c", 3)
    pipe.set_diffscaler(["a", "b"], [0.5, {"subspace": 2.0}])
    running = sd3_case.run(pipe)
    pipe.fuse_diffscaler()
    torch.testing.assert_close(sd3_case.run(pipe), running, atol=2e-5, rtol=0)
    pipe.set_diffscaler("c")  # the third acts on the fused model
    assert (sd3_case.run(pipe) - running).abs().max() > 1e-3
    pipe.set_diffscaler([])
    torch.testing.assert_close(sd3_case.run(pipe), running, atol=2e-5, rtol=0)


def test_a_fused_base_refuses_what_would_lie_about_it(sd3_case: Any, tmp_path: Path) -> None:
    pipe = sd3_case.pipe()
    base = sd3_case.run(pipe)
    load(sd3_case, pipe, "scale_shift", "a")
    running = sd3_case.run(pipe)
    pipe.save_diffscaler(tmp_path / "before")
    pipe.fuse_diffscaler("a")
    refused: list[Any] = [
        pipe.disable_diffscaler,
        pipe.unload_diffscaler,
        pipe.fuse_diffscaler,
        lambda: pipe.set_diffscaler("a", 0.5),
        lambda: pipe.delete_diffscaler("a"),
        lambda: pipe.diffscaler_rows(["a", None]).__enter__(),
        lambda: pipe.load_diffscaler(tmp_path / "before", "a", hotswap=True),
    ]
    for call in refused:
        with pytest.raises(DiffScalerError, match=r"unfuse_diffscaler\(\)"):
            call()
    pipe.save_diffscaler(tmp_path / "after")
    before, after = (
        load_task(tmp_path / n / "diffscaler.safetensors") for n in ("before", "after")
    )
    assert before.info == after.info
    for name, tensors in before.layers.items():
        assert all(torch.equal(t, after.layers[name][k]) for k, t in tensors.items())
    pipe.unload_diffscaler(keep_fused=False)
    assert torch.equal(sd3_case.run(pipe), base)
    pipe.load_diffscaler(tmp_path / "before")
    pipe.fuse_diffscaler()
    pipe.unload_diffscaler(keep_fused=True)
    assert pipe.get_list_diffscalers() == {}
    torch.testing.assert_close(sd3_case.run(pipe), running, atol=2e-5, rtol=0)


def test_loading_beside_a_fused_task_and_unfusing_keeps_both(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    load(sd3_case, pipe, "diffscaler", "a", 1)
    load(sd3_case, pipe, "diffscaler", "b", 2)
    pipe.set_diffscaler(["a", "b"])
    both = sd3_case.run(pipe)
    pipe.delete_diffscaler("b")
    pipe.fuse_diffscaler(partial=True)
    load(sd3_case, pipe, "diffscaler", "b", 2)
    pipe.unfuse_diffscaler()
    pipe.set_diffscaler(["a", "b"])
    assert torch.equal(sd3_case.run(pipe), both)


def test_unfusing_over_foreign_changes_is_refused(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    load(sd3_case, pipe, "scale_shift")
    pipe.fuse_diffscaler()
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    fused = weight.detach().clone()
    with torch.no_grad():
        weight[0] += 0.5
    with pytest.raises(DiffScalerError, match="changed after fuse_diffscaler"):
        pipe.unfuse_diffscaler()
    with torch.no_grad():
        weight.copy_(fused)
    pipe.unfuse_diffscaler()


def test_sixteen_bit_weights_fuse_to_their_own_precision(sd3_case: Any) -> None:
    pipe = sd3_case.pipe().to(torch.bfloat16)
    load(sd3_case, pipe, "scale_shift")
    layer, x = pipe.transformer.transformer_blocks[0].ff.net[2], torch.randn(2, 3, 64).bfloat16()
    running = layer(x)
    pipe.fuse_diffscaler()
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), running, atol=2e-2, rtol=2e-2)


def test_grouped_convolutions_keep_their_subspace_running(make_noisy: Any) -> None:
    from diffscaler_core.plugin.fuse import fuse, plan_fuse, unfuse
    from diffscaler_core.plugin.state import ModelState

    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1, groups=2))
    x = torch.randn(2, 4, 5, 5)
    task = make_noisy(new_task(model, "lora", 2, "all"), 1)
    shifts = make_noisy(new_task(model, "scale_shift", 2, "all"), 2)
    state = ModelState(model, "transformer", {"t": task, "s": shifts}, {"t": 1.0, "s": 1.0})
    base = model(x)
    state.adopt(state.build(state.tasks))
    running = model(x)
    plan = plan_fuse(state, ["t", "s"])
    assert plan.stays == ["'t' (a subspace on grouped convolutions)"]
    fuse(plan)
    torch.testing.assert_close(model(x), running)
    unfuse(state)
    assert torch.equal(model(x), running)
    state.clear()
    assert torch.equal(model(x), base)
