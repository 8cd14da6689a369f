"""Control: what is added, where, when; written a second time with the layer's own W."""

from __future__ import annotations

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    UnknownNameError,
    attach,
    new_task,
)
from diffscaler_core.control import Control

from .conftest import hooks_of
from .control_models import (
    MODELS,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
    X,
    Z,
    built,
    close,
    edges,
    plain,
    reference,
)


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def model(request) -> nn.Module:
    return built(request.param)


@pytest.fixture
def sd3() -> nn.Module:
    return built(SD3Transformer2DModel)


# What is added


@pytest.mark.parametrize("options", [
    {}, {"control_rank": 2}, {"control_activation": "relu"}, {"control_embedding": "copy"},
    {"control_activation": "relu", "control_rank": 5},
])  # fmt: skip
@torch.no_grad()
def test_a_control_is_the_formula(model, options):
    task = edges(model, **options)
    with attach(model, task) as a:
        a.set_controls({"edges": Control(Z)})
        close(model(X), reference(model, [(task, Z, 1.0)])(X))
        for weight in (0.5, -2.0):
            a.set_weights(weight)
            close(model(X), reference(model, [(task, Z, weight)])(X))


@torch.no_grad()
def test_the_gain_of_a_control_affiner_counts(model):
    task = edges(model)
    task = task.with_info(control={**task.info["control"], "gain": 0.25})
    with attach(model, task) as a:
        a.set_controls({"edges": Control(Z)})
        close(model(X), reference(model, [(task, Z, 1.0)])(X))


@torch.no_grad()
def test_two_controls_and_a_plain_task_add_up_whoever_attached_them(model):
    one, two, style = edges(model), edges(model, 1, "depth", control_rank=2), plain(model)
    other = Z.flip(0)
    wanted = reference(model, [(one, Z, 1.0), (two, other, 0.5)], [(style, -0.5)])(X)
    with attach(model, {"edges": one, "depth": two, "style": style}) as a:
        a.set_weights({"edges": 1.0, "depth": 0.5, "style": -0.5})
        a.set_controls({"edges": Control(Z), "depth": Control(other)})
        close(model(X), wanted)
    with attach(model, two, 0.5) as b, attach(model, style, -0.5), attach(model, one) as a:
        a.set_controls({"edges": Control(Z)})
        b.set_controls({"depth": Control(other)})
        close(model(X), wanted)
    assert hooks_of(model) == []


@torch.no_grad()
def test_strengths_per_part_reach_the_embedding_too(model):
    task = edges(model).replace(layers={})
    with attach(model, task) as a:
        a.set_weights({"edges": {"scale": 0.5, "shift": -1.0, "subspace": 2.0}})
        a.set_controls({"edges": Control(Z)})
        close(model(X), reference(model, [(task, Z, (0.5, -1.0, 2.0))])(X))


@torch.no_grad()
def test_a_mask_weighs_what_is_embedded(sd3):
    task = edges(sd3).replace(layers={})
    left = torch.zeros(1, 1, 64, 64)
    left[..., :32] = 1
    with attach(sd3, task) as a:
        a.set_controls({"edges": Control(Z)})
        everywhere = sd3(X).view(3, 4, 4, 4)
        a.set_controls({"edges": Control(Z, mask=torch.ones(1, 1, 3, 5))})
        close(sd3(X).view(3, 4, 4, 4), everywhere)
        a.set_controls({"edges": Control(Z, mask=left)})
        half = sd3(X).view(3, 4, 4, 4)
        close(half[:, :, :2], everywhere[:, :, :2])
    close(half[:, :, 2:], sd3(X).view(3, 4, 4, 4)[:, :, 2:])


# Where and when: gates


@torch.no_grad()
def test_a_new_control_task_changes_no_bit(model):
    component = "unet" if isinstance(model, UNet2DModel) else None
    before = model(X)
    for embedding in ("affiner", "copy"):
        task = new_task(model, control="edges", control_embedding=embedding, component=component)
        with attach(model, {"new": task}) as a:
            assert torch.equal(model(X), before)
            a.set_controls({"new": Control(Z)})
            assert torch.equal(model(X), before)


@torch.no_grad()
def test_without_a_control_or_at_strength_0_the_others_run_alone_bit_for_bit(model):
    tasks = {"edges": edges(model), "style": plain(model)}
    with attach(model, tasks["style"]):
        close(model(X), reference(model, [], [(tasks["style"], 1.0)])(X))
    with attach(model, tasks) as a:
        alone = at_strengths(a, model, {"style": 1.0})
        assert torch.equal(model(X), alone)
        a.set_controls({"edges": Control(Z)})
        assert not torch.equal(model(X), alone)
        a.set_weights({"style": 1.0})
        assert torch.equal(model(X), alone)
        a.set_weights({"style": 1.0, "edges": {"scale": 0.0, "shift": 0.0, "subspace": 0.0}})
        assert torch.equal(model(X), alone)
        a.set_weights(1.0)
        a.set_controls({"edges": Control(Z, rows=torch.zeros(3))})
        assert torch.equal(model(X), alone)
        a.set_controls({})
        assert torch.equal(model(X), alone)


