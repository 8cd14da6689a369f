"""What holds for controls on any pipeline, shown on SD3: names, strengths, pictures, errors."""

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    UnknownNameError,
    combine_tasks,
    load_task,
    new_task,
)
from diffscaler_core import pipelines as plugin
from diffscaler_core.combine import scale_task
from diffscaler_core.describe import describe
from diffscaler_core.pictures import as_mask, as_picture, cut_to


def picture(seed: int = 1, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


A, B = picture(1), picture(2)


@pytest.fixture
def control(sd3_case: Any, make_noisy: Any) -> Any:
    """control(pipe, name, seed): a control task that does something."""

    def build(pipe: Any, name: str = "edges", seed: int = 1, **options: Any) -> Any:
        options = {"control": "edges", "rank": 2, **options}
        task = new_task(pipe.transformer, name=name, **options)
        return make_noisy(task, seed, 0.3)

    return build


@pytest.fixture
def pipe(sd3_case: Any, control: Any) -> Any:
    pipe = sd3_case.pipe()
    pipe.load_diffscaler(control(pipe))
    return pipe


@pytest.fixture
def two(pipe: Any, control: Any) -> Any:
    """With a second control task; the first is the active one."""
    pipe.load_diffscaler(control(pipe, "depth", 2))
    pipe.set_diffscaler("edges")
    return pipe


def run(case: Any, pipe: Any, prompts: int = 2, **more: Any) -> Tensor:
    return case.run(pipe, prompts, **more)


def near(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=1e-5, rtol=1e-4))


# Strengths and names


def test_strength_multiplies_the_tasks_own(pipe: Any, sd3_case: Any) -> None:
    pipe.set_diffscaler("edges", 0.5)
    with pipe.diffscaler_control(A, 0.5):
        quarter = run(sd3_case, pipe)
    pipe.set_diffscaler("edges", {"scale": 0.25, "shift": 0.25, "subspace": 0.25})
    with pipe.diffscaler_control(A):
        assert near(run(sd3_case, pipe), quarter)
    pipe.set_diffscaler("edges", {"shift": 0.0})
    with pipe.diffscaler_control(A, 0.5):
        parts = run(sd3_case, pipe)
    pipe.set_diffscaler("edges", {"scale": 0.5, "shift": 0.0, "subspace": 0.5})
    with pipe.diffscaler_control(A):
        assert near(run(sd3_case, pipe), parts)


def test_a_task_at_rest_acts_while_it_has_a_picture(two: Any, sd3_case: Any) -> None:
    base = run(sd3_case, two)
    with two.diffscaler_control(A, adapter_name="edges"):
        edges = run(sd3_case, two)
    two.set_diffscaler("depth")
    with two.diffscaler_control(A, adapter_name="edges"):
        assert two.get_active_diffscalers() == ["depth"]
        assert torch.equal(run(sd3_case, two), edges)
    assert torch.equal(run(sd3_case, two), base)


def test_nested_controls_add_up_each_at_its_strength(two: Any, sd3_case: Any) -> None:
    with two.diffscaler_control(A, 0.5, adapter_name="edges"):
        edges = run(sd3_case, two)
        with two.diffscaler_control(B, adapter_name="depth"):
            both = run(sd3_case, two)
        assert torch.equal(run(sd3_case, two), edges)
    attachment = plugin.attachments(two)["transformer"]
    with (
        two.diffscaler_control(B, adapter_name="depth"),
        two.diffscaler_control(A, 0.5, adapter_name="edges"),
    ):
        assert near(run(sd3_case, two), both)
        assert attachment.weights["edges"]["scale"] == 0.5
        assert attachment.weights["depth"]["scale"] == 1.0
    assert not torch.equal(both, edges)


