from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffscaler_core import DiffScalerError, attach, new_task
from diffscaler_core.affiner import PARTS, Affiner, fold_alone
from diffscaler_core.affiner_grad import affine
from diffscaler_core.stack import AffinerStack

from .conftest import filled
from .test_affiner import SOME_PARTS, one_layer, task_for


def close(a, b, tolerance):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture
def plain(monkeypatch):
    """plain(): from now on everything is left to autograd."""
    return lambda: monkeypatch.setattr(AffinerStack, "_is_lean", lambda *_: False)


def gradients(model, x, task, groups=None, autocast=None):
    tasks = {"t": task} if not isinstance(task, dict) else task
    x = x.detach().clone().requires_grad_()
    with attach(model, tasks) as attachment:
        if x.dtype == torch.float64:
            attachment.double()
        attachment.requires_grad_().set_groups(groups)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = model(x)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape)
        (out.double() * weight + 0.1 * out.double().square()).sum().backward()
        return [out.detach(), x.grad, *(p.grad for p in attachment.parameters())]


KINDS = ["linear", "linear, no bias", "linear, four dims", "conv2d stride, padding", "conv1d"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind, activation, dtype, tolerance, monkeypatch):
    model, x = one_layer(kind)
    model, x = model.to(dtype), x.to(dtype)
    for parts, includes in itertools.product(SOME_PARTS, [False, True]):
        info = {"activation": activation, "gain": 1.7, "scale_includes_bias": includes}
        task = task_for(model, parts, size=0.2, **info)
        lean = gradients(model, x, task)
        with monkeypatch.context() as patch:
            patch.setattr(AffinerStack, "_is_lean", lambda *_: False)
            exact = gradients(model, x, task)
        assert all(close(a, b, tolerance) for a, b in zip(lean, exact, strict=True))


@pytest.mark.parametrize("kinds", [("relu", "relu"), ("relu", "identity")])
def test_gradients_of_groups_are_those_of_autograd(kinds, plain):
    model, x = one_layer("linear")
    x = torch.randn(6, 5, 6)
    tasks = {
        name: task_for(model, PARTS, i, size=0.2, rank=2 + i, activation=kind, gain=1.0 + i)
        for i, (name, kind) in enumerate(zip("ab", kinds, strict=True))
    }
    lean = gradients(model, x, tasks, ["a", "b", "a"])
    plain()
    exact = gradients(model, x, tasks, ["a", "b", "a"])
    assert all(close(a, b, 1e-5) for a, b in zip(lean, exact, strict=True))