@torch.no_grad()
def test_each_row_its_own_control_or_none_beside_other_tasks(model):
    tasks = {"edges": edges(model), "depth": edges(model, 1, "depth"), "style": plain(model)}
    with attach(model, tasks) as a:
        alone = at_strengths(a, model, {"style": 1.0})
        a.set_rows(["style"] * 3)
        in_rows = model(X)
        close(in_rows, alone)
        a.set_rows(None)
        a.set_controls({
            "edges": Control(Z, torch.tensor([1.0, 0.0, 0.0])),
            "depth": Control(Z, torch.tensor([1.0, 0.0, 1.0])),
        })  # fmt: skip
        got = model(X)
    one, two, style = tasks.values()
    close(got[1], in_rows[1])
    both = reference(model, [(one, Z, 1.0), (two, Z, 1.0)], [(style, 1.0)])(X)
    close(got[0], both[0])
    close(got[2], reference(model, [(two, Z, 1.0)], [(style, 1.0)])(X)[2])


@torch.no_grad()
def test_rows_of_strengths_and_rows_of_controls_multiply(model):
    tasks = {"edges": edges(model), "style": plain(model)}
    with attach(model, tasks) as a:
        base = at_strengths(a, model, 0.0)
        a.set_rows([{"edges": 0.5, "style": 1.0}, "style", "edges"])
        a.set_controls({"edges": Control(Z, torch.tensor([1.0, 1.0, 0.0]))})
        got = model(X)
    one, style = tasks.values()
    close(got[0], reference(model, [(one, Z, 0.5)], [(style, 1.0)])(X)[0])
    close(got[1], reference(model, [], [(style, 1.0)])(X)[1])
    assert torch.equal(got[2], base[2])


def at_strengths(a, model, weights):
    """What the model says at these strengths; then at 1 again."""
    a.set_weights(weights)
    said = model(X)
    a.set_weights(1.0)
    return said


@torch.no_grad()
def test_a_rows_factor_is_a_strength(model):
    task = edges(model)
    with attach(model, task) as a:
        a.set_controls({"edges": Control(Z, torch.tensor([0.5, 1.0, 0.0]))})
        got = model(X)
    close(got[0], reference(model, [(task, Z, 0.5)])(X)[0])
    close(got[1], reference(model, [(task, Z, 1.0)])(X)[1])
    assert torch.equal(got[2], model(X)[2])


@torch.no_grad()
def test_one_picture_serves_all_rows_also_with_strengths_per_row(model):
    task = edges(model)
    shared = reference(model, [(task, Z[:1].expand_as(Z), 1.0)])(X)
    with attach(model, task) as a:
        a.set_controls({"edges": Control(Z[:1])})
        close(model(X), shared)
        a.set_controls({"edges": Control(Z[:1], torch.tensor([1.0, 0.0, 1.0]))})
        got = model(X)
        close(got[[0, 2]], shared[[0, 2]])
        a.set_controls({"edges": Control(Z[:1])})
        a.set_rows(["edges", None, {"edges": 2.0}])
        got = model(X)
        close(got[0], shared[0])
        close(got[2], reference(model, [(task, Z[:1].expand_as(Z), 2.0)])(X)[2])
    assert torch.equal(got[1], model(X)[1])


@torch.no_grad()
def test_rows_that_do_not_fit_are_refused_and_nothing_changes(sd3):
    with attach(sd3, edges(sd3)) as a:
        a.set_controls({"edges": Control(Z)})
        kept = sd3(X)
        a.set_rows(["edges"] * 3)
        with pytest.raises(DiffScalerError, match="for 2 rows, but 3 rows are set"):
            a.set_controls({"edges": Control(Z[:2], torch.tensor([1.0, 0.0]))})
        close(sd3(X), kept)
        a.set_rows(None)
        assert torch.equal(sd3(X), kept)
        a.set_controls({"edges": Control(Z[:2])})
        with pytest.raises(DiffScalerError, match="one control picture for all rows or one per"):
            sd3(X)
        with pytest.raises(UnknownNameError, match="'depth'"):
            a.set_controls({"depth": Control(Z)})
    with attach(sd3, {"edges": edges(sd3), "style": plain(sd3)}) as a:
        with pytest.raises(DiffScalerError, match="takes no control picture; control tasks here"):
            a.set_controls({"style": Control(Z)})


@pytest.mark.parametrize(
    ("rows", "mask", "message"),
    [
        (torch.ones(2), None, r"3 control pictures, but factors for \(2,\) rows"),
        (torch.ones(3, 1), None, "factors for"),
        (None, torch.ones(8, 8), r"mask is \(1 or 3, 1, H, W\)"),
        (None, torch.ones(2, 1, 8, 8), "mask is"),
        (None, torch.ones(3, 4, 8, 8), "mask is"),
    ],
)
def test_a_control_that_cannot_be_meant_is_refused(rows, mask, message):
    with pytest.raises(DiffScalerError, match=message):
        Control(Z, rows, mask)


