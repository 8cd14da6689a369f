"""Names, strengths, rows, copies: on SD3, where one architecture will do."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from torch import Tensor

from diffscaler_core import DiffScalerError, MismatchError, UnknownNameError, new_task
from diffscaler_core import pipelines as plugin
from diffscaler_core.plugin.call import Call


def outputs(model: Any, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "hidden_states": (4, 8, 8),
        "encoder_hidden_states": (5, 16),
        "pooled_projections": (12,),
    }
    inputs = {k: torch.randn(1, *s, generator=generator) for k, s in shapes.items()}
    inputs = {k: t.repeat(batch, *(1,) * (t.ndim - 1)) for k, t in inputs.items()}
    with torch.no_grad():
        return model(**inputs, timestep=torch.ones(batch) * 500, return_dict=False)[0]


@pytest.fixture
def pipe(sd3_case: Any) -> Any:
    pipe = sd3_case.pipe()
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    pipe.load_diffscaler(sd3_case.task(pipe, "b", 2))
    return pipe


def test_importing_twice_changes_nothing() -> None:
    before = {n: f for n, f in vars(DiffusionPipeline).items() if "diffscaler" in n}
    plugin.add_methods(plugin.load_diffscaler, plugin.set_diffscaler)
    assert {n: f for n, f in vars(DiffusionPipeline).items() if "diffscaler" in n} == before
    assert len(before) >= 12


def test_a_method_somebody_else_defined_is_not_overwritten() -> None:
    def from_pretrained() -> None: ...

    from_pretrained.__module__ = "diffscaler_core.pipelines"
    there = DiffusionPipeline.from_pretrained
    with pytest.raises(DiffScalerError, match="exists already, from diffusers"):
        plugin.add_methods(from_pretrained)
    assert DiffusionPipeline.from_pretrained == there


def test_the_newest_task_is_active_alone_as_with_lora(pipe: Any) -> None:
    assert pipe.get_list_diffscalers() == {"transformer": ["a", "b"]}
    assert pipe.get_active_diffscalers() == ["b"]
    pipe.set_diffscaler("a")
    only_a = outputs(pipe.transformer)
    pipe.set_diffscaler(["b", "a"], [0.0, 1.0])
    torch.testing.assert_close(outputs(pipe.transformer), only_a)
    assert pipe.get_active_diffscalers() == ["b", "a"]


def test_stacked_tasks_equal_the_formula(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    name, x = "transformer.transformer_blocks.0.ff.net.2", torch.randn(2, 3, layer.in_features)
    y = layer(x)
    tasks = {n: sd3_case.task(pipe, n, seed) for n, seed in (("a", 1), ("b", 2))}
    expected = y
    for task, weight in ((tasks["a"], 0.7), (tasks["b"], -0.3)):
        t = task.layers[name]
        unbiased = y - layer.bias
        hidden = torch.clamp(torch.einsum("bnd,rd->bnr", x, t["down"]), min=0)
        delta = t["scale"] * unbiased + t["shift"] + torch.einsum("bnr,or->bno", hidden, t["up"])
        expected = expected + weight * delta
    for task in tasks.values():
        pipe.load_diffscaler(task)
    pipe.set_diffscaler(["a", "b"], [0.7, -0.3])
    torch.testing.assert_close(layer(x), expected)


def test_strengths_per_part_and_per_component(pipe: Any) -> None:
    pipe.set_diffscaler("a", {"scale": 0.5, "shift": 0.5, "subspace": 0.5})
    per_part = outputs(pipe.transformer)
    pipe.set_diffscaler("a", {"transformer": 0.5, "transformer_2": 3.0})
    assert torch.equal(outputs(pipe.transformer), per_part)
    pipe.set_diffscaler("a", [0.5])
    assert torch.equal(outputs(pipe.transformer), per_part)
    pipe.set_diffscaler("a", {"shift": 0.0})
    assert not torch.equal(outputs(pipe.transformer), per_part)
    with pytest.raises(UnknownNameError, match="'colour'"):
        pipe.set_diffscaler("a", {"colour": 1.0})
    with pytest.raises(DiffScalerError, match="finite"):
        pipe.set_diffscaler("b", {"shift": float("nan")})
    assert pipe.get_active_diffscalers() == ["a"]


def test_errors_are_those_that_lora_users_know(pipe: Any, sd3_case: Any) -> None:
    kept = outputs(pipe.transformer)
    with pytest.raises(ValueError, match=r"Adapter name a already in use in the model"):
        pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    with pytest.raises(ValueError, match=r"Adapter name\(s\) \{'c'\} not in the list of present"):
        pipe.set_diffscaler(["a", "c"])
    with pytest.raises(ValueError, match=r"Length of adapter names 2 is not equal to .* weights 1"):
        pipe.set_diffscaler(["a", "b"], [1.0])
    with pytest.raises(ValueError, match=r"not in the list"):
        pipe.delete_diffscaler("c")
    with (
        pytest.raises(ValueError, match=r"not in the list"),
        pipe.diffscaler_rows(["a", {"c": 0.5}]),
    ):
        pass
    with pytest.raises(DiffScalerError, match="say which"):
        pipe.save_diffscaler("nowhere")
    assert torch.equal(outputs(pipe.transformer), kept)


def test_a_task_of_another_model_leaves_the_pipeline_as_it_was(pipe: Any, make_noisy: Any) -> None:
    kept, model = outputs(pipe.transformer), torch.nn.Sequential(torch.nn.Linear(3, 3))
    alien = make_noisy(new_task(model, targets="all", name="alien"), 1)
    with pytest.raises(MismatchError, match="does not fit this SD3Transformer2DModel"):
        pipe.load_diffscaler(alien)
    for_a_unet = new_task(model, targets="all", name="unet task", component="unet")
    with pytest.raises(MismatchError, match="adapts unet, but this StableDiffusion3Pipeline has"):
        pipe.load_diffscaler(for_a_unet)
    assert pipe.get_active_diffscalers() == ["b"]
    assert torch.equal(outputs(pipe.transformer), kept)


def test_one_misfitting_component_leaves_the_other_without_the_task(sd3_case: Any) -> None:
    class TwoModels(StableDiffusion3Pipeline):
        transformer_2: Any = None

    pipe = sd3_case.pipe()
    pipe.__class__ = TwoModels
    object.__setattr__(pipe, "transformer_2", torch.nn.Linear(3, 3))
    both = sd3_case.task(pipe, "both", 1)
    both = both.replace(
        layers={**both.layers, "transformer_2.block.0": {"scale": torch.ones(3)}},
    )
    with pytest.raises(MismatchError, match="this Linear"):
        pipe.load_diffscaler(both)
    assert pipe.get_list_diffscalers() == {}
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def test_a_file_for_one_of_two_denoisers_says_so(
    sd3_case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = sd3_case.pipe()
    object.__setattr__(pipe, "transformer_2", copy.deepcopy(pipe.transformer))
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    assert "adapts only transformer; the pipeline's transformer_2 runs without it" in caplog.text
    assert pipe.get_list_diffscalers() == {"transformer": ["a"]}


def test_both_denoisers_of_a_pipeline_carry_their_own_part(sd3_case: Any, tmp_path: Path) -> None:
    pipe = sd3_case.pipe()
    object.__setattr__(pipe, "transformer_2", copy.deepcopy(pipe.transformer))
    one, two = sd3_case.task(pipe, "a", 1), sd3_case.task(pipe, "a", 2)
    layers = {n.replace("transformer.", "transformer_2.", 1): t for n, t in two.layers.items()}
    pipe.load_diffscaler(one.replace(layers={**one.layers, **layers}))
    assert pipe.get_list_diffscalers() == {"transformer": ["a"], "transformer_2": ["a"]}
    first, second = outputs(pipe.transformer), outputs(pipe.transformer_2)
    assert not torch.equal(first, second)
    pipe.set_diffscaler("a", {"transformer_2": 0.0})
    assert torch.equal(outputs(pipe.transformer), first)
    assert torch.equal(outputs(pipe.transformer_2), outputs(sd3_case.pipe().transformer))
    pipe.save_diffscaler(tmp_path, "a")
    pipe.unload_diffscaler()
    pipe.load_diffscaler(tmp_path)
    assert torch.equal(outputs(pipe.transformer_2), second)


def test_a_mapping_and_a_task_are_loaded_as_copies(sd3_case: Any) -> None:
    pipe, task = sd3_case.pipe(), sd3_case.task(sd3_case.pipe(), "a", 1)
    tensors = {f"{n}.{k}": t for n, own in task.layers.items() for k, t in own.items()}
    pipe.load_diffscaler({**tensors, "config": dict(task.info)}, "from_mapping")
    expected = outputs(pipe.transformer)
    pipe.load_diffscaler(task)
    assert torch.equal(outputs(pipe.transformer), expected)
    for parameter in plugin.attachments(pipe)["transformer"].parameters():
        parameter.data.zero_()
    assert all(bool(t.any()) for t in tensors.values())
    with pytest.raises(DiffScalerError, match="'config'"):
        pipe.load_diffscaler(tensors, "no_facts")


def test_deleting_leaves_the_other_task_as_it_is(pipe: Any) -> None:
    pipe.set_diffscaler("a", 0.5)
    kept = outputs(pipe.transformer)
    pipe.delete_diffscaler("b")
    assert pipe.get_list_diffscalers() == {"transformer": ["a"]}
    assert torch.equal(outputs(pipe.transformer), kept)
    pipe.delete_diffscaler(["a"])
    assert pipe.get_list_diffscalers() == {}
    pipe.unload_diffscaler()  # nothing is loaded: nothing happens


def test_a_mixed_row_equals_the_same_mix_for_the_whole_batch(pipe: Any) -> None:
    pipe.set_diffscaler(["a", "b"], [0.25, {"scale": 1.0, "shift": 0.0, "subspace": 0.5}])
    mixed = outputs(pipe.transformer)
    row = {"a": 0.25, "b": {"scale": 1.0, "shift": 0.0, "subspace": 0.5}}
    with pipe.diffscaler_rows([None, row]):
        rows = outputs(pipe.transformer)
    torch.testing.assert_close(rows[1], mixed[1])
    pipe.disable_diffscaler()
    assert torch.equal(rows[0], outputs(pipe.transformer)[0])


def test_rows_end_with_their_context_also_after_an_error(pipe: Any, sd3_case: Any) -> None:
    before = outputs(pipe.transformer)
    with pytest.raises(DiffScalerError, match="batch of 3"), pipe.diffscaler_rows(["a", None]):
        outputs(pipe.transformer, 3)
    assert torch.equal(outputs(pipe.transformer), before)
    with pipe.diffscaler_rows(["a", None]):
        outer = outputs(pipe.transformer)
        with pipe.diffscaler_rows([None, None]):
            inner = outputs(pipe.transformer)
        assert torch.equal(outputs(pipe.transformer), outer)
    pipe.disable_diffscaler()
    assert torch.equal(inner, outputs(pipe.transformer))


def test_rows_that_do_not_fit_the_prompts_fail_loudly(pipe: Any, sd3_case: Any) -> None:
    with (
        pytest.raises(DiffScalerError, match="got 1 rows, but the pipeline runs 2 prompts"),
        pipe.diffscaler_rows(["a"]),
    ):
        sd3_case.run(pipe, 2)
    with pytest.raises(DiffScalerError, match="batch of 4"), pipe.diffscaler_rows(["a", None]):
        outputs(pipe.transformer, 4)  # no pipeline: is it guidance, or two images each?
    with pipe.diffscaler_rows(["a", None], num_images_per_prompt=2):
        images = outputs(pipe.transformer, 4)
    with pipe.diffscaler_rows(["a", None], num_images_per_prompt=1):
        halves = outputs(pipe.transformer, 4)
    assert torch.equal(images[0], images[1])
    assert torch.equal(halves[0], halves[2])
    assert not torch.equal(halves[0], halves[1])


def test_the_batch_is_counted_whatever_the_model_calls_its_latents() -> None:
    latents, model = torch.zeros(3, 4, 8, 8), torch.nn.Identity()
    assert Call(model, (), {"hidden_states": latents}).batch == 3
    assert Call(model, (), {"sample": latents}).batch == 3
    assert Call(model, (list(latents), 1.0), {}).batch == 3  # Z-Image: a list of samples
    with pytest.raises(DiffScalerError, match="no hidden_states, sample, x"):
        _ = Call(model, (), {"pixels": latents}).batch


def test_rows_are_folded_once_per_call_not_once_per_step(
    pipe: Any, sd3_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment, calls = plugin.attachments(pipe)["transformer"], []
    monkeypatch.setattr(
        type(attachment), "set_rows", lambda self, rows: calls.append(rows), raising=True
    )
    with pipe.diffscaler_rows(["a", None]):
        sd3_case.run(pipe, 2)
    assert [rows for rows in calls if rows] == [[{"a": 1.0}, {}] * 2]


def test_pipelines_that_share_a_model_share_its_tasks(pipe: Any, sd3_case: Any) -> None:
    other = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    assert other.get_list_diffscalers() == {"transformer": ["a", "b"]}
    other.set_diffscaler("a", 0.5)
    assert pipe.get_active_diffscalers() == ["a"]
    third = StableDiffusion3Pipeline(**pipe.components)
    assert torch.equal(sd3_case.run(third), sd3_case.run(pipe))
    with third.diffscaler_rows(["a", None]):
        rows = sd3_case.run(third)
    with third.diffscaler_rows(["a", None]):
        assert torch.equal(sd3_case.run(pipe), rows)


@pytest.mark.parametrize("copied", ["model", "pipeline", "pickle"])
def test_a_copy_has_its_own_tasks(pipe: Any, copied: str) -> None:
    if copied == "pipeline":
        other = copy.deepcopy(pipe)
    else:
        duplicate = copy.deepcopy if copied == "model" else lambda m: pickle.loads(pickle.dumps(m))
        parts = {**pipe.components, "transformer": duplicate(pipe.transformer)}
        other = StableDiffusion3Pipeline(**parts)
    expected = outputs(pipe.transformer)
    assert torch.equal(outputs(other.transformer), expected)
    other.set_diffscaler("a")
    changed = outputs(other.transformer)
    assert not torch.equal(changed, expected)
    with other.diffscaler_rows(["a", None]):
        torch.testing.assert_close(outputs(other.transformer)[0], changed[0])
    pipe.unload_diffscaler()
    assert torch.equal(outputs(other.transformer), changed)
    other.delete_diffscaler("b")  # attaches anew, from the copy's own tensors
    assert torch.equal(outputs(other.transformer), changed)
    other.unload_diffscaler()
    assert torch.equal(outputs(other.transformer), outputs(pipe.transformer))


def test_saving_the_pipeline_saves_a_clean_base(pipe: Any, tmp_path: Path) -> None:
    pipe.transformer.save_pretrained(tmp_path)
    clean = type(pipe.transformer).from_pretrained(tmp_path).eval()
    pipe.unload_diffscaler()
    assert torch.equal(outputs(clean), outputs(pipe.transformer))


def test_fused_qkv_projections_are_detected(sd3_case: Any) -> None:
    pipe = sd3_case.pipe()
    task = sd3_case.task(pipe, "a", 1)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(DiffScalerError, match="unfuse_qkv_projections"):
        pipe.load_diffscaler(task)
    pipe.transformer.unfuse_qkv_projections()
    pipe.load_diffscaler(task)


def test_projections_fused_after_loading_are_detected_too(pipe: Any) -> None:
    expected = outputs(pipe.transformer)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(DiffScalerError, match="unfuse_qkv_projections"):
        outputs(pipe.transformer)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(outputs(pipe.transformer), expected)


def test_a_task_without_layers_can_be_loaded(sd3_case: Any, tmp_path: Path) -> None:
    pipe = sd3_case.pipe()
    before = outputs(pipe.transformer)
    prompts = new_task(pipe.transformer, "prompts", name="word").with_info(prompts=["cat"])
    conditioning = {"context": torch.randn(1, 5, 16), "pooled": torch.randn(1, 12)}
    pipe.load_diffscaler(prompts.replace(conditioning=conditioning))
    pipe.load_diffscaler(sd3_case.task(pipe, "a", 1))
    pipe.set_diffscaler("word")
    assert torch.equal(outputs(pipe.transformer), before)
    pipe.save_diffscaler(tmp_path, "word")
    pipe.unload_diffscaler()
    pipe.load_diffscaler(tmp_path)
    assert pipe.get_list_diffscalers() == {"transformer": ["word"]}
