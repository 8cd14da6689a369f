import itertools

import pytest
import torch

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    attach,
    combine_tasks,
    load_task,
    new_task,
    save_task,
)
from diffscaler_core.average import average_tasks
from diffscaler_core.resize import resize_task

from .conftest import filled, reference_task


def linear(model, seed=0, rank=6, **options):
    return filled(new_task(model, "lora", rank, targets="all", **options), seed)


def product(own):
    return own["up"] @ own["down"].flatten(1)


def test_a_smaller_identity_task_is_the_nearest_and_the_error_is_exact(model):
    task = linear(model)
    resized = resize_task(task, 2)
    assert resized.is_exact
    for layer, own in resized.task.layers.items():
        whole = product(task.layers[layer])
        best = torch.linalg.svdvals(whole)[2:].norm() / whole.norm()
        lost = (whole - product(own)).norm() / whole.norm()
        assert own["down"].shape[0] == 2
        assert own["down"].shape[1:] == task.layers[layer]["down"].shape[1:]
        assert float(lost) == pytest.approx(float(best), rel=1e-3)
        assert resized.errors[layer] == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("method", ["diffscaler", "lora"])
def test_growing_changes_nothing_and_leaves_room_to_learn(model, x, method):
    task = filled(new_task(model, method, 2), 1)
    grown = resize_task(task, 5)
    assert grown.worst == 0
    with attach(model, task), torch.no_grad():
        wanted = model(x)
    with attach(model, grown.task) as on:
        assert torch.allclose(model(x), wanted, atol=1e-5)
        on.requires_grad_(True)
        model(x).square().sum().backward()
        up = on.parameters_of("task")["transformer.transformer_blocks.0.ff.0.up"]
        assert bool((up.grad[:, 2:] != 0).any())
    for own in grown.task.layers.values():
        assert len(own["down"]) == 5
        assert not own["up"][:, 2:].any()
        assert bool((own["down"][2:] != 0).any())


def test_relu_units_are_dropped_by_what_they_can_do(model, x):
    task = filled(new_task(model, rank=4, targets=["ff.0"]), 2)
    layers = {}
    for layer, own in task.layers.items():
        up, down = own["up"].clone(), own["down"].clone()
        up[:, 1] = 0  # nothing comes out
        down[3] = 0  # nothing goes in
        up[:, 2] *= 1e-3
        layers[layer] = {**own, "up": up, "down": down}
    task = task.replace(layers=layers)
    three = resize_task(task, 3)
    assert not three.is_exact
    assert three.worst == 0
    assert all(len(own["down"]) == 2 for own in three.task.layers.values())  # two did nothing
    with attach(model, task), attach(model.__class__(), new_task(model, "scale_shift")):
        wanted = model(x)
    with attach(model, three.task):
        assert torch.allclose(model(x), wanted, atol=1e-6)
    one = resize_task(task, 1).task
    for layer, own in one.layers.items():
        assert torch.equal(own["down"], layers[layer]["down"][:1])


def test_energy_keeps_as_few_as_hold_the_share(model):
    task = linear(model)
    kept = resize_task(task, energy=0.9)
    assert kept.worst <= 0.1**0.5
    for layer, own in kept.task.layers.items():
        values = torch.linalg.svdvals(product(task.layers[layer])).square()
        count = len(own["down"])
        assert float(values[:count].sum() / values.sum()) >= 0.9 - 1e-6
        assert float(values[: count - 1].sum() / values.sum()) < 0.9
    assert resize_task(task, 3, energy=0.9999).task.info["ranks"]["default"] == 3


def test_resized_tasks_are_files_like_any_other(model, tmp_path):
    task = load_task(save_task(linear(model).with_info(name="t"), tmp_path / "t.safetensors"))
    resized = resize_task(task, 2).task
    again = load_task(save_task(resized, tmp_path / "small.safetensors"))
    assert again.info["ranks"] == {"default": 2}
    assert again.nbytes < task.nbytes


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "which rank"), ({"rank": 0}, "at least 1"), ({"energy": 1.5}, "share above 0")],
)
def test_ranks_that_cannot_be_meant_are_refused(model, settings, said):
    with pytest.raises(DiffScalerError, match=said):
        resize_task(linear(model), **settings)
    with pytest.raises(DiffScalerError, match="no subspace"):
        resize_task(new_task(model, "bitfit"), 2)


def checkpoints(model, count=3, **options):
    """Tasks that lie near each other, as those of one run do."""
    start = filled(new_task(model, rank=3, **options), 0)
    tasks = []
    for seed in range(count):
        step = filled(start, seed + 1, size=0.05)
        layers = {
            layer: {n: t + step.layers[layer][n] for n, t in own.items()}
            for layer, own in start.layers.items()
        }
        tasks.append(start.replace(layers=layers).with_info(name=f"step{seed}"))
    return tasks


def test_an_average_is_the_mean_of_every_parameter(model):
    tasks = checkpoints(model)
    mean = average_tasks(tasks, [1, 1, 2], name="mean")
    for layer, own in mean.layers.items():
        for part, tensor in own.items():
            one, two, three = (task.layers[layer][part] for task in tasks)
            assert torch.allclose(tensor, one / 4 + two / 4 + three / 2, atol=1e-7)
    assert mean.name == "mean"
    assert [one["weight"] for one in mean.info["averaged_from"]] == [0.25, 0.25, 0.5]
    same = average_tasks([tasks[0]] * 3)
    for layer, own in same.layers.items():
        assert all(torch.equal(t, tasks[0].layers[layer][n]) for n, t in own.items())


def test_averages_of_what_means_something_else_are_refused(model):
    tasks = checkpoints(model, 2)
    with pytest.raises(MismatchError, match="no checkpoints of one run"):
        average_tasks([tasks[0], filled(tasks[0], 77)])
    with pytest.raises(MismatchError, match="activation"):
        average_tasks([tasks[0], tasks[1].with_info(activation="identity")])
    with pytest.raises(MismatchError, match=r"differ in .* tensors"):
        average_tasks([tasks[0], filled(new_task(model, rank=2), 0)])
    with pytest.raises(DiffScalerError, match="two tasks or more"):
        average_tasks(tasks[:1])
    for weights in ([1.0], [1.0, -1.0]):
        with pytest.raises(DiffScalerError, match="weights"):
            average_tasks(tasks, weights)


def test_products_of_different_runs_average_by_combine_and_resize(model, x):
    tasks = [linear(model, seed, rank=2) for seed in (1, 2)]
    mean = resize_task(combine_tasks(tasks, [0.5, 0.5]), 4)
    assert mean.worst < 1e-3
    with attach(model, mean.task):
        assert torch.allclose(model(x), reference_task(model, tasks, [0.5, 0.5])(x), atol=1e-5)
    for (layer, own), other in itertools.product(mean.task.layers.items(), tasks[:1]):
        wanted = sum(0.5 * product(task.layers[layer]) for task in tasks)
        assert torch.allclose(product(own), wanted, atol=1e-5), other.name