def test_the_same_task_twice_has_the_inner_picture(pipe: Any, sd3_case: Any) -> None:
    with pipe.diffscaler_control(B):
        alone = run(sd3_case, pipe)
    with pipe.diffscaler_control(A), pipe.diffscaler_control(B):
        assert torch.equal(run(sd3_case, pipe), alone)


def test_a_control_that_is_set_stays_until_it_is_taken_away(two: Any, sd3_case: Any) -> None:
    base = run(sd3_case, two)
    with two.diffscaler_control(A, 0.7, adapter_name="edges"):
        edges = run(sd3_case, two)
    two.set_diffscaler_control(A, 0.7, adapter_name="edges")
    assert torch.equal(run(sd3_case, two), edges)
    two.set_diffscaler_control(B, adapter_name="edges")
    assert not torch.equal(run(sd3_case, two), edges)
    with two.diffscaler_control(A, 0.7, adapter_name="edges"):
        assert torch.equal(run(sd3_case, two), edges)
    two.set_diffscaler_control(A, 0.7, adapter_name="edges")
    two.set_diffscaler_control(B, adapter_name="depth")
    two.set_diffscaler_control(None, adapter_name="depth")
    assert torch.equal(run(sd3_case, two), edges)
    two.set_diffscaler_control(None)
    assert torch.equal(run(sd3_case, two), base)
    plugin.set_diffscaler_control(two, A, 0.7, adapter_name="edges")
    two.delete_diffscaler("edges")
    two.load_diffscaler(new_task(two.transformer, control="edges", name="edges"))
    assert torch.equal(run(sd3_case, two), base)


def test_an_exception_ends_the_control(pipe: Any, sd3_case: Any) -> None:
    base = run(sd3_case, pipe)
    with contextlib.suppress(KeyboardInterrupt), pipe.diffscaler_control(A):
        run(sd3_case, pipe)
        raise KeyboardInterrupt
    assert torch.equal(run(sd3_case, pipe), base)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), pipe.diffscaler_control(A):
        run(sd3_case, pipe)
    handle.remove()
    assert torch.equal(run(sd3_case, pipe), base)


def test_disabled_tasks_have_no_control(pipe: Any, sd3_case: Any) -> None:
    base = run(sd3_case, pipe)
    with pipe.diffscaler_control(A):
        acting = run(sd3_case, pipe)
        pipe.disable_diffscaler()
        assert torch.equal(run(sd3_case, pipe), base)
        pipe.enable_diffscaler()
        assert torch.equal(run(sd3_case, pipe), acting)


def test_tasks_that_come_and_go_leave_the_control_in_place(
    pipe: Any, sd3_case: Any, control: Any
) -> None:
    with pipe.diffscaler_control(A):
        alone = run(sd3_case, pipe)
        pipe.load_diffscaler(sd3_case.task(pipe, "style", 3))
        pipe.set_diffscaler("edges")
        assert near(run(sd3_case, pipe), alone)
        pipe.delete_diffscaler("style")
        assert near(run(sd3_case, pipe), alone)


def test_pipelines_that_share_a_model_share_its_control(pipe: Any, sd3_case: Any) -> None:
    other = d.StableDiffusion3Pipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with other.diffscaler_control(A):
        with_picture = run(sd3_case, pipe)
        assert torch.equal(run(sd3_case, other), with_picture)
    with pipe.diffscaler_control(A):
        assert torch.equal(run(sd3_case, pipe), with_picture)


def test_an_image_to_image_pipelines_window_counts_its_own_steps(pipe: Any) -> None:
    other = d.StableDiffusion3Img2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    seen: list[bool] = []
    stack = plugin.attachments(pipe)["transformer"].controls[0]
    handle = pipe.transformer.pos_embed.register_forward_hook(
        lambda *_: seen.append(bool(stack._controls))
    )
    embeds = {"prompt_embeds": torch.ones(1, 5, 16), "pooled_prompt_embeds": torch.ones(1, 12)}
    with pipe.diffscaler_control(A, start=0.5):
        other(
            **embeds, image=Image.fromarray(A).resize((16, 16)), strength=0.5, guidance_scale=1.0,
            num_inference_steps=8, output_type="latent",
        )  # fmt: skip
    handle.remove()
    assert seen == [False, False, True, True]


