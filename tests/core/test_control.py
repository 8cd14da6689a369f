"""Control: what is added, where, when; written a second time with the layer's own W."""

from __future__ import annotations

import contextlib
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    TaskAdapter,
    UnknownNameError,
    attach,
    combine_tasks,
    load_task,
    new_task,
    save_task,
)
from diffscaler_core.combine import cast_task, scale_task
from diffscaler_core.control import Control
from diffscaler_core.file_rules import TaskFileError

from .conftest import Block, hooks_of, reference_task


class SD3Transformer2DModel(nn.Module):
    """A denoiser in miniature, under a family's name: a convolution embeds (B, 4, 8, 8)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.pos_embed = nn.Module()
        self.pos_embed.proj = nn.Conv2d(4, width, 2, stride=2)
        self.transformer_blocks = nn.ModuleList([Block(width), Block(width)])
        self.proj_out = nn.Linear(width, 4)

    def embed(self, x):
        return self.pos_embed.proj(x).flatten(2).transpose(1, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.transformer_blocks:
            x = block(x)
        return self.proj_out(x)


class FluxTransformer2DModel(SD3Transformer2DModel):
    """The same with a Linear that sees patches packed by hand."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.pos_embed
        self.x_embedder = nn.Linear(16, width)

    def embed(self, x):
        return self.x_embedder(F.unfold(x, 2, stride=2).transpose(1, 2))


