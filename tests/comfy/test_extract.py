"""Extraction from real ComfyUI models, with real LoRAs of several kinds on them."""

from typing import Any

import pytest
import torch
from torch import Tensor


def lora_file(model: Any, kind: str, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA, LoHa or LoKr by the names of ComfyUI's own layers, on several kinds of them."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    file: dict[str, Tensor] = {}
    for key, weight in model.model.state_dict().items():
        if not key.endswith(".weight") or weight.ndim not in (2, 4) or "embedder" in key:
            continue
        name, (out, width) = key.removesuffix(".weight"), weight.flatten(1).shape
        if weight.ndim == 4 and kind != "lora":
            continue
        if kind == "lora":
            file[f"{name}.lora_up.weight"] = noise(out, rank, *([1, 1] if weight.ndim == 4 else []))
            file[f"{name}.lora_down.weight"] = noise(rank, *weight.shape[1:])
            file[f"{name}.alpha"] = torch.tensor(1.0)
        elif kind == "loha":
            for i in (1, 2):
                file[f"{name}.hada_w{i}_a"], file[f"{name}.hada_w{i}_b"] = (
                    noise(out, rank),
                    noise(rank, width),
                )
        else:
            file[f"{name}.lokr_w1"] = noise(2, 2)
            file[f"{name}.lokr_w2"] = noise(out // 2, width // 2)
        if f"{name}.bias" in model.model.state_dict():
            file[f"{name}.diff_b"] = noise(out)
    return file


def with_lora(model: Any, kind: str) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora_file(model, kind), 0.7, 0.0)[0]


def extracted(part: Any, tuned: Any, base: Any, **settings: Any) -> Any:
    return part("nodes.native_weights").extracted(tuned, base, {"rank": 16, **settings})


def close(a: Tensor, b: Tensor, by: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= by * b.abs().max())


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux", "tiny_unet"])
def test_a_lora_of_any_layers_is_its_task(tiny: Any, part: Any, clean: Any, name: str) -> None:
    model = clean(tiny.load(name))
    tuned = with_lora(model, "lora")
    task, report = extracted(part, tuned, model)
    assert max(len(own["down"]) for own in task.layers.values() if "down" in own) == 2
    assert "100.00% of the change kept" in report
    wanted = tiny.run(tuned)
    assert not close(tiny.run(model), wanted, 1e-2)
    assert close(tiny.run(tiny.apply(model, task)), wanted)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kinds_that_cannot_be_converted_are_extracted(
    tiny: Any, part: Any, clean: Any, kind: str
) -> None:
    model = clean(tiny.load("tiny_sd3"))
    tuned = with_lora(model, kind)
    wanted = tiny.run(tuned)
    task, _ = extracted(part, tuned, model, rank=128)
    assert close(tiny.run(tiny.apply(model, task)), wanted)
    small, report = extracted(part, tuned, model, rank=1)
    assert not close(tiny.run(tiny.apply(model, small)), wanted, 1e-3)
    assert "layers that lose most" in report


def test_the_loaded_and_patched_model_gives_the_same_task(tiny: Any, part: Any) -> None:
    model = tiny.load("tiny_sd3")
    tuned = with_lora(model, "lora")
    before = extracted(part, tuned, model)[0]
    tiny.run(tuned)  # its weights now lie in the model both share
    after = extracted(part, tuned, model)[0]
    assert before.layers.keys() == after.layers.keys()
    for layer, own in before.layers.items():
        assert all(torch.equal(t, after.layers[layer][n]) for n, t in own.items())


def test_two_checkpoints_in_diffusers_names(tiny: Any, part: Any) -> None:
    base = tiny.load("tiny_sd3")
    other = tiny.load("tiny_sd3")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.model.diffusion_model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.02 * noise)
    task, report = extracted(part, other, base, rank=999)
    assert "transformer.transformer_blocks.0.attn.to_q" in task.layers
    assert "not in the task" in report or close(tiny.run(tiny.apply(base, task)), tiny.run(other))
    assert task.info["base"]["class"] == "SD3Transformer2DModel"


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_a_lora_on_a_quantised_model(tiny: Any, part: Any, kind: str) -> None:
    model = tiny.load(f"tiny_flux_{kind}")
    tuned = with_lora(model, "lora")
    task, _ = extracted(part, tuned, model)
    assert max(len(own["down"]) for own in task.layers.values() if "down" in own) == 2
    plain = tiny.load("tiny_flux")
    exact = extracted(part, with_lora(plain, "lora"), plain)[0]
    # what the LoRA adds does not depend on how the base is stored
    assert task.layers.keys() == exact.layers.keys()
    for layer, own in task.layers.items():
        done, wanted = (o["up"] @ o["down"].flatten(1) for o in (own, exact.layers[layer]))
        assert close(done, wanted, 1e-3)


def test_what_weights_do_not_show_is_refused(tiny: Any, part: Any) -> None:
    import comfy.sd

    model = tiny.load("tiny_sd3")
    with pytest.raises(ValueError, match="runs tasks"):
        extracted(part, tiny.apply(model, tiny.task(model)), model)
    file = lora_file(model, "lora")
    bypassed = comfy.sd.load_bypass_lora_for_models(model, None, file, 1.0, 0.0)[0]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="bypass"):
        extracted(part, bypassed, model)
    with pytest.raises(ValueError, match="no fine-tune of"):
        extracted(part, tiny.load("tiny_flux"), model)
    with pytest.raises(ValueError, match="the same in all"):
        extracted(part, model.clone(), model)


def test_the_stop_button_stops_it(tiny: Any, part: Any) -> None:
    import comfy.model_management as management

    model = tiny.load("tiny_sd3")
    management.interrupt_current_processing(True)  # type: ignore[attr-defined]
    with pytest.raises(management.InterruptProcessingException):  # type: ignore[attr-defined]
        extracted(part, with_lora(model, "lora"), model)
    extracted(part, with_lora(model, "lora"), model)
