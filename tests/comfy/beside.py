"""ComfyUI's other nodes beside tasks: one table, which the tests run and the page is written from.

Nothing of ComfyUI is imported before a case is run, so that `scripts/make_beside.py` can read it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .formula import lora_for, merged

#: (tiny models, a MODEL) -> the MODEL that a node gives.
Dress = Callable[[Any, Any], Any]
#: (tiny models, a MODEL, positive, negative) -> positive, negative as a node gives them.
DressConds = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Beside:
    """Another node.

    Attributes:
        name: Of the case in the tests.
        title: What the page calls it.
        family: The tiny model it is run on.
        model: What it does to a MODEL; None: nothing.
        conds: What it does to the prompts; None: nothing.
        by_hand: The same done by hand to the weights of a model of one's own; None: the node itself
            is run on the model to compare with.
        steps: Of the sampler.
        rows: Of the latents.
        masked: True: the latents get a mask.
        by_row: Whether rows with a task each can be compared with the tasks alone.
        note: For the page.
    """

    name: str
    title: str
    family: str = "tiny_unet"
    model: Dress | None = None
    conds: DressConds | None = None
    by_hand: Dress | None = None
    steps: int = 2
    rows: int = 2
    masked: bool = False
    by_row: bool = True
    note: str = ""


def node(module: str, name: str, *args: Any, method: str = "execute", **kwargs: Any) -> Dress:
    """Returns what a node of `comfy_extras` does to a MODEL."""

    def dress(tiny: Any, model: Any) -> Any:
        cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        owner = cls if method == "execute" else cls()
        given = getattr(owner, method)(model, *args, **kwargs)
        return given[0] if isinstance(given, tuple) else given.args[0]

    return dress


def _lora_file(tiny: Any, model: Any, biases: bool = True) -> str:
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    name = f"beside_{biases}.safetensors"
    save_file(_lora(tiny, model, biases), folder / name)
    folder_paths.filename_list_cache.pop("loras", None)
    return name


def _lora(tiny: Any, model: Any, biases: bool = True) -> dict[str, Any]:
    file = lora_for(tiny, model)
    return {key: tensor for key, tensor in file.items() if biases or "diff_b" not in key}


def _stock_lora(tiny: Any, model: Any) -> Any:
    loader = tiny.nodes.LoraLoaderModelOnly()
    return loader.load_lora_model_only(model, _lora_file(tiny, model), 0.7)[0]


def _bypass_lora(tiny: Any, model: Any) -> Any:
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly

    file = _lora_file(tiny, model, biases=False)
    return LoraLoaderBypassModelOnly().load_lora_model_only(model, file, 0.7)[0]


def _hook_lora(tiny: Any, model: Any, positive: Any, negative: Any) -> tuple[Any, Any]:
    import comfy.hooks
    from comfy_extras.nodes_hooks import CreateHookLoraModelOnly

    (hooks,) = CreateHookLoraModelOnly().create_hook_model_only(_lora_file(tiny, model), 0.7)
    put = comfy.hooks.set_hooks_for_conditioning  # type: ignore[attr-defined]
    return put(positive, hooks), put(negative, hooks)


def _second(tiny: Any, model: Any) -> Any:
    other = tiny.load("tiny_sd3")
    for parameter in other.model.diffusion_model.parameters():
        parameter.data = 0.8 * parameter + 0.01
    return other


def _merge(kind: str, *amounts: float) -> Dress:
    def dress(tiny: Any, model: Any) -> Any:
        from comfy_extras import nodes_model_merging

        merge = getattr(nodes_model_merging, kind)().merge
        return merge(model, _second(tiny, model), *amounts)[0]

    return dress


def _weights(own: float, other: float) -> Dress:
    def by_hand(tiny: Any, model: Any) -> Any:
        pairs = zip(
            model.model.diffusion_model.parameters(),
            _second(tiny, model).model.diffusion_model.parameters(),
            strict=True,
        )
        for mine, theirs in pairs:
            mine.data = own * mine + other * theirs
        return model

    return by_hand


def _controlnet(tiny: Any, model: Any, positive: Any, negative: Any) -> tuple[Any, Any]:
    import comfy.controlnet
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    options = dict(image_size=32, in_channels=4, model_channels=320, hint_channels=3)
    options |= dict(num_res_blocks=[1], channel_mult=[1], transformer_depth=[1], num_heads=8)
    options |= dict(transformer_depth_middle=1, context_dim=768, use_spatial_transformer=True)
    operations = comfy.ops.disable_weight_init  # type: ignore[attr-defined]
    inner = ControlNet(**options, operations=operations, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in inner.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        tensor += float("norm" in name and name.endswith("weight"))
    cpu = torch.device("cpu")
    net = comfy.controlnet.ControlNet(inner, load_device=cpu)  # type: ignore[attr-defined]
    hint = torch.rand(1, 64, 64, 3, generator=generator)
    apply = tiny.nodes.ControlNetApplyAdvanced().apply_controlnet
    return apply(positive, negative, net, hint, 0.8, 0.0, 1.0)  # type: ignore[no-any-return]


def _more_tokens(tiny: Any, model: Any) -> Any:
    """As IP-Adapters do it: more tokens for the cross-attention, past the model's own layers."""
    clone = model.clone()
    generator = torch.Generator().manual_seed(4)
    extra = torch.randn(2, 1, 4, 768, generator=generator) * 3

    def patch(q: Any, k: Any, v: Any, options: Any) -> tuple[Any, Any, Any]:
        own = [
            torch.cat([t, e.expand(len(t), -1, -1)], 1) for t, e in zip((k, v), extra, strict=True)
        ]
        return q, *own

    clone.set_model_attn2_patch(patch)
    return clone