class UNet2DModel(SD3Transformer2DModel):
    """The same with a 3×3 convolution, as a U-Net begins; its embedding has no bias."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.pos_embed
        self.conv_in = nn.Conv2d(4, width, 3, padding=1, bias=False)

    def embed(self, x):
        return self.conv_in(x).flatten(2).transpose(1, 2)


#: Class -> name of the embedding, and (kernel, stride, padding) of the windows that it sees.
MODELS = {
    SD3Transformer2DModel: ("pos_embed.proj", (2, 2, 0)),
    FluxTransformer2DModel: ("x_embedder", (2, 2, 0)),
    UNet2DModel: ("conv_in", (3, 1, 1)),
}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Z = rand(3, 4, 8, 8, seed=1), rand(3, 4, 8, 8, seed=2)


def built(kind) -> nn.Module:
    torch.manual_seed(0)
    return kind().requires_grad_(False).eval()


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def model(request) -> nn.Module:
    return built(request.param)


@pytest.fixture
def sd3() -> nn.Module:
    return built(SD3Transformer2DModel)


def trained(task: TaskAdapter, seed: int = 0, size: float = 0.3) -> TaskAdapter:
    generator = torch.Generator().manual_seed(seed)

    def noise(t):
        return t + size * torch.randn(t.shape, generator=generator)

    layers = {n: {k: noise(t) for k, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers, extras={k: noise(t) for k, t in task.extras.items()})


def edges(model, seed: int = 0, name: str = "edges", **options) -> TaskAdapter:
    component = "unet" if isinstance(model, UNet2DModel) else None
    facts = {"rank": 3, "component": component, "control": "edges", **options}
    return trained(new_task(model, name=name, **facts), seed)


def plain(model, seed: int = 5, name: str = "style") -> TaskAdapter:
    component = "unet" if isinstance(model, UNet2DModel) else None
    return trained(new_task(model, rank=3, name=name, component=component), seed)


class Controlled(nn.Module):
    """W over windows of x and of each z, all in one place: no hook, no affiner of ours."""

    def __init__(self, layer, windows, controls) -> None:
        super().__init__()
        self.layer, self.windows, self.controls = layer, windows, controls

    def through(self, x, matrix):
        kernel, stride, padding = self.windows
        return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2) @ matrix.T

    def tokens(self, x):
        layer, w = self.layer, self.layer.weight.flatten(1)
        out = self.through(x, w) + (0 if layer.bias is None else layer.bias)
        for task, z, w_scale, w_shift, w_subspace in self.controls:
            own = {n.rpartition(".")[2]: t for n, t in task.extras.items()}
            facts = task.info["control"]
            if "scale" in own:
                out = out + w_scale * own["scale"] * self.through(z, w)
                out = out + w_shift * own["shift"]
            hidden = self.through(z, own["down"].flatten(1))
            hidden = hidden.clamp(min=0) if facts["activation"] == "relu" else hidden
            out = out + w_subspace * facts["gain"] * (hidden @ own["up"].T)
        return out


def reference(model, controls, others=()):
    """What the model must say: controls [(task, z, strength)], others [(task, strength)]."""
    name, windows = MODELS[type(model)]
    tasks = [task for task, *_ in controls] + [task for task, _ in others]
    weights = [w for _, _, w in controls] + [w for _, w in others]
    moved = [
        t.replace(layers={n.replace("unet.", "transformer."): own for n, own in t.layers.items()})
        for t in tasks
    ]
    twin = reference_task(model, moved, weights)
    parts = [(task, z, *(w if isinstance(w, tuple) else (w, w, w))) for task, z, w in controls]
    embedding = Controlled(model.get_submodule(name), windows, parts)
    twin.embed = embedding.tokens
    return twin


def close(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()
    return True


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
    assert torch.equal(got[1], in_rows[1])
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


# Training


def test_gradients_go_to_the_tasks_parameters_alone_and_are_the_formulas(model):
    task, prefix = edges(model), "unet" if isinstance(model, UNet2DModel) else "transformer"
    with attach(model, task) as a:
        a.requires_grad_()
        a.set_control(Z)
        model(X).square().mean().backward()
        parameters = a.parameters_of("edges")
        got = {n: p.grad for n, p in parameters.items()}
    assert all(parameter.grad is None for parameter in model.parameters())
    live = {n: t.clone().requires_grad_() for n, t in task.extras.items()}
    twin = reference(model, [(task.replace(extras=live), Z, 1.0)])
    twin(X).square().mean().backward()
    assert set(live) == {n for n in got if n.startswith(f"control.{prefix}.")}
    for name, tensor in live.items():
        close(got[name], tensor.grad, 1e-4)
    assert set(got) > set(live)
    assert all(bool(g.any()) for g in got.values())


def test_a_row_that_is_left_out_in_training_still_trains_the_blocks(sd3):
    task = edges(sd3)
    with attach(sd3, task) as a:
        a.requires_grad_()
        a.set_control(Z, torch.tensor([0.0, 0.0, 0.0]))
        wanted = reference(sd3, [], [(task, 1.0)])(X)
        close(sd3(X), wanted)
        sd3(X).square().mean().backward()
        for name, parameter in a.parameters_of("edges").items():
            dead = name.startswith("control.")
            assert bool(parameter.grad.any()) != dead, name
        a.set_control(Z, torch.tensor([1.0, 0.0, 1.0]))
        with torch.no_grad():
            got = sd3(X)
        close(got[1], wanted[1])
        close(got[0], reference(sd3, [(task, Z, 1.0)])(X)[0])
        a.set_control(None)
        with torch.no_grad():
            close(sd3(X), wanted)
        a.set_controls(None)  # inference again: without a control the base
        with torch.no_grad():
            untouched = sd3(X)
    assert torch.equal(untouched, sd3(X))


def test_an_optimisers_step_is_seen_by_the_next_call(sd3):
    with attach(sd3, edges(sd3)) as a:
        a.set_controls({"edges": Control(Z)})
        with torch.no_grad():
            before = sd3(X)
            next(iter(p for n, p in a.parameters_of("edges").items() if "scale" in n and
                      n.startswith("control."))).add_(1.0)  # fmt: skip
            after = sd3(X)
            assert not torch.equal(before, after)
            close(after, reference(sd3, [(a.task(), Z, 1.0)])(X))


def test_groups_train_one_control_task_each(sd3):
    tasks = {"a": edges(sd3), "b": edges(sd3, 1), "c": plain(sd3)}
    x, z = X[:1].repeat(3, 1, 1, 1), Z[:1].repeat(3, 1, 1, 1)
    with attach(sd3, tasks) as a:
        a.requires_grad_()
        a.set_control(z, torch.ones(3))
        a.set_groups(["b", "c", "a"])
        got = sd3(x)
        close(got[0], reference(sd3, [(tasks["b"], z, 1.0)])(x)[0])
        close(got[1], reference(sd3, [], [(tasks["c"], 1.0)])(x)[1])
        close(got[2], reference(sd3, [(tasks["a"], z, 1.0)])(x)[2])
        got[0].square().sum().backward()
        touched = {
            n for n in tasks for p in a.parameters_of(n).values()
            if p.grad is not None and p.grad.any()
        }  # fmt: skip
        assert touched == {"b"}
        a.set_control(z, torch.zeros(3))  # the next batch, in the same groups
        with torch.no_grad():
            close(sd3(x)[2], reference(sd3, [], [(tasks["a"], 1.0)])(x)[2])


def test_what_was_trained_is_what_is_saved(sd3, tmp_path):
    with attach(sd3, edges(sd3)) as a:
        a.requires_grad_()
        a.set_control(Z)
        sd3(X).square().mean().backward()
        torch.optim.SGD(a.parameters(), lr=0.1).step()
        with torch.no_grad():
            wanted = sd3(X)
        task = a.task()
    assert task.is_control
    assert list(task.extras) == list(edges(sd3).extras)
    loaded = load_task(save_task(task, tmp_path / "edges.safetensors"))
    with attach(sd3, loaded) as a, torch.no_grad():
        a.set_controls({"edges": Control(Z)})
        close(sd3(X), wanted)


# Compiled


class Counting:
    """A backend that runs graphs eagerly and counts how many it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fullgraph", [False, True])
