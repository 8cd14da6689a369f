"""Where tasks act: masks of pictures, and what the layers of real models get of them."""

import copy
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffscaler_core import DiffScalerError, UnknownNameError, new_task
from diffscaler_core import pipelines as plugin

BASES = runpy.run_path(str(Path(__file__).with_name("tiny_calls.py")))["BASES"]
ONES, ZEROS = np.ones((8, 8), np.float32), np.zeros((8, 8), np.float32)
LEFT = ONES.copy()
LEFT[:, 4:] = 0
GREY = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


def loaded(case: Any, *names: str) -> Any:
    pipe = case.pipe()
    for seed, name in enumerate(names, start=1):
        pipe.load_diffscaler(case.task(pipe, name, seed), name)
    return pipe


def outputs_of(module: nn.Module, run: Any) -> list[Tensor]:
    """What a layer put out in each call of a run, with whatever tasks did to it."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    run()
    handle.remove()
    return seen


def gates_on(pipe: Any, layer: str, run: Any, masks: Any, name: str = "a") -> Tensor:
    """The factors on a layer's Δ in the first call, read off its outputs: (rows, tokens)."""
    module = pipe.transformer.get_submodule(layer)
    pipe.set_diffscaler(name)
    full = outputs_of(module, run)[0]
    pipe.set_diffscaler(name, masks={name: masks})
    some = outputs_of(module, run)[0]
    pipe.disable_diffscaler()
    base = outputs_of(module, run)[0]
    pipe.enable_diffscaler()
    full, some = full - base, some - base
    return ((some * full).sum(-1) / (full * full).sum(-1)).double()


def token_means(mask: np.ndarray, patch: int = 2) -> Tensor:
    """A mask's means over patches, row after row."""
    rows, columns = (side // patch for side in mask.shape)
    cells = mask.astype(np.float64).reshape(rows, patch, columns, patch).mean((1, 3))
    return torch.from_numpy(cells).flatten()


def test_a_mask_of_ones_is_no_mask_and_one_of_zeros_is_the_base(case):
    pipe = case.pipe()
    base = case.run(pipe)
    pipe.load_diffscaler(case.task(pipe, "a", 1), "a")
    full = case.run(pipe)
    pipe.set_diffscaler("a", masks=ONES)
    torch.testing.assert_close(case.run(pipe), full, atol=1e-5, rtol=1e-5)
    pipe.set_diffscaler("a", masks=ZEROS)
    assert torch.equal(case.run(pipe), base)
    pipe.set_diffscaler("a", masks=LEFT)
    some = case.run(pipe)
    assert not torch.allclose(some, base, atol=1e-4)
    assert not torch.allclose(some, full, atol=1e-4)
    pipe.set_diffscaler("a")
    assert torch.equal(case.run(pipe), full)


@pytest.fixture
def first_layers(sd3_case: Any) -> Any:
    """SD3 with a task on layers that no other layer of the task comes before."""
    pipe = sd3_case.pipe()
    for seed, name in enumerate("ab"):
        layers = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "add_q_proj")]
        task = new_task(pipe.transformer, targets=layers, name=name)
        generator = torch.Generator().manual_seed(seed)
        own = {
            layer: {k: torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
            for layer, tensors in task.layers.items()
        }
        pipe.load_diffscaler(task.replace(layers=own), name)
    return pipe


IMAGE, TEXT = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj"


def test_image_tokens_get_the_mask_where_they_are_and_text_its_mean(sd3_case, first_layers):
    def run() -> Any:
        return sd3_case.run(first_layers)

    for mask in (LEFT, GREY):
        image = gates_on(first_layers, IMAGE, run, mask)
        assert image.shape == (4, 16)  # two prompts, guidance
        torch.testing.assert_close(image, token_means(mask).expand(4, -1), atol=1e-5, rtol=0)
        text = gates_on(first_layers, TEXT, run, mask)
        torch.testing.assert_close(text, torch.full_like(text, mask.mean()), atol=1e-5, rtol=0)


def test_masks_of_any_kind_are_cut_as_pictures_are(sd3_case, first_layers):
    def run() -> Any:
        return sd3_case.run(first_layers)

    wide = np.zeros((8, 16), np.uint8)
    wide[:, :8] = 255  # its middle, 8x8, is what is kept
    for mask in (
        wide,
        torch.from_numpy(wide).bool()[None, None],
        Image.fromarray(wide),
        np.repeat(np.repeat(wide, 4, 0), 4, 1),
    ):
        gates = gates_on(first_layers, IMAGE, run, mask)
        # what is resized overshoots a little beside the edge
        torch.testing.assert_close(gates, token_means(LEFT).expand(4, -1), atol=0.1, rtol=0)
    exact = gates_on(first_layers, IMAGE, run, wide)
    torch.testing.assert_close(exact, token_means(LEFT).expand(4, -1), atol=1e-5, rtol=0)


def test_each_prompt_may_have_its_own_mask(sd3_case, first_layers):
    def run() -> Any:
        return sd3_case.run(first_layers, num_images_per_prompt=2)

    gates = gates_on(first_layers, IMAGE, run, [LEFT, None])
    own = [token_means(LEFT)] * 2 + [torch.ones(16).double()] * 2  # pictures, then prompts
    torch.testing.assert_close(gates, torch.stack(own * 2), atol=1e-5, rtol=0)  # then guidance
    first_layers.set_diffscaler("a", masks=[[LEFT, None, GREY]])
    with pytest.raises(DiffScalerError, match="got 3 masks, but the pipeline runs 2 prompts"):
        run()


def test_two_masked_tasks_add_up_each_in_its_place(sd3_case, first_layers):
    pipe, module = first_layers, first_layers.transformer.get_submodule(IMAGE)

    def outputs(*names: str, **options: Any) -> Tensor:
        if names:
            pipe.set_diffscaler(names, **options)
        return outputs_of(module, lambda: sd3_case.run(pipe))[0]

    a, b = outputs("a"), outputs("b")
    both = outputs("a", "b", masks=[LEFT, 1 - LEFT])
    there = token_means(LEFT).bool()[:, None]
    torch.testing.assert_close(both, torch.where(there, a, b), atol=1e-5, rtol=1e-5)
    weighted = outputs("a", "b", weights=[1.0, 0.0], masks={"a": LEFT})
    pipe.disable_diffscaler()
    torch.testing.assert_close(weighted, torch.where(there, a, outputs()), atol=1e-5, rtol=1e-5)


def test_rows_keep_to_the_masks_of_their_tasks(sd3_case):
    pipe = loaded(sd3_case, "a", "b")
    alone = []
    for name, mask, row in (("a", LEFT, 0), ("b", GREY, 1)):
        pipe.set_diffscaler(name, 0.8, masks=mask)
        alone.append(sd3_case.run(pipe)[row])
    pipe.set_diffscaler(["a", "b"], masks={"a": LEFT, "b": GREY})
    with pipe.diffscaler_rows([{"a": 0.8}, {"b": 0.8}]):
        mixed = sd3_case.run(pipe)
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-5, rtol=0)
    pipe.set_diffscaler(["a", "b"], masks={"a": [LEFT, ONES], "b": [ZEROS, GREY]})
    with pipe.diffscaler_rows([{"a": 0.8}, {"b": 0.8}]):
        torch.testing.assert_close(sd3_case.run(pipe), mixed, atol=1e-5, rtol=0)


