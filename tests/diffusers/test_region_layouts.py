"""Where regions put each layer's tokens, compared with where the family's real model has them.

Nothing mixes tokens here: attention gives every token its own value, normalisation over places is
left out, and only the middle of a kernel counts. So one changed place of the latents changes its
own tokens in every layer of the model, and no others.
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

CALLS = runpy.run_path(str(Path(__file__).with_name("tiny_calls.py")))
BASES, Base, rand = CALLS["BASES"], CALLS["Base"], CALLS["rand"]
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
def _nothing_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", own_value)
    monkeypatch.setattr(SanaLinearAttnProcessor2_0, "__call__", own_linear_value)
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda _, x: x)


def unmixed(model: nn.Module) -> nn.Module:
    """The model with only the middle of each kernel, unless the kernel is a patch."""
    for module in model.modules():
        kernel = getattr(module, "kernel_size", ())
        if isinstance(module, nn.Conv2d) and module.padding == (1, 1):
            middle = torch.zeros(kernel)
            middle[1, 1] = 1
            module.weight.data *= middle
    return model


class Run:
    """What every call of every layer gave, when the model ran on some latents."""

    def __init__(self, base: Any, model: nn.Module, x: Tensor) -> None:
        self.outputs: dict[tuple[str, int], Tensor] = {}
        handles = [
            resolve(model, t.name).register_forward_hook(  # type: ignore[union-attr]
                lambda _, args, y, name=t.name: self.note(name, y)
            )
            for t in all_targets(model)
        ]
        base.run(model, x)
        for handle in handles:
            handle.remove()

    def note(self, name: str, y: Tensor) -> None:
        call = sum(known == name for known, _ in self.outputs)
        self.outputs[name, call] = y.clone()


def tells_no_rows(name: str) -> bool:
    """Says whether a layer's run of vectors does not show which row each is of.

    HiDream's experts get the tokens chosen for them, Z-Image's captions have lengths of their own.
    """
    return ".experts." in name or name == "cap_embedder.1"


def places(layout: TokenLayout) -> list[tuple[slice, slice]]:
    """The blocks of latents that no layer resolves further."""
    step = 2 if layout.kind == "unet" else layout.patch
    rows, columns = range(0, layout.height, step), range(0, layout.width, step)
    return [(slice(i, i + step), slice(j, j + step)) for i in rows for j in columns]


def check(base: Any, model: nn.Module, x: Tensor, layout: TokenLayout) -> dict[str, int]:
    """Compares gates with what changes, place by place; returns image tokens found per layer."""
    kind = type(model).__name__
    plain = Run(base, model, x).outputs
    geometry = {name: geometry_of(resolve(model, name)) for name, _ in plain}
    every = places(layout)
    pairs = list(zip(every, every[1:] + every[:1], strict=True))  # row 0's place, and row 1's
    moved: dict[tuple[str, int], list[Tensor]] = {key: [] for key in plain}
    for pair in pairs:
        changed = x.clone()
        for row, (i, j) in enumerate(pair):
            changed[row, ..., i, j] += 1
        for key, y in Run(base, model, changed).outputs.items():
            if not tells_no_rows(key[0]):
                channels = -1 if geometry[key[0]] is None else 1
                moved[key].append((y != plain[key]).any(channels))
    found: dict[str, int] = {}
    for (name, call), seen in moved.items():
        if tells_no_rows(name):
            continue
        y, ever = plain[name, call], torch.stack(seen).any(0)
        if layout.role(name) == "list":  # filled up with copies of the last token, to be replaced
            ever &= torch.arange(len(ever)) % layout.filled < layout.image_tokens
        found[name] = max(found.get(name, 0), int(ever.sum()))
        mean = 1 / len(every)
        for pair, now in zip(pairs, seen, strict=True):
            mask = torch.zeros(2, 1, layout.height, layout.width)
            for row, (i, j) in enumerate(pair):
                mask[row, 0, i, j] = 1
            gates = Regions({1: mask}, layout, 2).gates(
                name, y, geometry[name], row_layout(kind, name)
            )
            channels = -1 if geometry[name] is None else 1
            assert bool((gates.select(channels, 0) == 1).all())  # the task without a mask
            wanted = torch.where(ever, now.to(y.dtype), mean)
            own = gates.select(channels, 1)
            own = own.view(-1) if y.ndim == 2 else own
            assert torch.allclose(own.expand_as(wanted), wanted, atol=1e-7), (name, call)
            assert bool((own.expand_as(wanted)[ever] == now[ever]).all()), (name, call)
    return found


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_layer_of_every_family(tiny: Any, name: str) -> None:
    base = BASES[name]
    model, x = unmixed(tiny(name)), rand(*base.latents)
    layout = layout_of(model, base.latents[2:])
    found = check(base, model, x, layout)
    picture = {n for n, count in found.items() if count}
    assert embedding_of(model).name in picture
    if layout.kind == "transformer":  # a layer that sees the picture sees all of it
        assert {found[n] for n in picture} == {2 * layout.image_tokens}
        shapes = Run(base, model, x).outputs
        unseen = [n for n in found if n not in picture and shapes[n, 0].ndim > 2]
        assert {layout.role(n) for n in unseen} <= {"mean"}  # so that their size never decides


def test_one_mask_for_all_rows_is_a_mean_where_rows_cannot_be_told_apart(tiny: Any) -> None:
    for name in ("hidream", "z_image"):
        base = BASES[name]
        model, x = tiny(name), rand(*base.latents)
        layout = layout_of(model, base.latents[2:])
        mask = torch.zeros(2, 1, 8, 12)
        mask[..., :3] = 1
        told = {n: y for (n, _), y in Run(base, model, x).outputs.items() if tells_no_rows(n)}
        assert told
        for layer, y in told.items():
            assert Regions({0: mask[:1]}, layout, 1).gates(layer, y, None).tolist() == [[[0.25]]]
            with pytest.raises(DiffScalerError, match="do not tell rows apart"):
                Regions({0: mask}, layout, 1).gates(layer, y, None)


@pytest.mark.parametrize("name", AS_LONG_AS_TEXT)
def test_a_text_as_long_as_the_picture_is_still_text(tiny: Any, name: str) -> None:
    base, latents = BASES[name], AS_LONG_AS_TEXT[name]
    model = unmixed(tiny(name))
    layout = layout_of(model, latents[2:])
    found = check(base, model, rand(*latents), layout)
    shapes = Run(base, model, rand(*latents)).outputs
    alike = {n for (n, _), y in shapes.items() if y.ndim == 3 and not found.get(n, 1)}
    assert any(shapes[n, 0].shape[1] == layout.image_tokens for n in alike)


@pytest.mark.parametrize("name", [n for n in BASES if n in FAMILIES and FAMILIES[n].text])
def test_a_table_of_another_order_would_be_noticed(tiny: Any, name: str) -> None:
    base = BASES[name]
    model, x = unmixed(tiny(name)), rand(*base.latents)
    layout = layout_of(model, base.latents[2:])
    other = {"first": "last", "last": "first"}[layout.text]
    wrong = dataclasses.replace(layout, text=other)
    with pytest.raises(AssertionError):
        check(base, model, x, wrong)