@torch.no_grad()
def test_twenty_controls_and_strengths_compile_nothing_anew(model, fullgraph):
    torch._dynamo.reset()
    backend, task = Counting(), edges(model)
    before = model(X)
    with attach(model, {"edges": task, "style": plain(model)}) as a:
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        close(compiled(X), model(X))
        a.set_controls({"edges": Control(Z)})
        close(compiled(X), model(X))
        settled = backend.graphs
        assert settled <= 2 or not fullgraph
        for i in range(20):
            a.set_controls({"edges": Control(rand(3, 4, 8, 8, seed=i))})
            a.set_weights({"edges": 0.1 * i, "style": 1 - 0.1 * i})
            got = compiled(X)
            close(got, compiled(X))
            assert backend.graphs == settled
            z = rand(3, 4, 8, 8, seed=i)
            close(got, reference(model, [(task, z, 0.1 * i)], [(plain(model), 1 - 0.1 * i)])(X))
        a.set_weights(0.0)
        assert torch.equal(compiled(X), before)
    torch._dynamo.reset()


# Tasks and files


def test_a_new_control_task_says_what_it_is(sd3):
    task = new_task(sd3, rank=3, name="e", control="edges")
    assert task.is_control
    assert task.info["control"] == {
        "kind": "edges", "embedding": "affiner", "activation": "identity", "gain": 1.0, "rank": 16,
    }  # fmt: skip
    tensors = task.control_layers("transformer")["pos_embed.proj"]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "scale": (8,), "shift": (8,), "down": (16, 4, 2, 2), "up": (8, 16),
    }  # fmt: skip
    without = new_task(sd3, rank=3, name="e")
    assert task.num_parameters == without.num_parameters + 8 + 8 + 16 * 16 + 8 * 16
    assert not without.is_control
    assert without.control_layers("transformer") == {}
    copied = new_task(sd3, control="edges", control_embedding="copy", control_activation="relu")
    assert copied.info["control"]["activation"] == "identity"
    narrow = new_task(sd3, control="edges", control_rank=5)
    assert narrow.info["control"]["rank"] == 5
    assert new_task(sd3, control="edges", control_rank=99).info["control"]["rank"] == 16
    for wrong in ({"control_rank": 0}, {"control_embedding": "x"}, {"control_activation": "gelu"}):
        with pytest.raises(DiffScalerError):
            new_task(sd3, control="edges", **wrong)


def test_the_seed_alone_decides_the_start(sd3):
    one, other = (new_task(sd3, control="edges", seed=seed) for seed in (0, 1))
    again = new_task(sd3, control="edges", seed=0)
    name = "control.transformer.pos_embed.proj.down"
    assert torch.equal(one.extras[name], again.extras[name])
    assert not torch.equal(one.extras[name], other.extras[name])


@torch.no_grad()
def test_a_file_brings_a_control_task_back_bit_for_bit(model, tmp_path):
    task = edges(model, control_rank=2)
    loaded = load_task(save_task(task, tmp_path / "edges.safetensors"))
    assert loaded.info["control"] == task.info["control"]
    assert {n: t.tolist() for n, t in loaded.extras.items()} == {
        n: t.tolist() for n, t in task.extras.items()
    }
    with attach(model, loaded) as a:
        a.set_controls({"edges": Control(Z)})
        got = model(X)
    with attach(model, task) as a:
        a.set_controls({"edges": Control(Z)})
        assert torch.equal(got, model(X))


def test_a_control_without_affiners_in_the_blocks_is_a_task_too(sd3, tmp_path):
    alone = edges(sd3).replace(layers={})
    loaded = load_task(save_task(alone, tmp_path / "alone.safetensors"))
    assert loaded.is_control
    assert loaded.components == ("transformer",)


EMBED = "control.transformer.pos_embed.proj"


def spoiled(task, extras=None, **control):
    facts = task.info["control"]
    return task.replace(extras={**task.extras, **(extras or {})}).with_info(
        control={**facts, **control}
    )


def without(task, *names):
    return task.replace(extras={n: t for n, t in task.extras.items() if n not in names})


