from __future__ import annotations

import copy
import itertools
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    TaskAdapter,
    UnknownNameError,
    attach,
    new_task,
)
from diffscaler_core.matching import build_stacks
from diffscaler_core.stack import AffinerStack

from .conftest import Denoiser, filled, hooks_of, reference_task
from .test_targets import tiny


def close(a, b, tolerance=1e-6):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_attachments_come_off_in_any_order(model, x, make, order):
    before = model(x)
    tasks = [make(i) for i in range(3)]
    attachments = [attach(model, task) for task in tasks]
    left = dict(enumerate(tasks))
    for i in order:
        attachments[i].remove()
        attachments[i].remove()  # as often as you like
        del left[i]
        assert close(model(x), reference_task(model, list(left.values()), [1.0] * len(left))(x))
    assert torch.equal(model(x), before)
    assert hooks_of(model) == []


def test_the_models_own_hooks_and_state_stay(model, x, make):
    calls = []
    model.proj_out.register_forward_hook(lambda *_: calls.append(1))
    before = state(model)
    modules = list(model.named_modules())
    with attach(model, make(0, targets="all")):
        assert state(model).keys() == before.keys()
        assert [name for name, _ in model.named_parameters()] == list(before)
        model(x)
    assert hooks_of(model) == ["proj_out"]
    assert list(model.named_modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert calls == [1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_forward_leaves_the_base(model, x, make, error):
    before = model(x)

    def fail(*_):
        raise error

    handle = model.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error), attach(model, make(0)):
        model(x)
    handle.remove()
    assert torch.equal(model(x), before)
    assert hooks_of(model) == []


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_attach_that_breaks_off_halfway_leaves_nothing(model, x, make, error, monkeypatch):
    module = sys.modules[attach.__module__]  # the function hides the module of its name
    before, real, calls = model(x), module.hang, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return real(*arguments)

    other = attach(model, make(1))
    with_other = model(x)
    monkeypatch.setattr(module, "hang", interrupted)
    with pytest.raises(error):
        attach(model, make(0))
    assert torch.equal(model(x), with_other)
    other.remove()
    assert torch.equal(model(x), before)
    assert hooks_of(model) == []


def test_bad_weights_at_attach_leave_nothing(model, make):
    with pytest.raises(UnknownNameError):
        attach(model, make(0), {"nobody": 1.0})
    assert hooks_of(model) == []


def test_a_task_that_fits_all_but_one_layer_is_refused_whole(model, x, make):
    before, task = model(x), make(0)
    layers = dict(task.layers)
    layers["transformer.transformer_blocks.9.ff.0"] = layers.popitem()[1]
    with pytest.raises(MismatchError, match=r"with 8 layers.*1 layers missing"):
        attach(model, {"good": make(1), "bad": task.replace(layers=layers)})
    assert hooks_of(model) == []
    assert torch.equal(model(x), before)


def test_attachments_add_up_in_parallel_and_in_any_order(model, x, make):
    tasks = {t.name: t for t in (make(0), make(1, method="lora"), make(2, method="bitfit"))}
    wanted = reference_task(model, list(tasks.values()), [0.5, 1.0, -2.0])(x)
    weights = dict(zip(tasks, [0.5, 1.0, -2.0], strict=True))
    for order in itertools.permutations(tasks):
        with attach(model, {n: tasks[n] for n in order}, {n: weights[n] for n in order}):
            assert close(model(x), wanted)
    for order in itertools.permutations(tasks):
        attachments = [attach(model, tasks[n], weights[n]) for n in order]
        assert close(model(x), wanted)
        for attachment in attachments:
            attachment.remove()


def test_strengths_change_without_a_new_attach_and_per_part(model, x, make):
    task = make(0, targets="all")
    before = model(x)
    parts = ("scale", "shift", "subspace")
    keys = {"scale": ("scale",), "shift": ("shift",), "subspace": ("down", "up")}
    with attach(model, task, 0.0) as attachment:
        assert torch.equal(model(x), before)
        for part in parts:
            attachment.set_weights({"task0": dict.fromkeys(set(parts) - {part}, 0.0)})
            own = {
                n: {k: t for k, t in o.items() if k in keys[part]} for n, o in task.layers.items()
            }
            assert close(model(x), reference_task(model, [task.replace(layers=own)], [1.0])(x))
        attachment.set_weights(0.3)
        assert close(model(x), reference_task(model, [task], [0.3])(x))
        assert attachment.weights["task0"] == dict.fromkeys(parts, 0.3)
        attachment.set_weights({})
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nobody": 1.0}, "unknown task 'nobody'; known: task0"),
        ({"task0": {"rank": 1.0}}, "unknown part 'rank'"),
        (float("nan"), "finite"),
        ({"task0": {"scale": float("inf")}}, "finite"),
    ],
)
def test_a_wrong_strength_changes_nothing(model, x, make, weights, message):
    with attach(model, make(0), 0.5) as attachment:
        before, was = model(x), attachment.weights
        with pytest.raises(DiffScalerError, match=message):
            attachment.set_weights(weights)
        assert torch.equal(model(x), before)
        assert attachment.weights == was