def test_a_copied_model_has_the_tasks_and_no_control(pipe: Any, sd3_case: Any) -> None:
    base = run(sd3_case, pipe)
    with pipe.diffscaler_control(A):
        acting = run(sd3_case, pipe)
        other = sd3_case.pipe()
        other.transformer = copy.deepcopy(pipe.transformer)
        assert torch.equal(run(sd3_case, other), base)
        with other.diffscaler_control(A):
            assert torch.equal(run(sd3_case, other), acting)
        assert torch.equal(run(sd3_case, pipe), acting)


# Pictures


def test_every_way_to_hold_a_picture_is_the_same_picture(pipe: Any, sd3_case: Any) -> None:
    floats = torch.from_numpy(A).permute(2, 0, 1) / 255
    ways = [
        A, Image.fromarray(A), torch.from_numpy(A).permute(2, 0, 1), floats, floats * 2 - 1,
        floats[None], A[None], A / 255, Image.fromarray(A).convert("RGBA"),
    ]  # fmt: skip
    with pipe.diffscaler_control(A):
        wanted = run(sd3_case, pipe)
    for way in ways:
        with pipe.diffscaler_control(way):
            assert near(run(sd3_case, pipe), wanted)
    with pipe.diffscaler_control([A, A]):
        assert near(run(sd3_case, pipe), wanted)
    with pipe.diffscaler_control(np.stack([A, A])):
        assert near(run(sd3_case, pipe), wanted)


