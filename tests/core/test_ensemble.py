"""What the stacks of a model share: arrangements, their bytes, and tasks that come and go."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo

from diffscaler_core import DiffScalerError, MismatchError, attach, new_task
from diffscaler_core import ensemble as ensemble_module

from .conftest import filled, hooks_of, reference_task
from .test_compile import Counting


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture
def tasks(model):
    ranks = (2, 4, 3, 1)
    made = {n: new_task(model, rank=r, name=n) for n, r in zip("abcd", ranks, strict=True)}
    return {n: filled(task, i) for i, (n, task) in enumerate(made.items())}


def wanted(model, tasks, mix):
    return reference_task(model, [tasks[n] for n in mix], list(mix.values()))


MIXES = [
    {"a": 1.0},
    {"b": 0.5, "d": 1.0},
    {},
    {"a": -0.3, "b": 1.0, "c": 2.0},
    {"d": 1.0},
    {"a": 1.0},
]


@torch.no_grad()
def test_any_order_of_strengths_and_rows_gives_the_formula(model, x, tasks):
    base = model(x)
    with attach(model, tasks) as a:
        for round_ in range(2):  # the second time what was laid out is used again
            for i, mix in enumerate(MIXES):
                a.set_weights(mix)
                assert (
                    close(model(x), wanted(model, tasks, mix)(x))
                    if mix
                    else torch.equal(model(x), base)
                )
                rows = [MIXES[(i + j + round_) % len(MIXES)] for j in range(len(x))]
                a.set_rows(rows)
                got = model(x)
                for j, own in enumerate(rows):
                    want = wanted(model, tasks, own)(x)[j] if own else base[j]
                    assert close(got[j], want)
                    assert own or torch.equal(got[j], base[j])


@torch.no_grad()
def test_tasks_of_one_part_or_few_layers_mix_with_whole_ones(model, x):
    methods = {"s": "scale_shift", "b": "bitfit", "l": "lora", "f": "difffit", "w": "diffscaler"}
    tasks = {
        n: filled(new_task(model, m, 2, name=n), i) for i, (n, m) in enumerate(methods.items())
    }
    tasks["one"] = filled(new_task(model, targets=["transformer_blocks.1.ff.0"], name="one"), 9)
    with attach(model, tasks) as a:
        for names in (["s", "b", "l"], ["f", "w", "one"], ["one", None, "l"], ["b", "b", "b"]):
            a.set_rows(names)
            got = model(x)
            for i, name in enumerate(names):
                mix = {name: 1.0} if name else {}
                assert close(got[i], wanted(model, tasks, mix)(x)[i])
        a.set_weights({"s": 0.5, "l": 1.0, "f": -1.0})
        assert close(model(x), wanted(model, tasks, {"s": 0.5, "l": 1.0, "f": -1.0})(x))


@torch.no_grad()
def test_a_task_alone_shares_its_own_tensors(model, x, tasks):
    with attach(model, tasks) as a:
        a.set_weights({"b": 1.0})
        model(x)
        vectors = 5 * a._ensemble._vectors.channels * 4  # gain, offset; a, b and -a b̂
        masks = 4 * 4
        assert a._ensemble.computed_bytes <= vectors + masks


@torch.no_grad()
def test_switching_among_many_keeps_a_bounded_number_of_bytes(model, x, tasks, monkeypatch):
    monkeypatch.setattr(ensemble_module, "_KEPT_BYTES", 20_000)
    with attach(model, tasks) as a:
        held = []
        for i in range(60):
            names = ["a", "b", "c", "d"]
            a.set_rows([names[i % 4], names[(i * 7 + i // 4) % 4], {"a": 1.0, "c": float(i)}])
            model(x)
            held.append(a._ensemble.computed_bytes)
        assert max(held[20:]) <= max(held[:20])


@torch.no_grad()
def test_tasks_come_and_go_without_a_new_attach(model, x, tasks):
    base = model(x)
    a = attach(model, {"a": tasks["a"]})
    hooks = len(hooks_of(model))
    a.add(model, "b", tasks["b"])
    assert a.names == ("a", "b")
    assert a.weights["b"]["scale"] == 0
    assert close(model(x), wanted(model, tasks, {"a": 1.0})(x))
    assert len(hooks_of(model)) == hooks
    a.set_weights({"a": 0.5, "b": 1.0})
    assert close(model(x), wanted(model, tasks, {"a": 0.5, "b": 1.0})(x))
    a.drop("a")
    assert a.names == ("b",)
    assert close(model(x), wanted(model, tasks, {"b": 1.0})(x))
    a.add(model, "c", tasks["c"])  # takes a's place
    a.add(model, "a", tasks["a"])
    a.set_rows(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    got = model(x)
    for i, name in enumerate(("b", "c", "a")):  # columns in the order of names
        assert close(got[i], wanted(model, tasks, {name: 1.0})(x)[i])
    assert torch.equal(a.task("c").tensors[0], tasks["c"].tensors[0])
    a.drop("c")
    got = model(x)
    assert torch.equal(got[1], base[1])
    assert close(got[2], wanted(model, tasks, {"a": 1.0})(x)[2])
    a.drop("a")
    a.drop("b")
    assert hooks_of(model) == []
    assert torch.equal(model(x), base)
    a.add(model, "d", tasks["d"])
    a.set_weights({"d": 1.0})
    assert close(model(x), wanted(model, tasks, {"d": 1.0})(x))
    a.remove()
    assert torch.equal(model(x), base)


def test_a_task_that_cannot_be_added_changes_nothing(model, x, tasks, monkeypatch):
    with attach(model, {"a": tasks["a"]}) as a:
        before, hooks = model(x), len(hooks_of(model))
        with pytest.raises(DiffScalerError, match="attached already"):
            a.add(model, "a", tasks["b"])
        other = new_task(torch.nn.Sequential(torch.nn.Linear(3, 3)), targets="all")
        with pytest.raises(MismatchError):
            a.add(model, "other", other)
        few = filled(new_task(model, targets="all", name="few"), 3)
        monkeypatch.setattr(type(a), "_put_in_force", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            a.add(model, "few", few)
        monkeypatch.undo()
        assert a.names == ("a",)
        assert len(hooks_of(model)) == hooks
        assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_layer_only_the_new_task_has_is_hooked_and_let_go(model, x, tasks):
    few = filled(new_task(model, targets=["transformer_blocks.0.ff.0"], name="few"), 1)
    with attach(model, {"few": few}) as a:
        assert len(hooks_of(model)) == 1
        a.add(model, "a", tasks["a"])
        assert len(hooks_of(model)) > 1
        a.set_weights(1.0)
        both = {"few": few, **tasks}
        assert close(model(x), wanted(model, both, {"few": 1.0, "a": 1.0})(x))
        a.drop("a")
        assert len(hooks_of(model)) == 1
        assert close(model(x), wanted(model, both, {"few": 1.0})(x))


@torch.no_grad()
def test_copies_of_a_model_that_has_run_are_independent(model, x, tasks):
    with attach(model, tasks) as a:
        a.set_rows(["a", "b", {"c": 1.0, "d": 0.5}])
        now = model(x)
        copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        a.set_weights(0.0)
        assert torch.equal(copied(x), now)
        assert torch.equal(unpickled(x), now)
        assert not torch.equal(model(x), now)


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 12])
def test_compiled_code_sees_every_switch_and_routing_without_a_new_graph(model, x, count):
    torch._dynamo.reset()
    names = [f"t{i}" for i in range(count)]
    methods = ("diffscaler", "scale_shift", "lora", "bitfit")
    made = [new_task(model, methods[i % 4], 1 + i % 3, name=n) for i, n in enumerate(names)]
    tasks = {n: filled(task, i) for i, (n, task) in enumerate(zip(names, made, strict=True))}
    base, backend = model(x), Counting()
    with attach(model, tasks) as a:
        a.set_rows([names[0], names[1], names[2]])
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for i in range(20):
            a.set_rows([names[i % count], None, names[(3 * i + 1) % count]])
            got = compiled(x)
            assert torch.equal(got[1], base[1])
            assert close(got, model(x))
        assert backend.graphs == 1
        a.set_rows(None)
        for i in range(20):
            a.set_weights({names[i % count]: 1.0, names[(5 * i + 1) % count]: 0.1 * i})
            assert close(compiled(x), model(x))
        assert backend.graphs == 2  # once for rows, once without
    torch._dynamo.reset()


@torch.no_grad()
def test_a_changed_parameter_reaches_compiled_code_at_the_next_strength(model, x, tasks):
    torch._dynamo.reset()
    backend = Counting()
    with attach(model, {n: tasks[n] for n in "ab"}) as a:
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        for parameter in a.parameters():
            parameter.mul_(0.5)
        a.set_weights({"a": 1.0, "b": 0.7})
        assert close(
            compiled(x), wanted(model, {n: a.task(n) for n in "ab"}, {"a": 1, "b": 0.7})(x)
        )
        assert backend.graphs == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_rows_of_a_convolution_run_no_other_rows_task(model, x):
    tasks = {
        n: filled(new_task(model, rank=2, targets="all", name=n), i) for i, n in enumerate("ab")
    }
    assert "transformer.embed" in tasks["a"].layers
    with attach(model, tasks) as a:
        a.set_rows(["a", "b", "a"])  # every strength is 1, and still not every row runs every task
        got = model(x)
    for i, name in enumerate("aba"):
        assert close(got[i], wanted(model, tasks, {name: 1.0})(x)[i])
