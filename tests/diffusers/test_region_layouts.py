"""Where regions put each layer's tokens, compared with where the family's real model has them.

See `token_places.py`: in a model that mixes no tokens, a changed place of the latents moves its own
tokens in every layer, and no others.
"""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.families import FAMILIES, row_layout
from diffscaler_core.regions import Regions, TokenLayout
from diffscaler_core.targets import all_targets, geometry_of, resolve
from diffscaler_core.task import embedding_of
from diffscaler_core.token_layout import layout_of
from diffscaler_core.tokens import pack

CALLS = runpy.run_path(str(Path(__file__).with_name("tiny_calls.py")))
BASES, rand = CALLS["BASES"], CALLS["rand"]
PLACES = runpy.run_path(str(Path(__file__).parents[1] / "token_places.py"))
#: Latents with as many image tokens as the family's layers for text alone have text tokens, so that
#: only a layer's name can tell.
AS_LONG_AS_TEXT = {
    "sd3": (2, 4, 2, 10),
    "flux": (2, 4, 2, 10),
    "flux2": (2, 16, 1, 5),
    "pixart": (2, 4, 2, 10),
    "sana": (2, 4, 1, 5),
    "lumina2": (2, 4, 2, 10),
    "qwen_image": (2, 4, 2, 10),
    "hunyuan_dit": (2, 4, 4, 10),
    "auraflow": (2, 4, 2, 26),
    "cogvideox": (2, 4, 1, 2, 14),
    "wan": (2, 4, 1, 2, 10),
    "ltx_video": (2, 6, 1, 1, 5),
    "hunyuan_video": (2, 4, 1, 2, 10),
    "chroma": (2, 4, 2, 10),
    "hidream": (2, 4, 2, 30),
}


def own_value(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attention that mixes nothing: a token's own query and value, no value of another length."""
    if value.shape[-2] != query.shape[-2]:
        return query.clone()
    return query + value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)