@pytest.mark.parametrize("targets", ["blocks", "all"])
def test_rows_equal_separate_runs_and_base_rows_are_the_base(model, x, make, targets):
    tasks = {"a": make(0, targets=targets), "b": make(1, targets=targets, method="lora")}
    before = model(x)
    mix = {"a": 0.5, "b": {"subspace": -1.0}}
    with attach(model, tasks) as attachment:
        attachment.set_rows([mix, None, "b"])
        got = model(x)
        assert torch.equal(got[1], before[1])
        attachment.set_weights(mix)
        assert close(got[0], model(x)[0])
        attachment.set_weights({"b": 1.0})
        assert close(got[2], model(x)[2])
        rows = torch.tensor([[0.5, -1.0], [0.0, 0.0], [0.0, 1.0]])
        attachment.set_rows(rows)
        assert close(model(x), got)
        attachment.set_rows(rows[..., None].expand(3, 2, 3))
        assert close(model(x), got)
        attachment.set_rows([None] * 3)
        assert torch.equal(model(x), before)
        attachment.set_weights({"b": 1.0})
        assert attachment.rows is None


def test_rows_of_two_attachments_add_up(model, x, make):
    one, two = make(0), make(1)
    with attach(model, one) as first, attach(model, two) as second:
        first.set_rows(["task0", None, None])
        second.set_rows([None, None, "task1"])
        got = model(x)
    assert close(got[0], reference_task(model, [one], [1.0])(x)[0])
    assert torch.equal(got[1], model(x)[1])
    assert close(got[2], reference_task(model, [two], [1.0])(x)[2])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["nobody", None, None], "unknown task 'nobody'"),
        ([], "at least one row"),
        (torch.ones(3, 2), r"rows must be \(B, 1\)"),
        (torch.ones(3), "rows must be"),
        (torch.full((3, 1), torch.nan), "finite"),
        (torch.ones(0, 1), "at least one row"),
    ],
)
def test_impossible_rows_are_refused(model, x, make, rows, message):
    with attach(model, make(0)) as attachment:
        before = model(x)
        with pytest.raises(DiffScalerError, match=message):
            attachment.set_rows(rows)
        assert torch.equal(model(x), before)


def test_rows_that_do_not_fit_the_batch_fail_loudly(model, x, make):
    with attach(model, make(0)) as attachment:
        attachment.set_rows(["task0", None])
        with pytest.raises(DiffScalerError, match=r"2 rows are set.*shape \(3, 16, 8\)"):
            model(x)


def stack_for(layout: str, targets=1):
    model = nn.ModuleDict({"lin": nn.Linear(4, 6)}).requires_grad_(False)
    task = filled(new_task(model, targets="all", rank=2, name="t"))
    layers = {"t": task.component_layers("transformer")}
    (stack,) = build_stacks({"t": task}, layers, {"lin": model["lin"]}).values()
    stack.row_layout = layout
    return model["lin"], stack


@pytest.mark.parametrize(
    ("layout", "shape", "per_row"),
    [("fold", (6, 5, 4), (2, 5, 4)), ("fold", (6, 4), (2, 4)), ("flat", (1, 6, 4), (1, 2, 4))],
)
def test_folded_and_flat_batches_are_told_apart(layout, shape, per_row):
    layer, stack = stack_for(layout)
    x = torch.randn(shape)
    weights = torch.tensor([[1.0], [0.0], [-0.5]])[..., None].expand(3, 1, 3)
    stack.set_weights(weights)
    got = stack(x, layer(x)).reshape(3, *per_row[:-1], 6)
    stack.row_layout = "batch"
    for i, own in enumerate(x.reshape(3, *per_row)):
        stack.set_weights(weights[i])
        assert close(got[i], stack(own, layer(own)))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [("batch", (6, 4)), ("fold", (7, 4)), ("flat", (1, 7, 4)), ("flat", (2, 4))],
)
def test_a_leading_dimension_that_is_not_the_batch_is_never_guessed(layout, shape):
    layer, stack = stack_for(layout)
    stack.set_weights(torch.ones(3, 1, 3))
    x = torch.randn(shape)
    with pytest.raises(DiffScalerError, match="3 rows are set, but 'lin' ran on"):
        stack(x, layer(x))