BAD = {
    "tensors without a config entry": (
        lambda t: t.with_info(control=None), "says nothing of a control, but holds 1"),
    "a config entry without tensors": (
        lambda t: t.replace(extras={}), "says it takes a control, but holds 0"),
    "two for one model": (
        lambda t: spoiled(t, {"control.transformer.x_embedder.scale": torch.ones(8)}),
        "two control affiners for one model"),
    "a foreign name": (lambda t: spoiled(t, {f"{EMBED}.weight": torch.ones(8)}), "no task has"),
    "a foreign component": (
        lambda t: spoiled(t, {"control.vae.conv_in.scale": torch.ones(8)}), "no task has"),
    "a control in a control": (
        lambda t: spoiled(t, {"control.control.transformer.x.scale": torch.ones(8)}),
        "no task has"),
    "no module at all": (
        lambda t: spoiled(t, {"control.transformer.scale": torch.ones(8)}), "no task has"),
    "a path in the name": (
        lambda t: spoiled(t, {"control.transformer.../x.scale": torch.ones(8)}), "no task has"),
    "down without up": (lambda t: without(t, f"{EMBED}.up"), "down and up come together"),
    "shapes that do not fit": (
        lambda t: spoiled(t, {f"{EMBED}.up": torch.ones(8, 3)}), r"down .* up \(8, 3\)"),
    "other widths": (lambda t: spoiled(t, {f"{EMBED}.scale": torch.ones(9)}), "do not fit"),
    "NaN": (
        lambda t: spoiled(t, {f"{EMBED}.scale": torch.full((8,), float("nan"))}), "NaN or Inf"),
    "another dtype": (
        lambda t: spoiled(t, {f"{EMBED}.scale": torch.ones(8, dtype=torch.int64)}), "stored as"),
    "an unknown activation": (lambda t: spoiled(t, activation="gelu"), "activation 'gelu'"),
    "a gain that is none": (lambda t: spoiled(t, gain=True), "gain must not be True"),
    "a gain that is text": (lambda t: spoiled(t, gain="1"), "gain must not be '1'"),
    "a kind that is no text": (lambda t: spoiled(t, kind=3), "'control' must not be"),
    "facts that are no facts": (lambda t: t.with_info(control=[1]), "'control' must not be"),
    "an activation that is a list": (lambda t: spoiled(t, activation=["relu"]), "activation"),
    "an embedding nobody knows": (lambda t: spoiled(t, embedding="tokens"), "embedding 'tokens'"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_a_wrong_control_task_is_refused_in_one_line(sd3, tmp_path, how):
    spoil, message = BAD[how]
    with pytest.raises(TaskFileError, match=message) as caught:
        save_task(spoil(edges(sd3)), tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_same_holds_for_files_others_wrote(sd3, tmp_path, monkeypatch):
    """What cannot be saved here is written by going round the check, and refused in reading."""
    import diffscaler_core.files as files

    for how, (spoil, message) in BAD.items():
        if how in ("another dtype", "facts that are no facts"):
            continue
        path = tmp_path / "bad.safetensors"
        with monkeypatch.context() as patch:
            patch.setattr(files, "check_in_memory", lambda *a: None)
            save_task(spoil(edges(sd3)), path)
        with pytest.raises(TaskFileError, match=message):
            load_task(path)


def test_scaling_a_task_scales_its_control(model):
    task = edges(model)
    with torch.no_grad(), attach(model, scale_task(task, 0.5)) as a:
        a.set_controls({"edges": Control(Z)})
        close(model(X), reference(model, [(task, Z, 0.5)])(X))
    parts = scale_task(task, 2.0, parts={"shift": 0.0})
    with torch.no_grad(), attach(model, parts.replace(layers={})) as a:
        a.set_controls({"edges": Control(Z)})
        bare = task.replace(layers={})
        close(model(X), reference(model, [(bare, Z, (2.0, 0.0, 2.0))])(X))


def test_combining_leaves_control_tasks_alone(sd3):
    with pytest.raises(DiffScalerError, match="control task cannot be combined"):
        combine_tasks([edges(sd3), plain(sd3)])
    alone = combine_tasks([edges(sd3)], [0.5])
    with torch.no_grad(), attach(sd3, {"edges": alone}) as a:
        a.set_controls({"edges": Control(Z)})
        close(sd3(X), reference(sd3, [(edges(sd3), Z, 0.5)])(X))


def test_casting_casts_the_control(sd3):
    low = cast_task(edges(sd3), torch.bfloat16)
    assert {t.dtype for t in low.tensors} == {torch.bfloat16}


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