# The host stays as it is


@torch.no_grad()
def test_the_base_comes_back_also_after_an_exception_in_any_order(model):
    before, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    first, second = attach(model, edges(model)), attach(model, edges(model, 1, "depth"))
    first.set_controls({"edges": Control(Z)})
    second.set_controls({"depth": Control(Z)})
    assert list(model.state_dict()) == list(state)
    first.remove()
    close(model(X), reference(model, [(edges(model, 1, "depth"), Z, 1.0)])(X))
    second.remove()
    second.remove()
    assert torch.equal(model(X), before)
    with contextlib.suppress(KeyboardInterrupt), attach(model, edges(model)) as a:
        a.set_controls({"edges": Control(Z)})
        model(X)
        raise KeyboardInterrupt
    assert torch.equal(model(X), before)
    assert hooks_of(model) == []
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_a_task_of_another_base_leaves_the_model_untouched(sd3):
    for other in (SD3Transformer2DModel(16), FluxTransformer2DModel()):
        with pytest.raises(MismatchError, match="does not fit this SD3Transformer2DModel"):
            attach(sd3, edges(other).replace(layers={}))
        assert hooks_of(sd3) == []
    wide = edges(sd3)
    name = "control.transformer.pos_embed.proj.scale"
    with pytest.raises(MismatchError, match=r"1 misfit, first .pos_embed\.proj is 8x4x2x2"):
        attach(sd3, wide.replace(extras={**wide.extras, name: torch.zeros(9)}))


def test_a_model_without_a_known_embedding_takes_no_control(sd3):
    class Unheard(SD3Transformer2DModel):
        pass

    with pytest.raises(UnknownNameError, match="Unheard"):
        new_task(Unheard(), control="edges")
    del sd3.pos_embed.proj
    with pytest.raises(DiffScalerError, match=r"has no layer 'pos_embed.proj' to embed a control"):
        new_task(sd3, control="edges")


@torch.no_grad()
def test_an_attached_model_can_be_copied_and_pickled(sd3):
    with attach(sd3, edges(sd3)) as a:
        a.set_controls({"edges": Control(Z)})
        wanted = sd3(X)
        copied = copy.deepcopy(sd3)
        assert torch.equal(copied(X), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(sd3))(X), wanted)
    assert torch.equal(copied(X), wanted)
    assert not torch.equal(sd3(X), wanted)


class Counted:
    """Counts the calls of a layer's forward."""

    def __init__(self, layer) -> None:
        self.count, plain = 0, layer.forward

        def forward(x):
            self.count += 1
            return plain(x)

        layer.forward = forward


@torch.no_grad()
def test_the_picture_is_embedded_once_for_all_steps(model):
    with attach(model, edges(model)) as a:
        a.set_controls({"edges": Control(Z)})
        counted = Counted(model.get_submodule(MODELS[type(model)][0]))
        for _ in range(5):
            model(X)
        assert counted.count == 6
        a.set_weights(0.5)  # another strength is another sum
        model(X)
        model(X)
        assert counted.count == 9
        a.set_controls({"edges": Control(Z)})
        model(X)
        assert counted.count == 11


@torch.no_grad()
def test_the_sum_keeps_the_models_dtype(model):
    task, low = edges(model), model.to(torch.bfloat16)
    with attach(low, task) as a:
        a.set_controls({"edges": Control(Z)})
        got = low(X.bfloat16())
        assert got.dtype == torch.bfloat16
    wanted = reference(copy.deepcopy(low).float(), [(task, Z, 1.0)])(X)
    assert (got.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


@torch.no_grad()
def test_the_attachments_memory_counts_the_control(sd3):
    a = attach(sd3, edges(sd3))
    stack = a.controls[0]
    parameters = stack.nbytes
    assert parameters == 4 * sum(t.numel() for t in edges(sd3).extras.values())
    a.set_controls({"edges": Control(Z)})
    sd3(X)
    assert stack.nbytes == parameters + 4 * 3 * 8 * 16
    a.remove()


def test_control_reads_no_bias_and_no_weight_while_it_runs(sd3):
    """A bias on another device, or a quantised weight, would otherwise stop it."""
    layer, frozen = sd3.pos_embed.proj, copy.deepcopy(sd3.pos_embed.proj)
    with torch.no_grad(), attach(sd3, edges(sd3)) as a:
        a.set_controls({"edges": Control(Z)})
        wanted = sd3(X)
        hidden = SimpleNamespace(weight=layer.weight, bias=layer.bias)
        del layer.weight, layer.bias
        layer.forward = lambda x: frozen(x)
        a.set_controls({"edges": Control(Z)})
        assert torch.equal(sd3(X), wanted)
        layer.weight, layer.bias = hidden.weight, hidden.bias