def test_rows_are_folded_for_video_embeddings_of_the_families_that_do_so():
    class CogVideoXTransformer3DModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(4, 8, 2, stride=2)})

        def forward(self, x):  # (B, F, C, H, W), frames folded into the batch
            return self.patch_embed["proj"](x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model, x = CogVideoXTransformer3DModel().requires_grad_(False), torch.randn(2, 3, 4, 4, 4)
    task = filled(new_task(model, targets="all", name="t"))
    before = model(x)
    with attach(model, task) as attachment:
        full = model(x)
        attachment.set_rows([None, "t"])
        got = model(x)
    assert torch.equal(got[0], before[0])
    assert close(got[1], full[1])


def test_a_copy_of_an_attached_model_is_independent(model, x, make):
    attachment = attach(model, make(0))
    attached = model(x)
    copied = copy.deepcopy(model)
    attachment.set_weights(0.0)
    assert torch.equal(copied(x), attached)
    attachment.remove()
    assert torch.equal(copied(x), attached)
    assert len(hooks_of(copied)) == 8
    own = attach(copied, make(1))
    assert not torch.equal(copied(x), attached)
    own.remove()
    assert torch.equal(copied(x), attached)


def test_an_attached_model_can_be_pickled(model, x, make):
    with attach(model, make(0)):
        attached = model(x)
        again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), attached)


@pytest.mark.parametrize("keyword", ["input", "hidden_states"])
def test_a_layer_called_by_keyword_is_adapted_too(keyword):
    class Named(nn.Linear):
        def forward(self, hidden_states):
            return super().forward(hidden_states)

    layer = nn.Linear(4, 4) if keyword == "input" else Named(4, 4)
    model = nn.ModuleDict({"lin": layer}).requires_grad_(False)
    x = torch.randn(2, 4)
    with attach(model, filled(new_task(model, targets="all"))):
        assert torch.equal(layer(**{keyword: x}), layer(x))


