from __future__ import annotations

import pytest
import torch

from diffscaler_core import DiffScalerError, TaskAdapter, UnknownNameError, attach, combine_tasks
from diffscaler_core import scale_task as scaled
from diffscaler_core.layouts import fuse_rows, slice_rows, swap_halves

from .conftest import reference_task


def run(model, x, tasks, weights=None):
    with attach(model, tasks, weights):
        return model(x)


def close(a, b):
    return (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize(
    "facts",
    [
        ({}, {}),
        ({"activation": "identity"}, {"activation": "identity", "gain": 2.0}),
        ({"gain": 0.5}, {"activation": "identity", "gain": 3.0}),
    ],
)
def test_a_combined_task_does_what_the_stack_does(model, x, make, facts):
    tasks = [make(i, targets="all", info=own) for i, own in enumerate(facts)]
    tasks.append(make(2, method="bitfit", targets=["to_q", "embed"]))
    weights = [0.7, -0.4, 1.3]
    one = combine_tasks(tasks, weights)
    assert close(run(model, x, one), reference_task(model, tasks, weights)(x))
    assert one.name == "task0+task1+task2"
    assert [c["weight"] for c in one.info["combined_from"]] == weights


def test_relu_and_identity_meet_at_twice_the_identitys_rank(make):
    relu, identity = make(0, rank=3), make(1, rank=2, info={"activation": "identity"})
    one = combine_tasks([relu, identity])
    assert {len(t["down"]) for t in one.layers.values()} == {3 + 2 * 2}
    assert one.info["activation"] == "relu"
    assert combine_tasks([identity, identity]).info["activation"] == "identity"


def test_a_task_without_subspace_does_not_decide_the_activation(model, x, make):
    shift, lora = make(0, method="bitfit"), make(1, method="lora")
    one = combine_tasks([shift, lora])
    assert one.info["activation"] == "identity"
    assert close(run(model, x, one), reference_task(model, [shift, lora], [1, 1])(x))


def test_difffit_combines_only_with_its_like(model, x, make):
    one, two, plain = make(0, method="difffit"), make(1, method="difffit"), make(2)
    both = combine_tasks([one, two], [0.5, 2.0])
    assert close(run(model, x, both), reference_task(model, [one, two], [0.5, 2.0])(x))
    with pytest.raises(DiffScalerError, match="stack them instead"):
        combine_tasks([one, plain])
    unscaled = one.replace(
        layers={n: {"shift": t["shift"]} for n, t in one.layers.items() if "shift" in t}
    )  # flag, but no scale
    mixed = combine_tasks([unscaled, plain])
    assert close(run(model, x, mixed), reference_task(model, [unscaled, plain], [1, 1])(x))


def test_one_task_at_strength_one_stays_bit_for_bit(make):
    task = make(0)
    one = combine_tasks([task])
    assert all(
        torch.equal(t, task.layers[n][k]) for n, own in one.layers.items() for k, t in own.items()
    )
    half = task.replace(
        layers={n: {k: t.bfloat16() for k, t in own.items()} for n, own in task.layers.items()}
    )
    assert {t.dtype for t in combine_tasks([half]).tensors} == {torch.bfloat16}


def test_the_combined_base_says_what_it_covers(make):
    first, second = make(0, targets=["to_q"]), make(1, targets=["to_q", "to_out.0"])
    same = combine_tasks([first, first.with_info(name="again")])
    assert same.info["base"] == first.info["base"]
    base = combine_tasks([first, second]).info["base"]
    assert base["targets"] == 4
    assert "fingerprint" not in base


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"scale": (4,)}, "other shapes at 'transformer.a'"),
        ({"scale": (1,)}, "other shapes"),
        ({"shift": (4,)}, "other shapes"),
        ({"down": (2, 5), "up": (8, 2)}, "other shapes"),
        ({"down": (2, 6, 1, 1), "up": (8, 2)}, "other shapes"),
        ({"down": (2, 6), "up": (4, 2)}, "other shapes"),
    ],
)
def test_tasks_of_other_shapes_are_refused(other, message):
    own = {"scale": (8,), "down": (3, 6), "up": (8, 3)}

    def task(shapes):
        return TaskAdapter({"transformer.a": {k: torch.ones(s) for k, s in shapes.items()}})

    with pytest.raises(DiffScalerError, match=message) as caught:
        combine_tasks([task(own), task(other)])
    assert "\n" not in str(caught.value)


def test_tasks_of_other_bases_are_refused_and_unknown_bases_are_not(make):
    def of(family):
        return make(0, info={"base": {"family": family}})

    with pytest.raises(DiffScalerError, match=r"\['flux', 'sd3'\]"):
        combine_tasks([of("sd3"), of("flux")])
    assert combine_tasks([of("unknown"), of("sd3")]).info["base"]["family"] == "sd3"


def test_wrong_counts_and_control_tasks_are_refused(make):
    task = make(0)
    for arguments in (([],), ([task], [1.0, 2.0])):
        with pytest.raises(DiffScalerError, match="need as many"):
            combine_tasks(*arguments)
    control = task.replace(extras={"control.transformer.embed.scale": torch.ones(2)})
    assert combine_tasks([control]).extras.keys() == control.extras.keys()
    with pytest.raises(DiffScalerError, match="control task"):
        combine_tasks([control, task])


