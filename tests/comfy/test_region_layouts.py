"""Where each layer of each architecture really sees the picture is where regions put it.

On the published configurations, without weights: every layer gives zeros, but the patch embedding,
which marks the tokens of one patch. What arrives at the layers behind it shows where those are.
"""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .test_control_embeddings import SHAPES, Hollow, built

TEXT = 5
#: Families that are called with latents of odd size too.
ODD = ("sd35_medium", "flux1_dev", "z_image", "wan21_t2v_1b", "sdxl")


class Seen(Hollow):
    """A hollow layer that tells what it gets; the embedding marks where its input is not zero."""

    def __init__(self, layer: Any, name: str, is_embedding: bool, notes: list[Any]) -> None:
        super().__init__(layer, False)
        self.name, self.marks, self.notes = name, is_embedding, notes

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, *args, **kwargs)
        self.notes.append((self.name, x, y, self.layer[0]))
        if not self.marks:
            return y
        (layer,) = self.layer
        if hasattr(layer, "in_features"):
            mark, axis = x.abs().amax(-1, keepdim=True), -1
        else:
            pool = nn.functional.max_pool2d if x.ndim == 4 else nn.functional.max_pool3d
            mark, axis = pool(x.abs().amax(1, keepdim=True), layer.stride, layer.stride), 1
        signs = torch.ones(y.shape[axis])
        signs[::2] = -1  # so that no norm takes it away
        return y + mark * signs.view(-1, *[1] * (x.ndim - 2 if axis == 1 else 0))


def seeing(name: str, part: Any, size: Any) -> tuple[Any, list[Any], Any]:
    """Returns (BaseModel with hollow layers, what they note down when it is called, its layout)."""
    model, _, embed = built(name, part)
    layout = part("nodes.native_layout").native_layout(model, size)
    notes: list[Any] = []
    for path, module in list(model.named_modules()):
        if part("diffscaler_core.targets").as_target(path, module) is not None:
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Seen(module, path, path == embed, notes))
    for path, module in model.named_modules():
        for key, value in list(module._parameters.items()):
            if value is not None and value.is_meta:
                is_norm = "norm" in path.lower() or "norm" in key
                module._parameters[key] = nn.Parameter(
                    torch.full(value.shape, float(is_norm and key != "bias")), False
                )
        for key, value in list(module._buffers.items()):
            if value is not None and value.is_meta:
                module._buffers[key] = torch.zeros(value.shape)
    return model, notes, layout


def call(model: Any, x: Tensor) -> None:
    inner, config = model.diffusion_model, model.model_config.unet_config
    width = 4096 if config.get("context_in_dim") is None else config["context_in_dim"]
    width = 1024 if "hydit" in str(config.get("image_model")) else config.get("cap_feat_dim", width)
    width = 3584 if "qwen" in str(config.get("image_model")) else width
    length = config.get("text_len", 77) if width == 1024 else TEXT
    rows = len(x)
    more = {
        "y": torch.zeros(rows, config.get("adm_in_channels") or 2048),
        "guidance": torch.ones(rows),
        "num_tokens": TEXT,
        "attention_mask": None,
        "text_embedding_mask": torch.ones(rows, length),
        "encoder_hidden_states_t5": torch.zeros(rows, 256, 2048),
        "text_embedding_mask_t5": torch.ones(rows, 256),
        "encoder_hidden_states_llama3": torch.zeros(rows, 32, TEXT, 4096),
        "transformer_options": {},
    }
    if getattr(inner, "num_classes", 1) is None:
        del more["y"]
    known = inspect.signature(inner.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        more = {name: value for name, value in more.items() if name in known}
    with torch.no_grad():
        inner(x, torch.full((rows,), 0.5), context=torch.zeros(rows, length, width), **more)


def marked(x: Tensor, is_map: bool) -> Tensor:
    """Returns where the mark has arrived in a layer's input, (rows, places), False without one."""
    size = x.abs().amax(1) if is_map else x.abs().amax(-1)
    size = size.reshape(len(size), -1)
    found = size > 0.5 * size.max()
    return found if 0 < size.max() and found.float().mean() < 0.5 else torch.zeros_like(found)


@pytest.mark.parametrize(("name", "odd"), [(n, False) for n in SHAPES] + [(n, True) for n in ODD])
def test_layers_see_the_picture_where_regions_put_it(name: str, odd: bool, part: Any) -> None:
    shape = list(SHAPES[name])
    if odd:
        shape[-2:] = [shape[-2] - 1, shape[-1] - 1]
    model, notes, layout = seeing(name, part, shape[2:])
    patch = layout.patch if layout.kind == "transformer" else 1
    x, mask = torch.zeros(*shape), torch.zeros(1, 1, *shape[-2:])
    for canvas in (x, mask):
        canvas[..., patch : 2 * patch, patch : 2 * patch] = 1
    call(model, x)
    regions = part("diffscaler_core.regions").Regions({0: mask}, layout, 1)
    geometry_of = part("diffscaler_core.targets").geometry_of
    row_layout = part("nodes.keymap").native_row_layout
    arrived = set()
    for layer, given, y, module in notes:
        geometry = geometry_of(module)
        gates = regions.gates(layer, y, geometry, row_layout(model, layer))
        assert 0 <= gates.min() <= gates.max() <= 1
        is_map = geometry is not None and y.ndim > 3
        if ".experts." in layer:  # tokens of many places and rows in one run: the mean
            assert len(gates) == 1
            continue
        places = marked(given, is_map)
        same = given.shape[2:] == y.shape[2:] if is_map else len(given) == len(y)
        if not places.any() or not same:
            continue
        arrived.add(layer)
        own = gates[:, 0] if is_map else gates[..., 0]
        own = own[:, 0] if y.ndim == 2 else own  # one vector a row
        full = own.expand(y.shape[0], *(y.shape[2:] if is_map else y.shape[1:-1]))
        assert torch.equal(full.reshape(len(places), -1) == 1, places), layer
    assert len(arrived) > (2 if layout.kind == "unet" else 0.1 * len(notes))