def test_grey_and_see_through_pictures_are_colour_pictures() -> None:
    grey = A[..., 0]
    assert near(cut_to(as_picture(grey), (8, 8)), cut_to(as_picture(grey[..., None]), (8, 8)))
    assert cut_to(as_picture(torch.from_numpy(grey)[None]), (8, 8)).shape == (1, 3, 8, 8)
    glass = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert bool((cut_to(as_picture(glass), (4, 4)) == 1).all())
    turned = Image.fromarray(picture(1, 4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    data = io.BytesIO()
    turned.save(data, "PNG", exif=exif)
    assert as_picture(Image.open(data)).size == (4, 8)


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (6, 12), (20, 20)])
def test_a_picture_covers_the_size_and_keeps_its_middle(size: tuple[int, int]) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    for own in (wide, torch.from_numpy(wide).permute(2, 0, 1) / 255):
        cut = cut_to(as_picture(own), size)
        assert cut.shape == (1, 3, *size)
        middle = cut[..., size[0] // 2, size[1] // 2]
        assert bool((middle > 0.9).all())
    same = cut_to(as_picture(A), (8, 8))
    assert near(same, torch.from_numpy(A).permute(2, 0, 1)[None] / 127.5 - 1)


def test_a_mask_keeps_the_control_to_its_part(pipe: Any, sd3_case: Any, control: Any) -> None:
    pipe.unload_diffscaler()
    pipe.load_diffscaler(control(pipe).replace(layers={}))
    shown: list[Tensor] = []
    handle = pipe.transformer.pos_embed.proj.register_forward_hook(
        lambda m, a, y: shown.append(y - m.forward(a[0]))
    )
    left = np.zeros((8, 8), dtype=np.uint8)
    left[:, :4] = 255
    for mask in (left, Image.fromarray(left), torch.from_numpy(left) > 0, left / 255):
        shown.clear()
        with pipe.diffscaler_control(A, mask=mask):
            run(sd3_case, pipe, 1)
        assert bool(shown[0][..., :2].any())
        assert not shown[0][..., 2:].any()
    handle.remove()
    for wrong, message in (
        ("left.png", "PIL image, an array or a tensor, got str"),
        (torch.ones(2, 8, 8), "mask is"),
        (left / 100.0, "0..1"),
        (torch.tensor(1.0), "mask is"),
    ):
        with pytest.raises(DiffScalerError, match=message):
            as_mask(wrong)


def test_latents_need_no_vae(pipe: Any, sd3_case: Any) -> None:
    with torch.no_grad():
        pixels = torch.from_numpy(A).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipe.vae.encode(pixels).latent_dist.mode()
    with pipe.diffscaler_control(A):
        wanted = run(sd3_case, pipe)
    for way in (latents, latents[0], [latents, latents], latents.repeat(2, 1, 1, 1)):
        with pipe.diffscaler_control(way, as_latents=True):
            assert near(run(sd3_case, pipe), wanted)
    for wrong in (A, latents[0, 0], latents.long()):
        with pytest.raises(DiffScalerError, match="as_latents=True takes"):
            enter(pipe.diffscaler_control(wrong, as_latents=True))


def test_a_model_of_pixels_takes_pixels(make_noisy: Any) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = DDPMPipeline(model.eval(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    task = new_task(model, rank=2, control="edges", name="edges", component="unet")
    pipe.load_diffscaler(make_noisy(task, 1, 0.3))

    def draw() -> np.ndarray:
        seed = torch.Generator().manual_seed(0)
        return pipe(2, seed, num_inference_steps=4, output_type="np").images

    base = draw()
    with pipe.diffscaler_control([None, A], start=0.25):
        mixed = draw()
    assert np.array_equal(mixed[0], base[0])
    assert np.abs(mixed[1] - base[1]).max() > 1e-3


def enter(context: Any) -> None:
    with context:
        pass


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("edges.png", "a PIL image, an array or a tensor, got str"),
        (Path("edges.png"), "got .*Path"),
        (np.zeros((8, 8, 2), dtype=np.uint8), r"1, 3 or 4 channels.*got ndarray \(8, 8, 2\)"),
        (torch.zeros(5, 8, 8), r"1, 3 or 4 channels.*got Tensor \(5, 8, 8\)"),
        (torch.zeros(8, 8), "channels"),
        (torch.full((3, 8, 8), float("nan")), "NaN or Inf"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "channels"),
        ([], "one entry per prompt, got none"),
        ([A, "b.png"], "got str"),
    ],
)
def test_what_is_no_picture_is_refused_at_once(pipe: Any, image: Any, message: str) -> None:
    with pytest.raises(DiffScalerError, match=message):
        enter(pipe.diffscaler_control(image))


def test_a_picture_whose_file_is_cut_short_is_refused(pipe: Any) -> None:
    data = io.BytesIO()
    Image.fromarray(picture(1, 64, 64)).save(data, "PNG")
    broken = Image.open(io.BytesIO(data.getvalue()[:400]))
    with pytest.raises(DiffScalerError, match="cannot be read"):
        enter(pipe.diffscaler_control(broken))


# Errors


def test_the_task_that_is_meant_must_be_clear(sd3_case: Any, control: Any) -> None:
    pipe = sd3_case.pipe()
    with pytest.raises(DiffScalerError, match=r"no control task is loaded: pipe.load_diffscaler"):
        enter(pipe.diffscaler_control(A))
    pipe.load_diffscaler(sd3_case.task(pipe, "style", 3))
    with pytest.raises(DiffScalerError, match="no control task is loaded"):
        enter(pipe.diffscaler_control(A))
    with pytest.raises(DiffScalerError, match=r"'style' takes no control.*here: none"):
        enter(pipe.diffscaler_control(A, adapter_name="style"))
    pipe.load_diffscaler(control(pipe))
    pipe.load_diffscaler(control(pipe, "depth"))
    with pytest.raises(DiffScalerError, match=r"adapter_name=…; control tasks here: edges, depth"):
        enter(pipe.diffscaler_control(A))
    with pytest.raises(UnknownNameError, match="'sketch'"):
        enter(pipe.diffscaler_control(A, adapter_name="sketch"))
    with pytest.raises(UnknownNameError, match="'sketch'"):
        pipe.set_diffscaler_control(None, adapter_name="sketch")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"strength": float("nan")}, "finite"),
        ({"start": -0.1}, "0 <= start <= end <= 1; got -0.1, 1.0"),
        ({"start": 0.6, "end": 0.5}, "got 0.6, 0.5"),
        ({"end": 1.1}, "shares of the steps"),
        ({"end": float("nan")}, "shares of the steps"),
    ],
)
def test_numbers_out_of_range_are_refused(pipe: Any, numbers: Any, message: str) -> None:
    with pytest.raises(DiffScalerError, match=message):
        enter(pipe.diffscaler_control(A, **numbers))