def _other_attention(tiny: Any, model: Any) -> Any:
    clone = model.clone()

    def replace(q: Any, k: Any, v: Any, options: Any) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        return 0.5 * optimized_attention(q, k, v, options["n_heads"]) + 0.5 * v

    clone.set_model_attn1_replace(replace, "middle", 0)
    return clone


def _function_wrapper(tiny: Any, model: Any) -> Any:
    clone = model.clone()
    clone.set_model_unet_function_wrapper(
        lambda call, given: 0.9 * call(given["input"], given["timestep"], **given["c"])
    )
    return clone


def _freeu(tiny: Any, model: Any) -> Any:
    # it looks for layers of 2 and 4 times the first one's channels; the tiny model has only that
    model.model.model_config.unet_config = {**model.model.model_config.unet_config}
    model.model.model_config.unet_config["model_channels"] = 160
    return node("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2)(tiny, model)


def _windows(tiny: Any, model: Any) -> Any:
    options = ("standard_static", 1, False, "pyramid", 3, False)
    return node("nodes_context_windows", "ContextWindowsManualNode", 4, 2, *options)(tiny, model)


def cache(name: str) -> Dress:
    """Returns what EasyCache's or LazyCache's node does, and lets it leave out all it may."""

    def dress(tiny: Any, model: Any) -> Any:
        cached = node("nodes_easycache", name, 3.0, 0.0, 1.0, False)(tiny, model)
        cached.model_options["transformer_options"]["easycache"].reuse_threshold = 1e9
        return cached

    return dress


_SHRINK = (1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")

#: In the order of the page.
NODES = (
    Beside(
        "lora",
        "LoRA (`LoraLoaderModelOnly`)",
        "tiny_sd3",
        _stock_lora,
        by_hand=lambda tiny, model: merged(model, _lora(tiny, model), 0.7),
    ),
    Beside(
        "bypass lora",
        "LoRA without patching weights (`LoraLoaderBypassModelOnly`)",
        "tiny_sd3",
        _bypass_lora,
        by_hand=lambda tiny, model: merged(model, _lora(tiny, model, False), 0.7),
    ),
    Beside(
        "hook lora",
        "LoRA as a hook (`CreateHookLoraModelOnly`)",
        "tiny_sd3",
        conds=_hook_lora,
        by_hand=lambda tiny, model: merged(model, _lora(tiny, model), 0.7),
    ),
    Beside("controlnet", "ControlNet (`ControlNetApplyAdvanced`)", conds=_controlnet),
    Beside(
        "attn2 patch",
        "IP-Adapters and what else adds tokens (`set_model_attn2_patch`)",
        model=_more_tokens,
        note="the task acts on the model's own layers, not on the adapter's",
    ),
    Beside(
        "attn1 replace",
        "other attention (`set_model_attn1_replace`)",
        model=_other_attention,
    ),
    Beside(
        "function wrapper",
        "what wraps the model's call (`set_model_unet_function_wrapper`)",
        model=_function_wrapper,
    ),
    Beside(
        "easycache",
        "`EasyCache`",
        "tiny_flux",
        cache("EasyCacheNode"),
        steps=6,
        by_row=False,  # how much is left out, the whole batch decides
        note="a task that changes between steps empties it; on SD3 ComfyUI itself has no EasyCache",
    ),
    Beside(
        "lazycache",
        "`LazyCache`",
        "tiny_sd3",
        cache("LazyCacheNode"),
        steps=6,
        by_row=False,
        note="a task that changes between steps empties it",
    ),
    Beside(
        "context windows",
        "context windows (`ContextWindowsManual`)",
        "tiny_sd3",
        _windows,
        rows=1,  # ComfyUI's windows over other dimensions than the batch know only one
        by_row=False,
        note="regions and control pictures are refused where a window would move them",
    ),
    Beside(
        "merge",
        "`ModelMergeSimple`",
        "tiny_sd3",
        _merge("ModelMergeSimple", 0.3),
        by_hand=_weights(0.3, 0.7),
        note="tasks on the first model stay; the second must have none (see below)",
    ),
    Beside(
        "add",
        "`ModelMergeAdd`",
        "tiny_sd3",
        _merge("ModelAdd"),
        by_hand=_weights(1.0, 1.0),
        note="as above",
    ),
    Beside(
        "sampling sd3",
        "`ModelSamplingSD3`",
        "tiny_sd3",
        node("nodes_model_advanced", "ModelSamplingSD3", 5.0, method="patch"),
    ),
    Beside(
        "rescale cfg",
        "`RescaleCFG`",
        model=node("nodes_model_advanced", "RescaleCFG", 0.7, method="patch"),
    ),
    Beside("cfg zero", "`CFGZeroStar`", "tiny_sd3", node("nodes_cfg", "CFGZeroStar")),
    Beside("apg", "`APG`", "tiny_sd3", node("nodes_apg", "APG", 0.5, 5.0, 0.3)),
    Beside(
        "skip layers",
        "`SkipLayerGuidanceSD3`",
        "tiny_sd3",
        node("nodes_sd3", "SkipLayerGuidanceSD3", "1", 3.0, 0.0, 1.0),
    ),
    Beside(
        "skip layers dit",
        "`SkipLayerGuidanceDiT`",
        "tiny_flux",
        node("nodes_slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "0", "0"),
    ),
    Beside(
        "perturbed attention",
        "`PerturbedAttentionGuidance`",
        model=node("nodes_pag", "PerturbedAttentionGuidance", 3.0),
    ),
    Beside("freeu", "`FreeU_V2`", model=_freeu),
    Beside(
        "deep shrink",
        "`PatchModelAddDownscale` (Kohya Deep Shrink)",
        model=node("nodes_model_downscale", "PatchModelAddDownscale", *_SHRINK),
    ),
    Beside(
        "differential diffusion",
        "`DifferentialDiffusion`",
        "tiny_sd3",
        node("nodes_differential_diffusion", "DifferentialDiffusion"),
        masked=True,
        steps=4,
    ),
)
