"""Control tasks as facts and files, right and wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffscaler_core import (
    DiffScalerError,
    TaskFileError,
    attach,
    combine_tasks,
    load_task,
    new_task,
    save_task,
)
from diffscaler_core.combine import cast_task, scale_task
from diffscaler_core.control import Control

from .control_models import (
    MODELS,
    SD3Transformer2DModel,
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