def test_what_only_the_call_shows_is_said_in_the_call(
    pipe: Any, sd3_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = run(sd3_case, pipe)

    def refused(message: str, image: Any, **options: Any) -> None:
        with pytest.raises(DiffScalerError, match=message) as caught:
            with pipe.diffscaler_control(image, **options):
                run(sd3_case, pipe)
        assert "\n" not in str(caught.value)
        assert torch.equal(run(sd3_case, pipe), base)

    refused("diffscaler_control got 3 pictures, but the pipeline runs 2 prompts", [A, A, A])
    refused("got 1 pictures", [A])
    latents = torch.zeros(1, 4, 4, 8)
    refused(r"latents are 4x8 .* but 8x8 are drawn", latents, as_latents=True)
    refused("has 16 channels as latents", torch.zeros(1, 16, 8, 8), as_latents=True)
    monkeypatch.setattr(pipe, "vae", None)
    with pytest.raises(DiffScalerError, match=r"has no VAE .* as_latents=True"):
        with pipe.diffscaler_control(A):
            model_call(pipe.transformer, 2)


def model_call(model: Any, batch: int) -> Tensor:
    with torch.no_grad():
        return model(
            hidden_states=torch.ones(batch, 4, 8, 8),
            encoder_hidden_states=torch.ones(batch, 5, 16),
            pooled_projections=torch.ones(batch, 12),
            timestep=torch.ones(batch) * 500,
            return_dict=False,
        )[0]


def test_outside_of_a_pipeline_the_batch_must_be_explained(pipe: Any) -> None:
    base = model_call(pipe.transformer, 4)
    with pipe.diffscaler_control(A):
        all_a = model_call(pipe.transformer, 4)
    with pipe.diffscaler_control([A, None, None, None]):
        assert near(model_call(pipe.transformer, 4), torch.cat([all_a[:1], base[1:]]))
    with pipe.diffscaler_control([A, None]), pytest.raises(DiffScalerError, match="fit a batch"):
        model_call(pipe.transformer, 4)
    rows = {"num_images_per_prompt": 1}
    with pipe.diffscaler_control([A, None], **rows):
        got = model_call(pipe.transformer, 4)
    assert near(got, torch.cat([all_a[:1], base[:1], all_a[:1], base[:1]]))
    with pipe.diffscaler_control([A, None], control_in_uncond=False, **rows):
        got = model_call(pipe.transformer, 4)
    assert near(got, torch.cat([base[:1], base[:1], all_a[:1], base[:1]]))
    with (
        pipe.diffscaler_control(A, control_in_uncond=False),
        pytest.raises(DiffScalerError, match="cannot tell which of a batch of 4"),
    ):
        model_call(pipe.transformer, 4)


def test_an_active_control_task_without_a_picture_says_so_once(
    pipe: Any, sd3_case: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if "no picture" in r.getMessage()]

    with pipe.diffscaler_control(A):
        run(sd3_case, pipe)
    with pipe.diffscaler_control([None, None]):
        run(sd3_case, pipe)
    assert warnings() == []
    base = run(sd3_case, pipe)
    run(sd3_case, pipe)
    (message,) = warnings()
    assert "'edges'" in message
    assert "diffscaler_control" in message
    with pipe.diffscaler_rows(["edges", None]):
        assert near(run(sd3_case, pipe), base)
    assert len(warnings()) == 1


# Life of a task


def test_a_control_task_is_saved_loaded_and_unloaded(
    pipe: Any, sd3_case: Any, tmp_path: Path
) -> None:
    with pipe.diffscaler_control(A):
        acting = run(sd3_case, pipe)
    there = pipe.save_diffscaler(tmp_path)
    assert load_task(there).is_control
    other = sd3_case.pipe()
    base = run(sd3_case, other)
    other.load_diffscaler(there, "renamed")
    assert other.get_list_diffscalers() == {"transformer": ["renamed"]}
    with other.diffscaler_control(A):
        assert torch.equal(run(sd3_case, other), acting)
    other.unload_diffscaler()
    assert torch.equal(run(sd3_case, other), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.transformer.modules())


def test_a_loaded_control_is_a_copy(sd3_case: Any, control: Any) -> None:
    pipe = sd3_case.pipe()
    task = control(pipe)
    pipe.load_diffscaler(task)
    for parameter in plugin.attachments(pipe)["transformer"].parameters():
        parameter.data.zero_()
    assert all(bool(t.any()) for t in task.extras.values())


def test_hotswap_swaps_the_control_too(pipe: Any, sd3_case: Any, control: Any) -> None:
    new = control(pipe, "new", 5)
    fresh = sd3_case.pipe()
    fresh.load_diffscaler(new)
    with fresh.diffscaler_control(A):
        wanted = run(sd3_case, fresh)
    with pipe.diffscaler_control(A):
        before = run(sd3_case, pipe)
        pipe.load_diffscaler(new, "edges", hotswap=True)
        assert near(run(sd3_case, pipe), wanted)
    narrow = control(pipe, "narrow", 6, control_rank=3)
    narrow = narrow.with_info(control={**narrow.info["control"], "gain": 0.5})
    fresh.unload_diffscaler()
    fresh.load_diffscaler(narrow)
    with fresh.diffscaler_control(A):
        wanted = run(sd3_case, fresh)
    pipe.load_diffscaler(narrow, "edges", hotswap=True)
    with pipe.diffscaler_control(A):
        assert near(run(sd3_case, pipe), wanted)
        relu = control(pipe, "relu", control_activation="relu")
        with pytest.raises(MismatchError, match="control's activation is 'relu', not 'identity'"):
            pipe.load_diffscaler(relu, "edges", hotswap=True)
        assert near(run(sd3_case, pipe), wanted)
    plain = sd3_case.task(pipe, "plain", 1)
    pipe.load_diffscaler(plain)
    with pytest.raises(MismatchError, match=r"control\.pos_embed\.proj"):
        pipe.load_diffscaler(new, "plain", hotswap=True)
    assert not near(before, wanted)


def test_fusing_refuses_controls_and_leaves_them_working(
    pipe: Any, sd3_case: Any, make_noisy: Any
) -> None:
    with pytest.raises(DiffScalerError, match="cannot fuse the control task edges: it acts only"):
        pipe.fuse_diffscaler(partial=True)
    lora = make_noisy(new_task(pipe.transformer, "lora", rank=2, name="lora"), 4)
    pipe.load_diffscaler(lora)
    with pipe.diffscaler_control(A):
        both = run(sd3_case, pipe)
    alone = run(sd3_case, pipe)
    pipe.fuse_diffscaler("lora")
    fused = run(sd3_case, pipe)
    assert near(fused, alone)
    with pipe.diffscaler_control([A, None]):  # on the fused weights, as every other task
        got = run(sd3_case, pipe)
    assert (got[0] - fused[0]).abs().max() > 1e-3
    assert near(got[1], fused[1])
    pipe.unfuse_diffscaler()
    with pipe.diffscaler_control(A):
        assert near(run(sd3_case, pipe), both)


def test_scaled_tasks_scale_their_control(pipe: Any, sd3_case: Any, control: Any) -> None:
    with pipe.diffscaler_control(A, 0.5):
        wanted = run(sd3_case, pipe)
    pipe.unload_diffscaler()
    pipe.load_diffscaler(scale_task(control(pipe), 0.5))
    with pipe.diffscaler_control(A):
        assert near(run(sd3_case, pipe), wanted)
    with pytest.raises(DiffScalerError, match="stack them instead"):
        combine_tasks([control(pipe), control(pipe)])


def test_a_description_says_what_the_control_is(pipe: Any, control: Any) -> None:
    lines = describe(control(pipe)).splitlines()
    (line,) = [line for line in lines if line.startswith("control")]
    assert line.split(maxsplit=1)[1] == (
        "edges, through the base's own embedding, identity subspace of rank 16"
    )
    copied = describe(control(pipe, control_embedding="copy"))
    assert "edges, through a copy of the base's embedding" in copied
    assert "none (control alone)" in describe(control(pipe).replace(layers={}))
    assert "\ncontrol" not in describe(new_task(pipe.transformer))


# Hosts


def test_resolution_binning_encodes_at_the_size_that_is_really_drawn(
    tiny: Any, make_noisy: Any
) -> None:
    vae = d.AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=1,
    )  # fmt: skip
    pipe = d.PixArtSigmaPipeline(
        None, None, vae.eval(), tiny("pixart"), d.DPMSolverMultistepScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.config["sample_size"] = 32  # whose bins are around 256 pixels
    object.__setattr__(pipe.transformer.config, "sample_size", 32)
    task = new_task(pipe.transformer, rank=2, name="edges", control="edges")
    pipe.load_diffscaler(make_noisy(task, 1, 0.3))
    seen: list[Any] = []
    plain = vae.encode
    vae.encode = lambda x: seen.append(tuple(x.shape)) or plain(x)
    told: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: told.append(tuple(a[0].shape)), with_kwargs=True
    )
    mask = torch.ones(1, 5)
    with pipe.diffscaler_control(A):
        pipe(
            prompt_embeds=torch.ones(1, 5, 12), prompt_attention_mask=mask, height=200, width=300,
            negative_prompt_embeds=torch.zeros(1, 5, 12), negative_prompt_attention_mask=mask,
            negative_prompt=None, num_inference_steps=1, output_type="latent",
        )  # fmt: skip
    handle.remove()
    height, width = told[0][-2:]
    assert (height * 8, width * 8) != (200, 300)
    assert seen == [(1, 3, height * 8, width * 8)]


