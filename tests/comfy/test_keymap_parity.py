"""One task on the same weights in both hosts: diffusers with `attach`, ComfyUI with the key map.

The weights reach ComfyUI's model by ComfyUI's own conversion where it has one; elsewhere by the map
itself, so that then even the bare models agree only if the map is right.
"""

import dataclasses
import logging
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor]
CASES = runpy.run_path(str(Path(__file__).with_name("parity_cases.py")))["CASES"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, part: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (diffusers model, ComfyUI BaseModel, how to call both) with the same weights."""
    import diffusers

    kind, config, native, native_config, run = CASES[request.param]
    torch.manual_seed(0)
    theirs = getattr(diffusers, kind)(**config).eval()
    for name, value in theirs.named_parameters():
        centre = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
        value.data = torch.randn_like(value) * 0.05 + centre
    logging.disable(logging.WARNING)
    if native is None:
        import comfy.sd

        state = {name: value.clone() for name, value in theirs.state_dict().items()}
        options = {"dtype": torch.float32}
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options).model
    else:
        model = filled(part("nodes.keymap"), theirs, native, native_config)
    logging.disable(logging.NOTSET)
    with torch.no_grad():
        yield theirs, model, lambda: run(theirs, model.diffusion_model)


def filled(keymap: ModuleType, theirs: Any, native: str, config: dict[str, Any]) -> Any:
    """Returns ComfyUI's model with the weights of diffusers' one, moved by the key map.

    What the map does not know (norms, tables) is set to one and the same in both.
    """
    import comfy.supported_models

    host = getattr(comfy.supported_models, native)(dict(config))
    host.set_inference_dtype(torch.float32, None)
    model = host.get_model({}, "", device="cpu")
    places = keymap.placements(model)
    for one in (theirs, model.diffusion_model):
        for name, value in one.named_parameters():
            value.requires_grad_(False)
            if one is not theirs or name.rpartition(".")[0] not in places:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, place in places.items():
        source, target = theirs.get_submodule(name), model.get_submodule(place.module)
        for kind in ("weight", "bias"):
            values = getattr(source, kind)
            if values is not None:
                values = torch.cat(values.chunk(2)[::-1]) if place.swapped else values
                getattr(target, kind)[place.start :][: len(values)] = values
    return model


def random_task(part: Any, theirs: Any) -> Any:
    """Returns a task on every layer that is called, with nothing left at its start value."""
    # HunyuanDiT's pooler in diffusers uses its layers' weights without calling them.
    task = part("diffscaler_core").new_task(
        theirs, rank=3, targets="all", exclude=r".*\.pooler\..*"
    )
    generator = torch.Generator().manual_seed(3)
    layers = {
        layer: {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in own.items()}
        for layer, own in task.layers.items()
    }
    return task.replace(layers=layers)


def adapted(
    part: Any,
    task: Any,
    layers: Any,
    model: Any,
    run: Callable[[], Outputs],
    weights: Tensor | None = None,
) -> Tensor:
    """Returns what ComfyUI's model says with native affiners behind plain forward hooks."""
    modules = {name: model.get_submodule(name) for name in layers}
    build = part("diffscaler_core.matching").build_stacks
    stacks = build({"task": task}, {"task": layers}, modules)
    for name, stack in stacks.items():
        stack.row_layout = part("nodes.keymap").native_row_layout(model, name)
        if weights is not None:
            stack.set_weights(weights)
    handles = [
        modules[name].register_forward_hook(lambda _, args, y, stack=stack: stack(args[0], y))
        for name, stack in stacks.items()
    ]
    try:
        return run()[1]
    finally:
        for handle in handles:
            handle.remove()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_a_task_does_the_same_in_both_hosts(
    case: tuple[Any, Any, Any], part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, model, run = case
    keymap = part("nodes.keymap")
    base, base_native = run()
    assert error(base_native, base) < 1e-5
    task = random_task(part, theirs)
    with part("diffscaler_core").attach(theirs, task):
        wanted = run()[0]
    assert error(wanted, base) > 1e-2  # the effect is far above the tolerance
    layers = keymap.native_layers(task, model)
    assert error(adapted(part, task, layers, model, run), wanted) < 1e-5

    places = keymap.placements(model)
    straight = {n: dataclasses.replace(p, swapped=False) for n, p in places.items()}
    if straight != places:  # swapped halves matter: without them the outputs part
        monkeypatch.setattr(keymap, "placements", lambda _: straight)
        layers = keymap.native_layers(task, model)
        assert error(adapted(part, task, layers, model, run), wanted) > 1e-3


def test_rows_run_their_own_task(case: tuple[Any, Any, Any], part: Any) -> None:
    theirs, model, run = case
    task = random_task(part, theirs)
    layers = part("nodes.keymap").native_layers(task, model)
    whole, base = adapted(part, task, layers, model, run), run()[1]
    rows = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 1, 3)  # (B, K, 3): the second is base
    mixed = adapted(part, task, layers, model, run, rows)
    assert error(mixed[:1], whole[:1]) < 1e-5
    assert error(mixed[1:], base[1:]) < 1e-5


def test_there_and_back_changes_nothing(case: tuple[Any, Any, Any], part: Any) -> None:
    theirs, model, _ = case
    keymap = part("nodes.keymap")
    task = random_task(part, theirs)
    layers = keymap.native_layers(task, model)
    back = keymap.diffusers_layers(layers, model)
    assert back.keys() == task.component_layers(keymap.component_of(model)).keys()
    for name, own in task.component_layers(keymap.component_of(model)).items():
        assert own.keys() == back[name].keys()
        assert all(torch.equal(own[n], back[name][n]) for n in own), name


def test_a_task_trained_on_native_layers_does_the_same_in_diffusers(
    case: tuple[Any, Any, Any], part: Any
) -> None:
    theirs, model, run = case
    keymap, core = part("nodes.keymap"), part("diffscaler_core")
    pooler = r"pooler\..*"
    native = core.new_task(model.diffusion_model, rank=3, targets="all", exclude=pooler)
    generator = torch.Generator().manual_seed(4)
    layers = {
        "diffusion_model." + layer: {
            n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in own.items()
        }
        for layer, own in native.component_layers(native.components[0]).items()
    }
    wanted = adapted(part, native, layers, model, run)
    component = keymap.component_of(model)
    named = keymap.diffusers_layers(layers, model)
    task = native.replace(layers={f"{component}.{n}": own for n, own in named.items()})
    assert task.layers.keys() == random_task(part, theirs).layers.keys()
    with core.attach(theirs, task, component=component):
        assert error(run()[0], wanted) < 1e-5