def test_a_module_called_twice_in_one_forward_is_adapted_twice(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(self.lin(x))

    model, x = Twice().requires_grad_(False), torch.randn(2, 4)
    task = filled(new_task(model, targets="all"))
    with attach(model, task):
        assert close(model(x), reference_task(model, [task], [1.0])(x))


def gradients(attachment):
    return [p.grad.clone() for p in attachment.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, x, make, reentrant):
    x = x.requires_grad_()
    with attach(model, make(0)) as attachment:
        attachment.requires_grad_()
        model(x).square().sum().backward()
        plain = gradients(attachment)
        attachment.zero_grad()
        for block in model.transformer_blocks:
            block.forward = lambda h, b=block: checkpoint(
                type(b).forward, b, h, use_reentrant=reentrant
            )
        model(x).square().sum().backward()
        assert all(map(close, gradients(attachment), plain))


def test_gradients_are_those_of_replaced_modules(model, x, make):
    task = make(0, targets="all")
    with attach(model, task, 0.7) as attachment:
        attachment.requires_grad_()
        model(x).square().sum().backward()
        got = {
            f"{stack.name}.{name}": tensor.grad
            for stack in attachment.stacks
            for name, tensor in stack.affiners[0].tensors().items()
        }
    leaves = {
        n: {k: t.clone().requires_grad_() for k, t in own.items()} for n, own in task.layers.items()
    }
    reference_task(model, [task.replace(layers=leaves)], [0.7])(x).square().sum().backward()
    for layer, own in leaves.items():
        for name, tensor in own.items():
            assert close(got[f"{layer.partition('.')[2]}.{name}"], tensor.grad, 1e-5)


def test_training_after_inference_mode_works(model, x, make):
    tasks = [make(0), make(1)]
    with torch.inference_mode():
        attachment, other = (attach(model, task) for task in tasks)
        attachment.set_rows(["task0", None, None])
        model(x)
        attachment.set_weights(0.5)
        other.set_weights(0.9)
        model(x)
    assert close(model(x), reference_task(model, tasks, [0.5, 0.9])(x))
    attachment.requires_grad_()
    y = x.clone().requires_grad_()
    model(y).square().sum().backward()
    assert y.grad.any()
    assert all(g.isfinite().all() for g in gradients(attachment))
    with torch.inference_mode():
        attachment.set_weights(0.25)
        model(x)


@pytest.mark.parametrize("grad", [True, False])
def test_updates_are_seen_at_once(model, x, make, grad):
    with attach(model, make(0)) as attachment:
        old = model(x)
        attachment.requires_grad_()
        with torch.set_grad_enabled(grad):
            model(x)
            with torch.no_grad():
                for parameter in attachment.parameters():
                    parameter.mul_(0.5)
            new = model(x)
        assert not torch.equal(old, new)
        assert close(new, reference_task(model, [attachment.task()], [1.0])(x))
        attachment.requires_grad_(False)
        assert close(model(x), new)  # not what was folded before the training


def test_frozen_parameters_changed_in_place_are_seen_too(model, x, make):
    with attach(model, make(0)) as attachment:
        model(x)
        for parameter in attachment.parameters():
            parameter.copy_(parameter * 0.5)  # an EMA, a hot swap
        assert close(model(x), reference_task(model, [attachment.task()], [1.0])(x))
        for parameter in attachment.parameters():
            parameter.requires_grad_()
        model(x)
        for parameter in attachment.parameters():
            parameter.data.zero_()  # which no counter sees
            parameter.requires_grad_(False)
        assert close(model(x), model_without(model, x, attachment))


def model_without(model, x, attachment):
    attachment.remove()
    return model(x)


def test_training_leaves_the_attached_task_as_it_was(model, x, make):
    task = make(0)
    before = {layer: {n: t.clone() for n, t in own.items()} for layer, own in task.layers.items()}
    with attach(model, task) as attachment:
        attachment.requires_grad_()
        model(x).square().sum().backward()
        torch.optim.SGD(attachment.parameters(), 0.1).step()
        trained = attachment.task().layers
    for layer, own in before.items():
        assert all(torch.equal(task.layers[layer][n], t) for n, t in own.items())
    assert any(
        not torch.equal(trained[k][n], t) for k, own in before.items() for n, t in own.items()
    )


def test_a_saved_task_is_a_copy_of_the_trained_values(model, make):
    with attach(model, {"a": make(0), "b": make(1)}) as attachment:
        saved = attachment.task("b")
        kept = [t.clone() for t in saved.tensors]
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.add_(1)
        assert all(map(torch.equal, saved.tensors, kept))
        assert saved.info == make(1).info
        assert list(saved.layers) == list(make(1).layers)
        with pytest.raises(UnknownNameError):
            attachment.task("c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_runs_in_its_own_dtype(model, x, make, dtype):
    exact = reference_task(model, [make(0)], [1.0])(x)
    model, x = model.to(dtype), x.to(dtype)
    with attach(model, make(0)) as attachment:
        got = model(x)
        assert got.dtype == dtype
        assert all(p.dtype == torch.float32 for p in attachment.parameters())
        assert close(got.float(), exact, 0.05)
        attachment.requires_grad_()
        model(x).float().square().sum().backward()
        assert {g.dtype for g in gradients(attachment)} == {torch.float32}


def test_autocast_works_with_gradients(model, x, make):
    with attach(model, make(0)) as attachment:
        exact = model(x)
        attachment.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
        got.float().square().sum().backward()
        assert close(got.float(), exact, 0.05)
        assert all(g.isfinite().all() for g in gradients(attachment))


def test_a_model_on_the_meta_device_runs_with_a_task(make):
    model = Denoiser().to("meta")
    task = filled(new_task(model, "lora"))
    with attach(model, task):
        assert model(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 16, 4)


def test_a_task_of_two_components_needs_to_know_which_one_this_is(model, x, make):
    layers = dict(make(0).layers)
    both = layers | {n.replace("transformer.", "transformer_2.", 1): t for n, t in layers.items()}
    task = make(0).replace(layers=both)
    with attach(model, task, component="transformer_2") as attachment:
        assert list(attachment.task().components) == ["transformer_2"]
    with pytest.raises(MismatchError, match="adapt transformer, none of them 'unet'"):
        attach(model, make(0), component="unet")
    unets = {n.replace("transformer", "unet", 1): t for n, t in layers.items()}
    mixed = {f"transformer_2.{n}": t for n, t in make(0).component_layers("transformer").items()}
    with pytest.raises(MismatchError, match="say which this model is"):
        attach(model, task.replace(layers=unets | mixed))


def lora_on(model, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    return peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("first", ["lora", "task"])
def test_a_peft_lora_and_a_task_add_up_in_both_orders(model, x, make, first):
    if first == "lora":
        lora_on(model, ["to_q", "ff.0"])
        lora = model(x)
        task = filled(new_task(model), 0)
        assert list(task.layers) == list(filled(new_task(Denoiser())).layers)
        attachment = attach(model, task)
    else:
        task = filled(new_task(model), 0)
        attachment = attach(model, task)
        lora_on(model, ["to_q", "ff.0"])
        attachment.remove()
        lora = model(x)
        attachment = attach(model, task)
    both = model(x)
    assert not close(both, lora, 1e-3)
    block = model.transformer_blocks[0].attn
    own = task.layers["transformer.transformer_blocks.0.attn.to_q"]
    h = torch.randn(2, 8)
    attachment.set_weights(0.0)
    plain = block.to_q(h)
    wx = h @ block.to_q.base_layer.weight.T
    attachment.set_weights(1.0)
    delta = own["scale"] * wx + own["shift"] + torch.relu(h @ own["down"].T) @ own["up"].T
    assert close(block.to_q(h), plain + delta)
    attachment.remove()
    assert torch.equal(model(x), lora)


def test_removing_the_lora_leaves_the_task_and_the_other_way_round(model, x, make):
    base = model(x)
    attachment = attach(model, make(0))
    alone = model(x)
    lora_on(model, ["to_q"])
    for block in model.transformer_blocks:
        block.attn.to_q = block.attn.to_q.base_layer
    assert torch.equal(model(x), alone)
    attachment.remove()
    assert torch.equal(model(x), base)


def test_fused_projections_are_refused_as_their_layers_are_never_called():
    model = tiny("sd3").requires_grad_(False)
    task = new_task(model, targets="attention")
    model.fuse_qkv_projections()
    with pytest.raises(DiffScalerError, match=r"fused, so 1?\d layers .*unfuse_qkv_projections"):
        attach(model, task)
    assert hooks_of(model) == []
    model.unfuse_qkv_projections()
    attach(model, task).remove()
    model.fuse_qkv_projections()
    attach(model, new_task(model, targets="mlp")).remove()


def test_a_real_model_gives_the_formula(x):
    model = tiny("sd3").requires_grad_(False)
    task = filled(new_task(model, name="t"), size=0.1)
    inputs = {
        "hidden_states": x[:2],
        "encoder_hidden_states": torch.randn(2, 3, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([500.0, 10.0]),
        "return_dict": False,
    }
    before = model(**inputs)[0]
    wanted = reference_task(model, [task], [1.0])(**inputs)[0]
    with attach(model, task) as attachment:
        assert close(model(**inputs)[0], wanted, 1e-5)
        attachment.set_rows([None, "t"])
        rows = model(**inputs)[0]
    assert torch.equal(rows[0], before[0])
    assert close(rows[1], wanted[1], 1e-5)
    assert torch.equal(model(**inputs)[0], before)


def test_a_difffit_scale_needs_no_bias_so_none_is_read(model, make):
    model = model.to("meta")
    attach(model, make(0, method="difffit")).remove()


def test_stacks_of_any_task_can_be_built_without_hooks(model, x, make):
    layer = model.transformer_blocks[0].attn.to_q
    task = TaskAdapter({"transformer.q": {"shift": torch.ones(8)}}, {"name": "t"})
    layers = {"t": task.component_layers("transformer")}
    (stack,) = build_stacks({"t": task}, layers, {"q": layer}).values()
    assert isinstance(stack, AffinerStack)
    stack.settle(torch.device("cpu"), torch.float32)
    h = torch.randn(2, 8)
    assert torch.equal(stack(h, layer(h)), layer(h) + 1)
    assert stack.nbytes == 8 * 4 + stack.computed_bytes
    assert 8 * 4 <= stack.computed_bytes <= 4 * 8 * 4
    stack.unsettle()
    assert stack.computed_bytes == 0