def test_an_offloaded_vae_encodes_and_goes_back(pipe: Any, sd3_case: Any) -> None:
    from accelerate import cpu_offload_with_hook

    with pipe.diffscaler_control(A):
        wanted = run(sd3_case, pipe)
    moves: list[str] = []
    _, first = cpu_offload_with_hook(pipe.transformer, "cpu")
    _, second = cpu_offload_with_hook(pipe.vae, "cpu", prev_module_hook=first)
    hook = pipe.vae._hf_hook
    before, after = hook.pre_forward, hook.init_hook
    hook.pre_forward = lambda m, *a, **k: moves.append("on") or before(m, *a, **k)
    hook.init_hook = lambda m: moves.append("off") or after(m)
    with pipe.diffscaler_control([A, B]):
        model_call(pipe.transformer, 2)
    assert moves == ["on", "on", "off"]
    with pipe.diffscaler_control(A):
        assert torch.equal(run(sd3_case, pipe), wanted)
    first.remove()
    second.remove()


def test_control_works_under_sequential_offload_hooks(pipe: Any, sd3_case: Any) -> None:
    from accelerate import cpu_offload

    with pipe.diffscaler_control(A):
        wanted = run(sd3_case, pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    cpu_offload(pipe.vae, torch.device("cpu"), offload_buffers=True)
    assert next(pipe.vae.parameters()).is_meta
    with pipe.diffscaler_control(A):
        assert torch.equal(run(sd3_case, pipe), wanted)


def test_a_half_precision_vae_that_overflows_encodes_in_full(pipe: Any) -> None:
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    seen: list[torch.dtype] = []
    plain = pipe.vae.encode
    pipe.vae.encode = lambda x: seen.append(x.dtype) or plain(x)
    with pipe.diffscaler_control(A):
        model_call(pipe.transformer, 2)
    assert seen == [torch.float32]
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("where", ["blocks", "embedding too"])
@pytest.mark.parametrize("first", ["task", "lora"])
def test_control_runs_over_a_stock_lora(
    sd3_case: Any, control: Any, where: str, first: str
) -> None:
    from peft import LoraConfig

    names = ["attn.to_q", *(["pos_embed.proj"] if where != "blocks" else [])]
    torch.manual_seed(3)
    pipe = sd3_case.pipe()
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    if first == "lora":
        pipe.transformer.add_adapter(config)
    lone = None if first == "task" else run(sd3_case, pipe)
    pipe.load_diffscaler(control(sd3_case.pipe()))
    if first == "task":
        torch.manual_seed(3)
        sd3_case.pipe()
        pipe.transformer.add_adapter(config)
    with_lora = run(sd3_case, pipe)
    if lone is not None:
        assert torch.equal(with_lora, lone)
    with pipe.diffscaler_control(A):
        both = run(sd3_case, pipe)
    assert (both - with_lora).abs().max() > 1e-3
    assert torch.equal(run(sd3_case, pipe), with_lora)
    pipe.transformer.disable_adapters()
    with pipe.diffscaler_control(A):
        alone = run(sd3_case, pipe)
    other = sd3_case.pipe()
    other.load_diffscaler(control(other))
    with other.diffscaler_control(A):
        assert near(run(sd3_case, other), alone)


def test_a_compiled_transformer_follows_its_controls(two: Any, sd3_case: Any) -> None:
    torch._dynamo.reset()
    with two.diffscaler_control(A, adapter_name="edges"):
        a = run(sd3_case, two)
    with two.diffscaler_control([None, B], adapter_name="edges"):
        b = run(sd3_case, two)
    base = run(sd3_case, two)
    two.transformer = torch.compile(two.transformer, backend="eager")
    for _ in range(2):
        with two.diffscaler_control(A, adapter_name="edges"):
            assert near(run(sd3_case, two), a)
        with two.diffscaler_control([None, B], adapter_name="edges"):
            assert near(run(sd3_case, two), b)
        assert near(run(sd3_case, two), base)
    settled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(5):
        with two.diffscaler_control(picture(seed), 0.2 * seed, adapter_name="edges"):
            run(sd3_case, two)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == settled
    torch._dynamo.reset()


def test_a_control_that_is_swapped_under_a_compiled_model_acts_at_once(
    pipe: Any, sd3_case: Any, control: Any
) -> None:
    torch._dynamo.reset()
    new = control(pipe, "new", 5)
    fresh = sd3_case.pipe()
    fresh.load_diffscaler(new)
    with fresh.diffscaler_control(A):
        wanted = run(sd3_case, fresh)
    with pipe.diffscaler_control(A):
        run(sd3_case, pipe)  # what is added is kept, uncompiled
        plain = pipe.transformer
        pipe.transformer = torch.compile(plain, backend="eager")
        run(sd3_case, pipe)
        pipe.load_diffscaler(new, "edges", hotswap=True)
        assert near(run(sd3_case, pipe), wanted)
    torch._dynamo.reset()