def own_linear_value(_: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same for Sana's linear attention, with all its layers called."""
    q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    return attn.to_out[1](attn.to_out[0](q + k + v))


@pytest.fixture(autouse=True)
def _attention_mixes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", own_value)
    monkeypatch.setattr(SanaLinearAttnProcessor2_0, "__call__", own_linear_value)


def tells_no_rows(name: str) -> bool:
    """Says whether a layer's run of vectors does not show which row each is of.

    HiDream's experts get the tokens chosen for them, Z-Image's captions have lengths of their own.
    """
    return ".experts." in name or name == "cap_embedder.1"


def watched(base: Any, model: nn.Module, x: Tensor) -> Any:
    PLACES["unmix"](model)
    layers = {t.name: resolve(model, t.name) for t in all_targets(model)}
    told = {name: layer for name, layer in layers.items() if not tells_no_rows(name)}
    return PLACES["Watched"](told, lambda change: base.run(model, change(x)))


def check(model: nn.Module, watched: Any, layout: TokenLayout) -> dict[str, int]:
    geometry = {name: geometry_of(layer) for name, layer in watched.layers.items()}
    kind = type(model).__name__
    found: dict[str, int] = PLACES["compare"](
        watched, layout, Regions, geometry, lambda name: row_layout(kind, name)
    )
    return found


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_layer_of_every_family(tiny: Any, name: str) -> None:
    base, model = BASES[name], tiny(name)
    layout = layout_of(model, base.latents[2:])
    known = watched(base, model, rand(*base.latents))
    found = check(model, known, layout)
    picture = {n for n, count in found.items() if count}
    assert embedding_of(model).name in picture
    if layout.kind == "transformer":  # a layer that sees the picture sees all of it
        assert {found[n] for n in picture} == {2 * layout.image_tokens}
        unseen = [n for (n, _), y in known.outputs().items() if not found[n] and y.ndim > 2]
        assert {layout.role(n) for n in unseen} <= {"mean"}  # so that their size never decides


@pytest.mark.parametrize("name", ["hidream", "z_image"])
def test_one_mask_is_a_mean_where_rows_cannot_be_told_apart(tiny: Any, name: str) -> None:
    base, model = BASES[name], tiny(name)
    x, layout = rand(*base.latents), layout_of(model, base.latents[2:])
    layers = {t.name: resolve(model, t.name) for t in all_targets(model) if tells_no_rows(t.name)}
    told = PLACES["Watched"](layers, lambda change: base.run(model, change(x))).outputs()
    mask = torch.zeros(2, 1, 8, 12)
    mask[..., :3] = 1
    assert told
    for (layer, _), y in told.items():
        assert Regions({0: mask[:1]}, layout, 1).gates(layer, y, None).tolist() == [[[0.25]]]
        with pytest.raises(DiffScalerError, match="do not tell rows apart"):
            Regions({0: mask}, layout, 1).gates(layer, y, None)


def test_reference_pictures_get_the_mean(tiny: Any) -> None:
    """As in Kontext: their tokens follow the picture's, and the text comes before both."""
    model, context = tiny("flux"), CALLS["CONTEXT"]

    def call(model: Any, x: Tensor) -> Tensor:
        tokens = torch.cat([pack(x), rand(2, 6, 16)], dim=1)
        return model(
            hidden_states=tokens,
            encoder_hidden_states=context,
            pooled_projections=CALLS["POOLED"],
            timestep=CALLS["STEP"],
            img_ids=torch.zeros(tokens.shape[1], 3),
            txt_ids=torch.zeros(context.shape[1], 3),
        ).sample

    known = watched(CALLS["Base"]("flux", call), model, rand(2, 4, 8, 12))
    found = check(model, known, layout_of(model, (8, 12), text_lengths=(context.shape[1],)))
    assert set(found.values()) == {0, 2 * 24}
    with pytest.raises(AssertionError):  # nobody told how long the text is
        check(model, known, layout_of(model, (8, 12)))


def test_texts_of_their_own_length(tiny: Any) -> None:
    """Lumina leaves hidden text tokens out, so each row's picture starts somewhere else."""
    model, mask = tiny("lumina2"), CALLS["ONES"].clone()
    mask[1, 3:] = 0
    call = CALLS["by_trainer"]("lumina2", context=CALLS["CONTEXT"], mask=mask)
    known = watched(CALLS["Base"]("lumina2", call), model, rand(2, 4, 8, 12))
    check(model, known, layout_of(model, (8, 12), text_lengths=(5, 3)))
    with pytest.raises(AssertionError):
        check(model, known, layout_of(model, (8, 12), text_lengths=(5, 5)))


def test_a_layout_for_another_size_is_one_clear_error(tiny: Any) -> None:
    model, mask = tiny("flux"), torch.ones(1, 1, 4, 4)
    regions = Regions({0: mask}, layout_of(model, (8, 8)), 1)
    for layer, tokens in (("x_embedder", 15), ("single_transformer_blocks.0.proj_mlp", 12)):
        message = rf"'{layer}' ran on {tokens} tokens a row, .* laid out for 1x4x4 image tokens"
        with pytest.raises(DiffScalerError, match=message):
            regions.gates(layer, torch.zeros(2, tokens, 32), None)


def test_an_unknown_model_s_layers_see_the_picture_if_they_have_its_tokens() -> None:
    model = nn.Linear(4, 4)
    layout = layout_of(model, (3, 4, 6))
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., :3] = 1
    regions = Regions({0: mask}, layout, 1)
    tokens = regions.gates("layer", torch.zeros(2, 72, 5), None)
    assert tokens[0, :, 0].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 12
    assert regions.gates("layer", torch.zeros(2, 80, 5), None).tolist() == [[[0.5]]]


@pytest.mark.parametrize("name", AS_LONG_AS_TEXT)
def test_a_text_as_long_as_the_picture_is_still_text(tiny: Any, name: str) -> None:
    base, latents, model = BASES[name], AS_LONG_AS_TEXT[name], tiny(name)
    layout = layout_of(model, latents[2:])
    known = watched(base, model, rand(*latents))
    found = check(model, known, layout)
    texts = [y for (n, _), y in known.outputs().items() if not found[n] and y.ndim == 3]
    assert layout.image_tokens in [y.shape[1] for y in texts]


@pytest.mark.parametrize("name", [n for n in BASES if n in FAMILIES and FAMILIES[n].text])
def test_a_table_of_another_order_would_be_noticed(tiny: Any, name: str) -> None:
    base, model = BASES[name], tiny(name)
    layout = layout_of(model, base.latents[2:])
    other = {"first": "last", "last": "first"}[layout.text]
    with pytest.raises(AssertionError):
        check(
            model,
            watched(base, model, rand(*base.latents)),
            dataclasses.replace(layout, text=other),
        )
