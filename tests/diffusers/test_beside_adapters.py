"""Tasks beside ControlNets and IP-Adapters in diffusers, loaded before or after."""

from collections.abc import Callable
from typing import Any

import diffusers as d
import pytest
import torch
from torch import Tensor

from diffscaler_core import new_task

SIDE = 8


def _controlnet(pipe: Any) -> Any:
    torch.manual_seed(1)
    net = d.ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False)
    for parameter in net.parameters():
        parameter.data = parameter + 0.05 * torch.randn(parameter.shape)
    parts = {**pipe.components, "safety_checker": None, "feature_extractor": None}
    parts.pop("image_encoder", None)
    made = d.StableDiffusionControlNetPipeline(
        **parts, controlnet=net, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def _ip_adapter(pipe: Any) -> Any:
    """As `load_ip_adapter` does it, from a file's tensors."""
    torch.manual_seed(1)
    width, tokens, picture = pipe.unet.config.cross_attention_dim, 4, 10
    state: dict[str, dict[str, Tensor]] = {
        "image_proj": {
            "proj.weight": torch.randn(width * tokens, picture),
            "proj.bias": torch.randn(width * tokens),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }
    crosses = [n for n in pipe.unet.attn_processors if n.endswith("attn2.processor")]
    for i, name in enumerate(crosses):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            shape = attention.to_k.weight.shape
            state["ip_adapter"][f"{2 * i + 1}.{key}.weight"] = torch.randn(shape)
    pipe.unet._load_ip_adapter_weights([state])
    pipe.set_ip_adapter_scale(0.8)
    return pipe


def _call(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    if kind == "ControlNet":
        return {"image": torch.rand(2, 3, SIDE, SIDE, generator=generator)}
    # (2 × batch, pictures, width): the unconditional ones first
    return {"ip_adapter_image_embeds": [torch.randn(4, 1, 10, generator=generator)]}


DRESS: dict[str, Callable[[Any], Any]] = {"ControlNet": _controlnet, "IP-Adapter": _ip_adapter}
KINDS = pytest.mark.parametrize("kind", DRESS)


def _by_hand(unet: Any, task: Any) -> None:
    """Folds scales and shifts into a model's own weights."""
    for name, own in task.component_layers("unet").items():
        layer = unet.get_submodule(name)
        gain = (1 + own["scale"]).view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.data = layer.weight * gain
        bias = own["shift"] if layer.bias is None else layer.bias + own["shift"]
        layer.bias = torch.nn.Parameter(bias)


@KINDS
@pytest.mark.parametrize("first", ["task", "adapter"])
def test_both_orders_are_the_weights_changed_by_hand(cases: Any, kind: str, first: str) -> None:
    case = cases["sd15"]
    task, other = (
        case.task(case.pipe(), name, seed, "scale_shift") for seed, name in enumerate("ab")
    )
    plain = DRESS[kind](case.pipe())
    base = case.run(plain, 2, **_call(kind))
    changed = case.pipe()
    _by_hand(changed.unet, task)
    wanted = case.run(DRESS[kind](changed), 2, **_call(kind))
    pipe = case.pipe() if first == "task" else DRESS[kind](case.pipe())
    pipe.load_diffscaler(task, "a")
    pipe.load_diffscaler(other, "b")
    dressed = DRESS[kind](pipe) if first == "task" else pipe
    dressed.set_diffscaler("a")
    result = case.run(dressed, 2, **_call(kind))
    assert torch.allclose(result, wanted, atol=1e-5)
    assert not torch.allclose(result, base, atol=1e-3)
    with dressed.diffscaler_rows(["a", None]):
        rows = case.run(dressed, 2, **_call(kind))
    assert torch.allclose(rows[0], wanted[0], atol=1e-5)
    assert torch.allclose(rows[1], base[1], atol=1e-5)
    dressed.unload_diffscaler()
    assert torch.equal(case.run(dressed, 2, **_call(kind)), base)


def test_an_ip_adapters_own_layers_are_no_targets(cases: Any) -> None:
    """A task made with one loaded fits the model without it."""
    pipe = cases["sd15"].pipe()
    for targets in ("blocks", "attention", "all"):
        without = new_task(pipe.unet, rank=2, targets=targets, name="a").layers.keys()
        dressed = _ip_adapter(cases["sd15"].pipe())
        assert new_task(dressed.unet, rank=2, targets=targets, name="a").layers.keys() == without