def test_a_masked_control_task_is_masked_in_its_embedding_too(sd3_case, make_noisy):
    pipe = sd3_case.pipe()
    task = new_task(pipe.transformer, name="edges", control="edges", rank=2)
    pipe.load_diffscaler(make_noisy(task, 1, 0.3))
    base = sd3_case.run(pipe)
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    with pipe.diffscaler_control(picture):
        full = sd3_case.run(pipe)
        pipe.set_diffscaler("edges", masks=ONES)
        torch.testing.assert_close(sd3_case.run(pipe), full, atol=1e-5, rtol=1e-5)
        pipe.set_diffscaler("edges", masks=ZEROS)
        assert torch.equal(sd3_case.run(pipe), base)
        pipe.set_diffscaler("edges", masks=[[ZEROS, ONES]])
        torch.testing.assert_close(
            sd3_case.run(pipe), torch.stack([base[0], full[1]]), atol=1e-5, rtol=1e-5
        )
        embedding = pipe.transformer.pos_embed.proj
        pipe.set_diffscaler("edges", masks=[LEFT])
        some = outputs_of(embedding, lambda: sd3_case.run(pipe))[0]
    with pipe.diffscaler_control(picture, mask=LEFT):
        pipe.set_diffscaler("edges")
        torch.testing.assert_close(
            outputs_of(embedding, lambda: sd3_case.run(pipe))[0], some, atol=1e-6, rtol=0
        )
    with pipe.diffscaler_control(picture, mask=1 - LEFT):
        pipe.set_diffscaler("edges", masks=LEFT)
        nothing = outputs_of(embedding, lambda: sd3_case.run(pipe))[0]
    pipe.disable_diffscaler()
    assert torch.equal(nothing, outputs_of(embedding, lambda: sd3_case.run(pipe))[0])


