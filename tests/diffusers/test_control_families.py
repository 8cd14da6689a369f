"""Every family's patch embedding, by its own diffusers class: what it sees, and what control adds.

`embed_input` says how latents reach the embedding. Here the real model says it, by a hook.
"""

import runpy
from pathlib import Path
from typing import Any

import diffusers as d
import pytest
import torch
from torch import Tensor, nn

from diffscaler_core import attach, new_task
from diffscaler_core.control import Control
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.families import FAMILIES, token_form
from diffscaler_core.matching import embedding_at
from diffscaler_core.targets import resolve
from diffscaler_core.task import TaskAdapter, embedding_of
from diffscaler_core.tokens import OPEN_ENDED, embed_input

_CALLS = runpy.run_path(str(Path(__file__).with_name("tiny_calls.py")))
BASES, Base, rand = _CALLS["BASES"], _CALLS["Base"], _CALLS["rand"]


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]


def test_every_family_is_here(tiny: Any) -> None:
    names = {type(tiny(name)).__name__ for name in BASES}
    assert names == {name for family in FAMILIES.values() for name in family.classes}


def heard(base: Base, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the embedding got and gave while the model ran on x."""
    module = resolve(model, embedding_of(model).name)
    told: list[tuple[Tensor, Tensor]] = []
    assert module is not None
    handle = module.register_forward_hook(lambda m, a, y: told.append((a[0].clone(), y.clone())))
    base.run(model, x)
    handle.remove()
    assert len(told) == 1
    return told[0]


def embedding(model: nn.Module) -> Any:
    name = embedding_of(model).name
    return embedding_at(name, resolve(model, name), token_form(type(model).__name__))


def test_the_embedding_really_receives_what_embed_input_says(tiny: Any, base: Base) -> None:
    model, x = tiny(base.name), rand(*base.latents)
    got, _ = heard(base, model, x)
    said = embed_input(x, embedding(model))
    if isinstance(model, d.ZImageTransformer2DModel):  # rows one after the other, each filled up
        count = -(-said.shape[1] // 32) * 32
        assert got.shape == (2 * count, said.shape[2])
        assert torch.equal(got.view(2, count, -1)[:, : said.shape[1]], said)
    elif isinstance(model, d.HiDreamImageTransformer2DModel):  # not square: filled up with zeros
        assert torch.equal(got[:, : said.shape[1]], said)
        assert not got[:, said.shape[1] :].any()
    else:
        assert torch.equal(got, said)


def fresh(base: Base, model: nn.Module) -> TaskAdapter:
    # the tokens an expert gets do not say which row they are of
    leave = r".*\.experts\..*" if isinstance(model, d.HiDreamImageTransformer2DModel) else None
    facts = {"name": "edges", "control": "edges", "component": base.component}
    return new_task(model, rank=2, exclude=leave, **facts)


def trained(task: TaskAdapter, size: float = 0.1) -> TaskAdapter:
    generator = torch.Generator().manual_seed(7)

    def noise(t: Tensor) -> Tensor:
        return t + size * torch.randn(t.shape, generator=generator)

    layers = {n: {k: noise(t) for k, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers, extras={k: noise(t) for k, t in task.extras.items()})


def test_a_new_control_changes_no_bit_and_a_trained_one_does(tiny: Any, base: Base) -> None:
    model, x, z = tiny(base.name), rand(*base.latents), rand(*base.latents, seed=8)
    task = fresh(base, model)
    before = base.run(model, x)
    with attach(model, task) as a:
        a.set_controls({"edges": Control(z)})
        assert torch.equal(base.run(model, x), before)
    with attach(model, trained(task)) as a:
        assert torch.equal(base.run(model, x), before)  # a task without its control
        a.set_controls({"edges": Control(z)})
        one = base.run(model, x)
        assert (one - before).abs().max() > 1e-4
        a.set_controls({"edges": Control(z.flip(-1))})
        assert (base.run(model, x) - one).abs().max() > 1e-5  # the picture matters, not only that
        a.set_weights(0.0)
        assert torch.equal(base.run(model, x), before)
    assert torch.equal(base.run(model, x), before)


def test_each_row_has_its_own_control_or_none(tiny: Any, base: Base) -> None:
    model, x, z = tiny(base.name), rand(*base.latents), rand(*base.latents, seed=8)
    task = trained(fresh(base, model))
    before = base.run(model, x)
    with attach(model, task) as a:
        a.set_controls({"edges": Control(z)})
        both = base.run(model, x)
        a.set_controls({"edges": Control(z, rows=torch.tensor([1.0, 0.0]))})
        mixed = base.run(model, x)
        assert torch.equal(mixed[1], before[1])
        torch.testing.assert_close(mixed[0], both[0], atol=1e-5, rtol=1e-4)
        a.set_controls({"edges": Control(z[:1])})  # one picture for all rows
        shared = base.run(model, x)
        torch.testing.assert_close(shared[0], both[0], atol=1e-5, rtol=1e-4)
        a.set_controls({"edges": Control(z[:1].expand_as(z))})
        torch.testing.assert_close(base.run(model, x), shared, atol=1e-5, rtol=1e-4)


def test_what_is_added_is_the_embedding_seen_through_the_affiner(tiny: Any, base: Base) -> None:
    """In each model's own terms: run it on the control's latents, and use what its layer says."""
    model, x, z = tiny(base.name), rand(*base.latents), rand(*base.latents, seed=8)
    task = trained(fresh(base, model))
    bare = task.replace(layers={})
    _, y = heard(base, model, x)
    seen, y_z = heard(base, model, z)
    own = {name.rpartition(".")[2]: t for name, t in task.extras.items()}
    module: Any = resolve(model, embedding_of(model).name)
    shape = (1, -1, *(1,) * (y.ndim - 2)) if own["down"].ndim > 2 else (-1,)
    bias = 0 if module.bias is None else module.bias.view(shape)
    if own["down"].ndim > 2:
        convolve = {4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}[own["down"].ndim]
        hidden = convolve(seen, own["down"], None, module.stride, module.padding)
        subspace = torch.einsum("or,br...->bo...", own["up"], hidden)
    else:
        subspace = seen @ own["down"].T @ own["up"].T
    wanted = y + own["scale"].view(shape) * (y_z - bias) + own["shift"].view(shape) + subspace
    with attach(model, bare) as a:
        a.set_controls({"edges": Control(z)})
        _, got = heard(base, model, x)
    count = embed_input(z, embedding(model)).shape[1]
    if isinstance(model, d.ZImageTransformer2DModel):  # what fills up gets nothing
        got, wanted, y = (t.view(2, -1, t.shape[-1]) for t in (got, wanted, y))
    if got.ndim == 3:
        assert torch.equal(got[:, count:], y[:, count:])
        got, wanted = got[:, :count], wanted[:, :count]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_video_takes_one_picture_for_all_its_frames(tiny: Any) -> None:
    for name in ("cogvideox", "wan", "ltx_video", "hunyuan_video"):
        base = BASES[name]
        model, x, z = tiny(base.name), rand(*base.latents), rand(*base.latents, seed=8)[:, :, 0]
        task = trained(fresh(base, model))
        with attach(model, task) as a:
            a.set_controls({"edges": Control(z)})
            still = base.run(model, x)
            a.set_controls({"edges": Control(z.unsqueeze(2).expand(*base.latents))})
            torch.testing.assert_close(base.run(model, x), still, atol=1e-5, rtol=1e-4)
            a.set_controls({"edges": Control(z[:1])})
            torch.testing.assert_close(base.run(model, x)[0], still[0], atol=1e-5, rtol=1e-4)


#: Where a shorter control may be right as well, as far as the layer can tell.
LENGTH_SAYS_LITTLE = (*OPEN_ENDED, "list", "packed_frames")


def test_another_size_or_another_number_of_channels_is_one_clear_error(
    tiny: Any, base: Base
) -> None:
    model, x = tiny(base.name), rand(*base.latents)
    task = trained(fresh(base, model))
    shape = base.latents
    with attach(model, task) as a:
        for channels in (1, 3, shape[1] + 1, shape[1] * 4):
            a.set_controls({"edges": Control(rand(1, channels, *shape[2:]))})
            with pytest.raises(DiffScalerError, match=f"has {channels} channels"):
                base.run(model, x)
        form = embedding(model).form.kind
        for size in ((shape[-2] + 2, shape[-1]), (shape[-2] - 2, shape[-1])):
            if form in ("list", "filled") or (size[0] < shape[-2] and form in LENGTH_SAYS_LITTLE):
                continue
            a.set_controls({"edges": Control(rand(1, *shape[1:-2], *size))})
            with pytest.raises(DiffScalerError, match="encoded at the size that is drawn"):
                base.run(model, x)
        a.set_controls(None)
        base.run(model, x)


def test_sides_that_are_no_multiple_of_a_patch_are_filled_up(tiny: Any) -> None:
    base = BASES["sd3"]
    model = tiny(base.name)
    got = embed_input(rand(2, 4, 7, 9), embedding(model))
    assert got.shape == (2, 4, 8, 10)
    assert torch.equal(got[..., :7, :9], rand(2, 4, 7, 9))
    assert torch.equal(got[..., 7, :], got[..., 6, :])