@pytest.mark.parametrize("parts", SOME_PARTS)
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_gradients_are_those_of_finite_differences(parts, activation):
    torch.manual_seed(1)
    shapes = {"scale": (5,), "shift": (5,), "down": (3, 4), "up": (5, 3)}
    present = {"scale": {"scale"}, "shift": {"shift"}, "subspace": {"down", "up"}}
    names = [n for n in shapes if any(n in present[part] for part in parts)]
    leaves = [0.4 * torch.randn(shapes[n], dtype=torch.float64) for n in names]
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)

    def corrected(x, y, *tensors):
        own = dict(zip(names, tensors, strict=True))
        affiner = Affiner(activation=activation, gain=1.5)
        for name in shapes:
            del affiner._parameters[name]  # the leaf itself in the parameter's place
            setattr(affiner, name, own.get(name))
        return affine(x, y, fold_alone(affiner, bias, x.device))

    assert torch.autograd.gradcheck(corrected, [t.requires_grad_() for t in (x, y, *leaves)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_gradients_are_as_good_as_autograds(dtype, autocast, monkeypatch):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(64, 64)}).requires_grad_(False)
    model.forward = lambda x: model["lin"](x)
    x = torch.randn(512, 64)
    task = filled(new_task(model, targets="all", rank=4), size=0.05)
    exact = gradients(model, x, task)
    cast = dtype if autocast else None
    model, x = (model, x) if autocast else (model.to(dtype), x.to(dtype))
    lean = gradients(model, x, task, autocast=cast)
    monkeypatch.setattr(AffinerStack, "_is_lean", lambda *_: False)
    usual = gradients(model, x, task, autocast=cast)
    for a, b, c in zip(lean[2:], usual[2:], exact[2:], strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() <= 1.5 * (b - c).norm() + 2e-3 * c.norm()


@pytest.mark.parametrize("scale", [-1.0, -0.9, -1.2])
def test_where_one_plus_scale_is_near_0_gradients_are_right_too(scale, plain):
    model, x = one_layer("linear")
    task = task_for(model, PARTS, size=0.2)
    task.layers["transformer.layer"]["scale"][3] = scale
    got = gradients(model, x, task)
    plain()
    assert all(map(torch.equal, got, gradients(model, x, task)))


def test_scales_that_come_near_0_later_are_noticed():
    model, x = one_layer("linear")
    with attach(model, task_for(model, ("scale",), size=0.1)) as attachment:
        attachment.requires_grad_()
        names = [model(x).grad_fn.name()]
        with torch.no_grad():
            next(attachment.parameters())[2] = -1
        names.append(model(x).grad_fn.name())
        with torch.no_grad():
            next(attachment.parameters()).zero_()
        names.append(model(x).grad_fn.name())
    assert ["_Affine" in name for name in names] == [True, False, True]


def test_an_output_changed_in_place_is_named():
    model, x = one_layer("linear")
    with attach(model, task_for(model, PARTS, size=0.1)) as attachment:
        attachment.requires_grad_()
        out = model(x)
        out += 1
        with pytest.raises(DiffScalerError, match=r"changed the output of 'layer' in place"):
            out.sum().backward()
    with attach(model, task_for(model, ("shift", "subspace"))) as attachment:
        attachment.requires_grad_()
        out = model(x)
        out += 1  # which does no harm here
        out.sum().backward()


def test_second_derivatives_are_refused_by_name():
    model, x = one_layer("linear")
    with attach(model, task_for(model, PARTS, size=0.1)) as attachment:
        attachment.requires_grad_()
        (first,) = torch.autograd.grad(
            model(x).square().sum(), [next(attachment.parameters())], create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_function_transforms_go_the_plain_way():
    model, x = one_layer("linear")
    with attach(model, task_for(model, PARTS, size=0.1)) as attachment:
        attachment.requires_grad_()
        _, pull = torch.func.vjp(model, x)
        y = x.clone().requires_grad_()
        out = model(y)
        out.sum().backward()
        assert torch.allclose(pull(torch.ones_like(out))[0], y.grad, atol=1e-6)


class FeedForward(nn.Module):
    """Two Linears and what is between them."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between
        wide = 64 if between == "gated" else 32
        self.up, self.down = nn.Linear(8, wide), nn.Linear(32, 8)

    def forward(self, x):
        h = self.up(x)
        if self.between == "gated":
            h, gate = h.chunk(2, -1)
            return self.down(h * F.silu(gate))
        return self.down(getattr(F, self.between)(h))


def kept(model, x):
    """Bytes of what is kept for the backward, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and t.untyped_storage().data_ptr() not in known:
            held[t.untyped_storage().data_ptr()] = t
        return t.detach()  # an output that packs itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    return sum(t.untyped_storage().nbytes() for t in held.values()), out


@pytest.mark.parametrize("between", ["gelu", "silu", "gated"])
def test_an_activations_result_is_made_again_and_not_kept(between, monkeypatch):
    torch.manual_seed(0)
    model, x = FeedForward(between).requires_grad_(False), torch.randn(200, 8)
    task = filled(new_task(model, targets="all", rank=2), size=0.1)

    def run():
        with attach(model, task) as attachment:
            attachment.requires_grad_()
            count, out = kept(model, x)
            out.square().sum().backward()
            return count, [p.grad for p in attachment.parameters()]

    less, again = run()
    monkeypatch.setattr("diffscaler_core.affiner_grad.recipe_of", lambda x: None)
    more, stored = run()
    assert more - less == 200 * 32 * 4
    assert all(map(torch.equal, again, stored))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("between", ["gelu", "gated"])
def test_checkpointing_gives_the_same_gradients(between, reentrant):
    torch.manual_seed(0)
    model, x = FeedForward(between).requires_grad_(False), torch.randn(20, 8, requires_grad=True)
    with attach(model, filled(new_task(model, targets="all", rank=2), size=0.1)) as attachment:
        attachment.requires_grad_()
        model(x).square().sum().backward()
        wanted = [p.grad.clone() for p in attachment.parameters()]
        attachment.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert all(map(torch.equal, wanted, [p.grad for p in attachment.parameters()]))


def tiny_dit():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "timestep": torch.full((4,), 5),
        "class_labels": torch.arange(4),
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), lambda x: model(x, **inputs)[0]


SIX = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


class _Called(nn.Module):
    def __init__(self, model, call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(x)


def test_a_transformer_keeps_less_than_with_pefts_lora():
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 4, 16, 16)
    held = {}
    for method in ("diffscaler", "lora", "bitfit", "scale_shift"):
        model, call = tiny_dit()
        with attach(model, new_task(model, method, 16, targets=SIX)) as attachment:
            attachment.requires_grad_()
            held[method] = kept(_Called(model, call), x)[0]
    model, call = tiny_dit()
    layers = "|".join(SIX).replace(".", r"\.")
    config = peft.LoraConfig(r=16, target_modules=rf"transformer_blocks\..*({layers})")
    peft.inject_adapter_in_model(config, model)
    theirs = kept(_Called(model, call), x)[0]
    tokens, width, blocks = 4 * 64, 64, 2
    assert held["diffscaler"] < theirs
    # what an output costs that nothing else keeps: those of to_out.0 and ff.net.2
    extra = 2 * blocks * tokens * width * 4
    small = 12 * 6 * blocks * 4 * (16 + 4) * width  # folded vectors
    assert 0 <= held["diffscaler"] - held["lora"] - extra <= small
    assert 0 <= held["scale_shift"] - held["bitfit"] - extra <= small


def test_nothing_is_kept_for_layers_before_the_first_adapted_one():
    x = torch.randn(4, 4, 16, 16)
    counts = []
    for blocks in (["transformer_blocks.1.ff.net.2"], ["transformer_blocks.0.ff.net.2"]):
        model, call = tiny_dit()
        with attach(model, new_task(model, "diffscaler", 2, targets=blocks)) as attachment:
            attachment.requires_grad_()
            counts.append(kept(_Called(model, call), x)[0])
    assert counts[0] < counts[1] / 2


def test_the_input_of_a_first_layer_gets_no_gradient():
    model, x = one_layer("linear")
    with attach(model, task_for(model, PARTS, size=0.1)) as attachment:
        attachment.requires_grad_()
        assert model(x).grad_fn.next_functions[0][0] is None
        assert model(x.requires_grad_()).grad_fn.next_functions[0][0] is not None


def test_tasks_that_do_not_run_get_no_gradient():
    model, x = one_layer("linear")
    tasks = {name: task_for(model, PARTS, i, size=0.1) for i, name in enumerate("ab")}
    with attach(model, tasks) as attachment:
        attachment.requires_grad_().set_groups(["b"])
        model(x).sum().backward()
        assert all(p.grad is None for p in attachment.parameters_of("a").values())
        assert all(p.grad is not None for p in attachment.parameters_of("b").values())


def test_outputs_and_gradients_of_any_memory_layout_are_taken(plain):
    layer = nn.Linear(6, 8).requires_grad_(False)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):  # its gradient arrives transposed
            return self.layer(x.transpose(1, 2).contiguous().transpose(1, 2)).transpose(1, 2) * 1

    model, x = Turned(), torch.randn(4, 5, 6)
    tasks = {name: task_for(model, PARTS, i, size=0.1) for i, name in enumerate("ab")}
    lean = [gradients(model, x, tasks, groups) for groups in (["a"], ["a", "b"])]
    plain()
    exact = [gradients(model, x, tasks, groups) for groups in (["a"], ["a", "b"])]
    for own, other in zip(lean, exact, strict=True):
        pairs = [(a, b) for a, b in zip(own, other, strict=True) if b is not None]
        assert len(pairs) > 4
        assert all(close(a, b, 1e-5) for a, b in pairs)