def stored(names, length=3, dtype=torch.float32, fill=0.0):
    context = torch.full((len(names), length, 4), fill, dtype=dtype)
    info = {"name": names[0], "method": "prompts", "prompts": list(names)}
    return TaskAdapter({}, info, {"context": context})


def test_prompts_are_merged_by_name_where_they_fit():
    one, two = stored(["a", "b"], fill=1.0), stored(["b", "c"], fill=2.0)
    merged = combine_tasks([one, two])
    assert merged.prompts == ("a", "b", "c")
    assert [float(merged.prompt(n)[0].mean()) for n in "abc"] == [1.0, 1.0, 2.0]
    longer = combine_tasks([one, stored(["d"], length=5)])
    assert longer.prompts == ("a", "b")
    half = combine_tasks([stored(["a"], dtype=torch.bfloat16)])
    assert half.conditioning["context"].dtype == torch.bfloat16


def test_scaling_a_task_is_its_strength(model, x, make):
    task = make(0)
    assert close(run(model, x, scaled(task, 0.3)), run(model, x, task, 0.3))
    assert torch.equal(run(model, x, scaled(task, 0.0)), model(x))
    parts = {"scale": 0.5, "shift": 0.0, "subspace": -2.0}
    assert close(run(model, x, scaled(task, parts=parts)), run(model, x, {"t": task}, {"t": parts}))


def test_scaling_by_layers_takes_the_first_pattern_that_matches(model, x, make):
    task = make(0)
    weaker = scaled(task, 2.0, layers={r"transformer_blocks\.0\..*": 0.0, "to_q": 0.5})
    for name, own in weaker.layers.items():
        factor = 0.0 if "transformer_blocks.0." in name else 1.0 if name.endswith("to_q") else 2.0
        assert torch.equal(own["up"], task.layers[name]["up"] * factor), name
        assert torch.equal(own["down"], task.layers[name]["down"])
    with pytest.raises(DiffScalerError, match="'to_k' matches none of the 8 layers"):
        scaled(task, layers={"to_k": 1.0})
    with pytest.raises(UnknownNameError, match="unknown part 'rank'"):
        scaled(task, parts={"rank": 1.0})


def random_affiner(rows, columns, rank, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"scale": (rows,), "shift": (rows,), "down": (rank, columns), "up": (rows, rank)}
    return {k: torch.randn(s, generator=g).to(dtype) for k, s in shapes.items()}


def effect(t, x, y):
    """Δ(x, y) of one affiner, relu, for a layer without bias."""
    return t["scale"] * y + t["shift"] + torch.relu(x @ t["down"].T) @ t["up"].T


def test_fused_rows_do_what_the_parts_do_on_the_big_matrix():
    x, weight = torch.randn(5, 6), torch.randn(3 * 4, 6)
    parts = [random_affiner(4, 6, rank, rank) for rank in (1, 2, 3)]
    y = x @ weight.T
    fused = fuse_rows([(0, parts[0]), (4, parts[1]), (8, parts[2])], 12)
    assert fused["down"].shape == (6, 6)
    wanted = torch.cat([effect(t, x, y[:, 4 * i : 4 * i + 4]) for i, t in enumerate(parts)], dim=1)
    torch.testing.assert_close(effect(fused, x, y), wanted)


def test_rows_that_nobody_fills_stay_the_base():
    x, y = torch.randn(5, 6), torch.randn(5, 12)
    fused = fuse_rows([(4, random_affiner(4, 6, 2, 0))], 12)
    changed = effect(fused, x, y).any(dim=0)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    only_shift = fuse_rows([(0, {"shift": torch.ones(4)})], 8)
    assert only_shift.keys() == {"shift"}


def test_fusing_keeps_the_wider_dtype():
    low = random_affiner(4, 6, 2, 0, torch.bfloat16)
    high = random_affiner(4, 6, 2, 1)
    fused = fuse_rows([(0, low), (4, high)], 8)
    assert torch.equal(fused["scale"][4:], high["scale"])
    assert torch.equal(fused["up"][4:, 2:], high["up"])


def test_sliced_rows_are_the_rows_of_the_whole():
    x, y = torch.randn(5, 6), torch.randn(5, 12)
    whole = random_affiner(12, 6, 3, 0)
    for start in (0, 4, 8):
        part = effect(slice_rows(whole, start, 4), x, y[:, start : start + 4])
        torch.testing.assert_close(part, effect(whole, x, y)[:, start : start + 4])


def test_swapped_halves_follow_the_swapped_weight():
    x, y = torch.randn(5, 6), torch.randn(5, 8)
    whole = random_affiner(8, 6, 3, 0)
    permutation = torch.eye(8).roll(4, 0)
    got = effect(swap_halves(whole), x, y @ permutation.T)
    torch.testing.assert_close(got, effect(whole, x, y) @ permutation.T)
    twice = swap_halves(swap_halves(whole))
    assert all(torch.equal(t, whole[k]) for k, t in twice.items())