def test_masks_and_schedules_multiply(sd3_case):
    pipe = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", 0.3, masks=LEFT)
    expected = sd3_case.run(pipe)
    pipe.set_diffscaler("a", 0.6, masks=LEFT, schedules="0: 0.5")
    assert torch.equal(sd3_case.run(pipe), expected)
    pipe.set_diffscaler("a", 0.6, masks=LEFT, schedules="0: 0, 1: 1")
    assert not torch.equal(sd3_case.run(pipe), expected)


def test_masks_are_laid_out_once_for_a_sampling(sd3_case, monkeypatch):
    pipe = loaded(sd3_case, "a")
    attachment = plugin.attachments(pipe)["transformer"]
    put: list[Any] = []
    given = type(attachment).set_regions
    monkeypatch.setattr(
        type(attachment), "set_regions", lambda *args: (put.append(args), given(*args))[1]
    )
    sd3_case.run(pipe)
    assert not put
    pipe.set_diffscaler("a", masks=LEFT, schedules="0: 0, 1: 1")
    sd3_case.run(pipe, num_inference_steps=5)
    assert len(put) == 1
    sd3_case.run(pipe, num_inference_steps=5)
    assert len(put) == 1
    sd3_case.run(pipe, height=12, width=8)
    assert len(put) == 2


def test_deleted_tasks_take_their_masks_with_them(sd3_case):
    pipe = loaded(sd3_case, "a", "b")
    pipe.set_diffscaler(["a", "b"], masks=[LEFT, None])
    pipe.delete_diffscaler("a")
    masked = sd3_case.run(pipe)
    state = pipe.transformer._diffscaler
    assert state.regions is None
    assert state.settled
    pipe.set_diffscaler("b")
    assert torch.equal(sd3_case.run(pipe), masked)


def test_copied_models_keep_their_masks(sd3_case):
    pipe = loaded(sd3_case, "a")
    full = sd3_case.run(pipe)
    pipe.set_diffscaler("a", masks=LEFT)
    expected = sd3_case.run(pipe)
    other = sd3_case.pipe()
    other.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(sd3_case.run(other), expected)
    other.set_diffscaler("a")
    assert torch.equal(sd3_case.run(other), full)
    assert torch.equal(sd3_case.run(pipe), expected)


def test_what_is_no_mask_or_for_no_task_is_refused_and_changes_nothing(sd3_case):
    pipe = loaded(sd3_case, "a", "b")
    pipe.set_diffscaler("a", 0.4)
    before = sd3_case.run(pipe)
    for wrong, message in (
        ([LEFT], "1 masks for 2 tasks"),
        ("left", "a mask is a PIL image"),
        (np.ones((2, 8, 8)), "a mask is .H, W., got .2, 8, 8."),
        (LEFT * 2, "numbers in 0..1"),
        ({"a": []}, "one entry per prompt, got none"),
    ):
        with pytest.raises(DiffScalerError, match=message):
            pipe.set_diffscaler(["a", "b"], masks=wrong)
    with pytest.raises(UnknownNameError, match="masks: 'c'"):
        pipe.set_diffscaler(["a", "b"], masks={"c": LEFT})
    assert torch.equal(sd3_case.run(pipe), before)


def test_a_masked_task_does_not_fuse(sd3_case):
    pipe = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", masks=LEFT)
    with pytest.raises(DiffScalerError, match=r"cannot fuse a: .* mask"):
        pipe.fuse_diffscaler(partial=True)


class Pipe:
    """What holds a model, as the plugin sees it; no pipeline runs."""

    def __init__(self, component: str, model: nn.Module) -> None:
        setattr(self, component, model)


