"""The places of tokens in ComfyUI's models: the same roles as in diffusers, and in models that run.

See `token_places.py`: in a model that mixes no tokens, a changed place of the latents moves its own
tokens in every layer, and no others.
"""

import functools
import importlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__)
CASES = runpy.run_path(str(HERE.with_name("parity_cases.py")))["CASES"]
PLACES = runpy.run_path(str(HERE.parents[1] / "token_places.py"))
#: Families of the same architecture in both hosts whose class only ComfyUI's table knows.
ONLY_NATIVE = ("wan21_vace_1b", "krea2", "ltx2")
FULL_SIZE = runpy.run_path(str(HERE.with_name("full_size.py")))["FULL_SIZE"]
build = runpy.run_path(str(HERE.with_name("test_keymap_full_size.py")))["build"]


@pytest.mark.parametrize("name", [n for n in FULL_SIZE if n not in ONLY_NATIVE])
def test_a_layer_of_the_blocks_has_the_same_role_in_both_hosts(name: str, part: Any) -> None:
    theirs, model = build(name)
    size = (3, 8, 12)
    ours = part("nodes.native_layout").native_layout(model, size)
    layout = part("diffscaler_core.token_layout").layout_of(theirs, size)
    assert (ours.frames, ours.grid, ours.kind) == (layout.frames, layout.grid, layout.kind)
    places = part("nodes.keymap").placements(model)
    checked = set()
    for target in part("diffscaler_core.targets").find_targets(theirs, "blocks"):
        if "norm" in target.name or "adaLN" in target.name:  # a vector a row, whatever the role
            continue
        assert ours.role(places[target.name].module) == layout.role(target.name), target.name
        checked.add(layout.role(target.name))
    assert "joint" in checked or not layout.text


def own_value(
    _: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **how: Any
) -> Tensor:
    """Attention that mixes nothing: a token's own query and value, no value of another length."""
    own = q.clone() if q.shape[-2] != v.shape[-2] else q + v
    if not how.get("skip_reshape") or how.get("skip_output_reshape"):
        return own
    return own.transpose(1, 2).flatten(2)


class Called:
    """ComfyUI's model, called with changed latents, and with attention that mixes nothing."""

    def __init__(self, model: Any, change: Callable[[Tensor], Tensor]) -> None:
        self._model, self._change = model, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = {"optimized_attention_override": own_value}
        self.size = tuple(x.shape[2:])
        return self._model(self._change(x), *args, transformer_options=options, **kwargs)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, part: Any) -> tuple[Any, Any]:
    """(ComfyUI's BaseModel with random weights, how to call it with changed latents)."""
    import comfy.sd
    import diffusers

    kind, config, native, native_config, run = CASES[request.param]
    torch.manual_seed(0)
    theirs = getattr(diffusers, kind)(**config).eval()
    if native is None:
        state = {name: torch.randn_like(value) * 0.1 for name, value in theirs.state_dict().items()}
        options = {"dtype": torch.float32}
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options).model
    else:
        import comfy.supported_models

        host = getattr(comfy.supported_models, native)(dict(native_config))
        host.set_inference_dtype(torch.float32, None)
        model = host.get_model({}, "", device="cpu")
        for value in model.parameters():
            value.data = torch.randn_like(value) * 0.1

    @torch.no_grad()
    def call(change: Callable[[Tensor], Tensor]) -> tuple[int, ...]:
        called = Called(model.diffusion_model, change)
        run(theirs, called)
        return called.size

    return model.requires_grad_(False), call


def test_tokens_are_where_the_running_model_has_them(
    case: tuple[Any, Any], part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pixart.blocks", "hydit.attn_layers"):  # whose attention asks nobody
        mixing = importlib.import_module(f"comfy.ldm.{module}")
        monkeypatch.setattr(mixing, "optimized_attention", functools.partial(own_value, None))
    model, call = case
    keymap, targets = part("nodes.keymap"), part("diffscaler_core.targets")
    PLACES["unmix"](model)
    inner = model.diffusion_model
    names = [t.name for t in targets.all_targets(inner)]
    # the pooler runs tokens first, then rows, so it takes one mask for all rows only
    layers = {n: targets.resolve(inner, n) for n in names if not n.startswith("pooler.")}
    watched = PLACES["Watched"](layers, call)
    layout = part("nodes.native_layout").native_layout(model, call(lambda x: x))
    found = PLACES["compare"](
        watched,
        layout,
        part("diffscaler_core.regions").Regions,
        {name: targets.geometry_of(layer) for name, layer in layers.items()},
        lambda name: keymap.native_row_layout(model, name),
    )
    if layout.kind == "transformer":  # a layer that sees the picture sees all of it
        assert {count for count in found.values() if count} == {2 * layout.image_tokens}
    assert sum(map(bool, found.values())) > len(found) / 4
