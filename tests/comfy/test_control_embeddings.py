"""What the patch embedding of each architecture really receives is what a control is made into.

On the published configurations: the layers before the embedding are replaced by zeros of the right
shape, so that no weight is needed; how the model cuts latents into patches is its own code.
"""

import inspect
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FULL_SIZE = runpy.run_path(str(Path(__file__).with_name("full_size.py")))["FULL_SIZE"]

#: Family -> the latents' shape; odd sizes are filled up to whole patches.
VIDEO = (2, 16, 3, 8, 6)
SHAPES = {
    "sd35_medium": (2, 16, 8, 6),
    "flux1_dev": (2, 16, 8, 6),
    "flux2_dev": (2, 128, 4, 3),
    "chroma": (2, 16, 8, 6),
    "pixart_sigma": (2, 4, 40, 36),  # it divides by the size in units of 32
    "hunyuan_dit_12": (2, 4, 8, 6),
    "auraflow_03": (2, 4, 8, 6),
    "lumina2": (2, 16, 8, 6),
    "z_image": (2, 16, 8, 6),
    "qwen_image": (2, 16, 1, 8, 6),
    "wan21_t2v_1b": VIDEO,
    "wan22_ti2v_5b": (2, 48, 3, 8, 6),
    "ltx_video": (2, 128, 3, 4, 3),
    "hunyuan_video": VIDEO,
    "hidream": (2, 16, 8, 6),
    "cogvideox_2b": VIDEO,
    "sd15": (2, 4, 8, 6),
    "sdxl": (2, 4, 8, 6),
}


class Reached(Exception):
    """The embedding was called; its input."""


class Hollow(nn.Module):
    """A layer that gives zeros of its output's shape."""

    def __init__(self, layer: Any, is_embedding: bool) -> None:
        super().__init__()
        self.layer = [layer]  # not a child: its weights do not exist
        self.is_embedding = is_embedding
        self.weight = torch.zeros(1)
        self.bias = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_embedding:
            raise Reached(x)
        (layer,) = self.layer
        if hasattr(layer, "in_features"):
            return torch.zeros(*x.shape[:-1], layer.out_features)
        side = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
        size = [(n + 2 * p - k) // s + 1 for n, k, s, p in side]
        return torch.zeros(x.shape[0], layer.out_channels, *size)


def built(name: str, part: Any) -> tuple[Any, Any, str]:
    """Returns (BaseModel without weights, a fresh control task, the embedding's name)."""
    import comfy.model_detection as detection
    import diffusers

    kind, config, native = FULL_SIZE[name]
    logging.disable(logging.WARNING)
    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**config)
    if native is None:
        native = detection.unet_config_from_diffusers_unet(theirs.state_dict(), torch.float32)
    host = detection.model_config_from_unet_config(dict(native), theirs.state_dict())
    host.set_inference_dtype(torch.float32, None)
    model = host.get_model({}, "", device="meta")
    logging.disable(logging.NOTSET)
    keymap = part("nodes.keymap")
    task = part("diffscaler_core").new_task(theirs, rank=1, targets="blocks", control="edges")
    (embed,) = keymap.native_controls(task, model)
    return model, task, embed


def hollowed(name: str, part: Any) -> tuple[Any, Any]:
    """Returns (BaseModel with hollow layers, the `Embedding` of its patch embedding)."""
    model, _, embed = built(name, part)
    keymap = part("nodes.keymap")
    layer = model.get_submodule(embed)
    form = keymap.native_token_form(model)
    embedding = part("diffscaler_core.matching").embedding_at(embed, layer, form)
    for path, module in list(model.named_modules()):
        if part("diffscaler_core.targets").as_target(path, module) is not None:
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Hollow(module, path == embed))
    for module in model.modules():
        for key, value in list(module._parameters.items()):
            if value is not None and value.is_meta:
                module._parameters[key] = nn.Parameter(torch.zeros(value.shape), False)
        for key, value in list(module._buffers.items()):
            if value is not None and value.is_meta:
                module._buffers[key] = torch.zeros(value.shape)
    return model, embedding


def received(model: Any, x: Tensor) -> Tensor:
    """Returns what the embedding is called with when the model is called with x."""
    inner, config = model.diffusion_model, model.model_config.unet_config
    width = 4096 if config.get("context_in_dim") is None else config["context_in_dim"]
    width = 1024 if "hydit" in str(config.get("image_model")) else config.get("cap_feat_dim", width)
    length = config.get("text_len", 77) if width == 1024 else 5
    context, t = torch.zeros(2, length, width), torch.tensor([0.3, 0.7])
    more = {
        "y": torch.zeros(2, config.get("adm_in_channels") or 2048),
        "guidance": torch.ones(2),
        "num_tokens": 5,
        "attention_mask": None,
        "text_embedding_mask": torch.ones(2, length),
        "encoder_hidden_states_t5": torch.zeros(2, 256, 2048),
        "text_embedding_mask_t5": torch.ones(2, 256),
        "encoder_hidden_states_llama3": torch.zeros(2, 32, 5, 4096),
        "transformer_options": {},
    }
    if getattr(inner, "num_classes", 1) is None:
        del more["y"]
    known = inspect.signature(inner.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        more = {name: value for name, value in more.items() if name in known}
    with pytest.raises(Reached) as reached, torch.no_grad():
        inner(x, t, context=context, **more)
    return reached.value.args[0]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_embedding_receives_what_a_control_becomes(name: str, odd: bool, part: Any) -> None:
    model, embedding = hollowed(name, part)
    shape = list(SHAPES[name])
    if odd:
        shape[-2:] = [shape[-2] - 1, shape[-1] - 1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    given = part("diffscaler_core.tokens").embed_input(x, embedding)
    wanted = received(model, x)
    assert given.shape == wanted.shape
    if not odd:  # how a host fills up is its own choice
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("name", [n for n, row in FULL_SIZE.items() if n not in SHAPES])
def test_other_configurations_of_the_table_say_why_or_have_the_same_embedding(
    name: str, part: Any
) -> None:
    """Bases that embed more than what they draw, or that no family of ours has, are refused."""
    errors = part("diffscaler_core.errors")
    try:
        model, task, embed = built(name, part)
    except errors.UnknownNameError:
        assert name in ("ltx2", "krea2", "wan21_vace_1b")
        return
    controls = {embed: {}}
    if name in ("flux1_fill", "wan21_i2v_14b", "cogvideox15_5b"):
        with pytest.raises(errors.MismatchError, match="embeds only what it draws"):
            part("nodes.control_checks").check_embedding(task, model, controls)
    else:
        part("nodes.control_checks").check_embedding(task, model, controls)