@pytest.mark.parametrize("family", BASES)
def test_every_family_shows_its_size_frames_and_text_in_its_call(tiny, make_noisy, family):
    base = BASES[family]
    model = tiny(base.name)
    pipe = Pipe(base.component, model)
    x = torch.randn(base.latents, generator=torch.Generator().manual_seed(1))
    before = base.run(model, x)
    # the tokens an expert gets do not say whose they are
    options = {"exclude": r".*\.experts\..*"} if family == "hidream" else {}
    task = new_task(model, name="a", component=base.component, rank=2, **options)
    plugin.load_diffscaler(pipe, make_noisy(task, 1))
    full = base.run(model, x)
    plugin.set_diffscaler(pipe, "a", masks=np.ones((16, 24), np.float32))
    torch.testing.assert_close(base.run(model, x), full, atol=1e-4, rtol=1e-4)
    plugin.set_diffscaler(pipe, "a", masks=np.zeros((16, 24), np.float32))
    assert torch.equal(base.run(model, x), before)
    left = np.zeros((16, 24), np.float32)
    left[:, :12] = 1
    plugin.set_diffscaler(pipe, "a", masks=[[left, None]])
    some = base.run(model, x)
    torch.testing.assert_close(some[1], full[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(some[0], full[0], atol=1e-4)
    assert not torch.allclose(some[0], before[0], atol=1e-4)


def direct_gates(pipe: Pipe, layer: str, call: Any, mask: Any) -> Tensor:
    """As `gates_on`, for a model called by hand."""
    module = pipe.transformer.get_submodule(layer)
    found = []
    for options in ({"weights": 1.0}, {"masks": mask}, {"weights": 0.0}):
        plugin.set_diffscaler(pipe, "a", **options)
        found += outputs_of(module, call)
    full, some = found[0] - found[2], found[1] - found[2]
    return (some * full).sum(-1) / (full * full).sum(-1)


def first_in_its_block(tiny: Any, make_noisy: Any, name: str, layer: str) -> Pipe:
    pipe = Pipe("transformer", tiny(name))
    task = new_task(pipe.transformer, name="a", targets=[layer], rank=2)
    plugin.load_diffscaler(pipe, make_noisy(task, 1, 1.0))
    return pipe


def test_text_before_and_reference_pictures_after_the_picture_get_the_mean(tiny, make_noisy):
    layer = "single_transformer_blocks.0.proj_mlp"
    pipe = first_in_its_block(tiny, make_noisy, "flux", layer)
    drawn = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    reference = torch.cartesian_prod(torch.ones(1), torch.arange(2.0), torch.arange(3.0))

    @torch.no_grad()
    def call() -> None:
        pipe.transformer(
            hidden_states=torch.randn(1, 30, 16),
            encoder_hidden_states=torch.randn(1, 5, 12),
            pooled_projections=torch.randn(1, 10),
            timestep=torch.ones(1) / 2,
            img_ids=torch.cat([drawn, reference]),
            txt_ids=torch.zeros(5, 3),
        )

    mask = np.zeros((8, 12), np.float32)
    mask[:, :4] = 1
    gates = direct_gates(pipe, layer, lambda: (torch.manual_seed(0), call()), mask)
    expected = torch.cat([torch.full((5,), 1 / 3), token_means(mask), torch.full((6,), 1 / 3)])
    torch.testing.assert_close(gates[0].double(), expected.double(), atol=1e-5, rtol=0)


def test_texts_of_different_lengths_are_told_apart(tiny, make_noisy):
    layer = "layers.0.attn.to_q"
    pipe = first_in_its_block(tiny, make_noisy, "lumina2", layer)
    lengths = (5, 2)

    @torch.no_grad()
    def call() -> None:
        pipe.transformer(
            hidden_states=torch.randn(2, 4, 8, 12),
            timestep=torch.ones(2) / 2,
            encoder_hidden_states=torch.randn(2, 5, 12),
            encoder_attention_mask=torch.arange(5) < torch.tensor(lengths)[:, None],
        )

    mask = np.zeros((8, 12), np.float32)
    mask[:, :4] = 1
    gates = direct_gates(pipe, layer, lambda: (torch.manual_seed(0), call()), mask)
    for row, length in zip(gates, lengths, strict=True):
        torch.testing.assert_close(
            row[length : length + 24].double(), token_means(mask), atol=1e-5, rtol=0
        )
        assert row[:length].tolist() == pytest.approx([1 / 3] * length, abs=1e-5)


def test_a_compiled_model_keeps_to_masks_and_new_ones_cost_no_recompile(sd3_case):
    torch._dynamo.reset()
    pipe = loaded(sd3_case, "a")
    expected = []
    for mask in (LEFT, GREY):
        pipe.set_diffscaler("a", masks=mask)
        expected.append(sd3_case.run(pipe))
    pipe.transformer.compile(backend="eager")
    pipe.set_diffscaler("a", masks=ONES)
    sd3_case.run(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask, picture in zip((LEFT, GREY), expected, strict=True):
            pipe.set_diffscaler("a", masks=mask)
            torch.testing.assert_close(sd3_case.run(pipe), picture, atol=1e-5, rtol=0)
    torch._dynamo.reset()
    assert not torch.allclose(*expected, atol=1e-4)
