"""Tasks beside LoRA: neither switches the other on or off."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model_state_dict


@pytest.fixture
def lora(sd3_case: Any) -> dict[str, Tensor]:
    model = sd3_case.pipe().transformer
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "l")
    state = get_peft_model_state_dict(model, adapter_name="l")
    return {f"transformer.{name}": tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("first", ["task", "lora"])
def test_they_coexist_in_either_order(sd3_case: Any, lora: dict[str, Tensor], first: str) -> None:
    pipe = sd3_case.pipe()
    base = sd3_case.run(pipe)
    task = sd3_case.task(pipe, "a", 1)
    pipe.load_diffscaler(task)
    only_task = sd3_case.run(pipe)
    pipe.unload_diffscaler()
    pipe.load_lora_weights(dict(lora), adapter_name="lora")
    only_lora = sd3_case.run(pipe)
    if first == "task":
        pipe.unload_lora_weights()
        pipe.load_diffscaler(task)
        pipe.load_lora_weights(dict(lora), adapter_name="lora")
    else:
        pipe.load_diffscaler(task)
    both = sd3_case.run(pipe)
    assert (both - only_lora).abs().max() > 1e-3
    assert (both - only_task).abs().max() > 1e-4
    pipe.disable_diffscaler()
    assert torch.equal(sd3_case.run(pipe), only_lora)
    pipe.enable_diffscaler()
    pipe.disable_lora()
    assert torch.equal(sd3_case.run(pipe), only_task)
    pipe.enable_lora()
    pipe.set_adapters("lora", 0.0)
    torch.testing.assert_close(sd3_case.run(pipe), only_task)
    pipe.unload_lora_weights()
    assert torch.equal(sd3_case.run(pipe), only_task)
    pipe.unload_diffscaler()
    assert torch.equal(sd3_case.run(pipe), base)


def test_both_orders_give_the_same_sum(sd3_case: Any, lora: dict[str, Tensor]) -> None:
    pictures = []
    for order in ("task", "lora"), ("lora", "task"):
        pipe = sd3_case.pipe()
        for kind in order:
            if kind == "task":
                pipe.load_diffscaler(sd3_case.task(sd3_case.pipe(), "a", 1))
            else:
                pipe.load_lora_weights(dict(lora), adapter_name="lora")
        pictures.append(sd3_case.run(pipe))
    assert torch.equal(*pictures)


def test_a_second_lora_leaves_rows_and_names_alone(sd3_case: Any, lora: dict[str, Tensor]) -> None:
    pipe = sd3_case.pipe()
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    pipe.load_lora_weights(dict(lora), adapter_name="lora")
    with pipe.diffscaler_rows(["a", None]):
        rows = sd3_case.run(pipe)
    whole = sd3_case.run(pipe)
    torch.testing.assert_close(rows[0], whole[0], atol=1e-5, rtol=0)
    assert pipe.get_active_adapters() == ["lora"]
    assert pipe.get_active_diffscalers() == ["a"]
    pipe.delete_adapters("lora")
    assert pipe.get_active_diffscalers() == ["a"]


def test_fusing_a_lora_makes_it_part_of_what_a_scale_multiplies(
    sd3_case: Any, lora: dict[str, Tensor]
) -> None:
    pipe = sd3_case.pipe()
    pipe.load_lora_weights(dict(lora), adapter_name="lora")
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(2, 3, 16)
    beside = layer(x)
    pipe.fuse_lora()
    fused = layer(x)
    pipe.unfuse_lora()
    lora_part = layer(x) - layer.get_base_layer()(x)
    scale = sd3_case.task(sd3_case.pipe(), "a", 1).layers
    scale = scale["transformer.transformer_blocks.0.attn.to_q"]["scale"]
    torch.testing.assert_close(fused, beside + scale * lora_part, atol=1e-5, rtol=1e-4)
