"""Tasks that act in a part of the picture, on real ComfyUI models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_control_hosts as hosts
from .formula import close
from .routes import Routes, calls_of

FAMILIES = ("tiny_sd3", "tiny_flux", "tiny_unet")


@pytest.fixture(scope="session")
def routes(tiny: Any, pack: Any) -> Routes:
    return Routes(tiny, pack)


def left(height: int = 64, width: int = 64) -> Tensor:
    """A mask of the left half."""
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_empty_masks_are_the_task_and_the_base(
    routes: Routes, clean: Any, family: str
) -> None:
    tiny = routes.tiny
    model = clean(tiny.load(family))
    task, full = tiny.task(model), torch.ones(1, 64, 64)
    base = tiny.run(model)
    assert close(tiny.run(tiny.apply(model, task, region=full)), tiny.run(tiny.apply(model, task)))
    assert torch.equal(tiny.run(tiny.apply(model, task, region=full * 0)), base)
    assert torch.equal(tiny.run(model), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_changed_where_the_mask_says(routes: Routes, clean: Any, family: str) -> None:
    """One layer on image tokens or positions, before anything mixes them."""
    tiny = routes.tiny
    model = clean(tiny.load(family))
    name = {
        "tiny_sd3": "joint_blocks.0.x_block.attn.qkv",
        "tiny_flux": "double_blocks.0.img_attn.qkv",
        "tiny_unet": "input_blocks.0.0",
    }[family]
    task = tiny.task(model, layers=[name], std=0.2)
    layer = model.model.diffusion_model.get_submodule(name)

    def outputs(applied: Any) -> Tensor:
        """What the layer gives in the first call, as a map of its places."""
        found: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, args, y: found.append(y.clone()))
        tiny.run(applied, steps=1)
        handle.remove()
        y = found[0]
        return y if y.ndim == 4 else y.transpose(1, 2).unflatten(2, (4, 4))

    base, whole = outputs(model), outputs(tiny.apply(model, task))
    half = outputs(tiny.apply(model, task, region=left()))
    middle = base.shape[-1] // 2
    assert close(half[..., :middle], whole[..., :middle])
    assert torch.equal(half[..., middle:], base[..., middle:])
    assert not close(whole[..., middle:], base[..., middle:], 1e-3)


def test_flux_text_tokens_get_the_mean(routes: Routes) -> None:
    """In the single blocks text and image lie in one run."""
    tiny = routes.tiny
    model = tiny.load("tiny_flux")
    name = "single_blocks.0.linear1"
    task = tiny.task(model, layers=[name], std=0.2)
    layer = model.model.diffusion_model.get_submodule(name)

    def outputs(applied: Any) -> Tensor:
        found: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _, args, y: found.append(y.clone()))
        tiny.run(applied, steps=1)
        handle.remove()
        return found[0]

    quarter = torch.zeros(1, 8, 8)
    quarter[:, :4, :4] = 1
    base, whole = outputs(model), outputs(tiny.apply(model, task))
    part = outputs(tiny.apply(model, task, region=quarter))
    assert base.shape[1] == 8 + 16
    assert close(part[:, :8], base[:, :8] + 0.25 * (whole - base)[:, :8])
    image = (part - base)[:, 8:].abs().amax(-1).view(-1, 4, 4)
    assert (image[:, :2, :2] > 0).all()
    assert not image[:, 2:].any()
    assert not image[:, :, 2:].any()


def test_two_tasks_each_in_its_half_share_every_call(routes: Routes, clean: Any) -> None:
    tiny = routes.tiny
    model = clean(tiny.load("tiny_sd3"))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    halves = tiny.apply(tiny.apply(model, a, region=left()), b, 0.5, region=1 - left())
    with calls_of(model) as calls:
        result = tiny.run(halves, steps=3)
    assert calls == [4] * 3
    swapped = tiny.apply(tiny.apply(model, b, 0.5, region=1 - left()), a, region=left())
    assert close(tiny.run(swapped, steps=3), result)
    both = tiny.patching.apply_tasks(model, [a, b], [1.0, 0.5])
    assert not close(result, tiny.run(both, steps=3), 1e-3)


def test_two_halves_of_one_task_are_the_task(routes: Routes) -> None:
    tiny = routes.tiny
    for family in FAMILIES:
        model = tiny.load(family)
        task = tiny.task(model)
        halves = tiny.apply(tiny.apply(model, task, region=left()), task, region=1 - left())
        assert close(tiny.run(halves), tiny.run(tiny.apply(model, task)), 2e-5)


def test_masks_of_any_size_and_one_per_latent(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    wanted = tiny.run(tiny.apply(model, task, region=left()))
    for size in (8, 256):
        assert close(tiny.run(tiny.apply(model, task, region=left(size, size))), wanted)
    wide = torch.cat([torch.zeros(1, 64, 32), left(), torch.ones(1, 64, 32)], dim=-1)
    assert close(tiny.run(tiny.apply(model, task, region=wide)), wanted)  # cut from its middle
    each = torch.cat([left(), 1 - left()])
    result = tiny.run(tiny.apply(model, task, region=each))
    assert close(result[0], wanted[0])
    assert close(result[1], tiny.run(tiny.apply(model, task, region=1 - left()))[1])
    error = routes.core.DiffScalerError
    with pytest.raises(error, match="3 region masks of 'task' for a latent batch of 2"):
        tiny.run(tiny.apply(model, task, region=torch.ones(3, 8, 8)))


def test_latents_that_are_not_square(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_flux")
    task = tiny.task(model)
    positive, negative = tiny.prompt(1), tiny.prompt(2)
    latent = {"samples": torch.zeros(1, 16, 6, 11)}  # of odd size too
    full = tiny.apply(model, task, region=torch.ones(1, 48, 88))
    plain = routes.sample(tiny.apply(model, task), positive, negative, latent)
    assert close(routes.sample(full, positive, negative, latent), plain)
    half = tiny.apply(model, task, region=left(48, 88))
    result = routes.sample(half, positive, negative, latent)
    assert result.shape == latent["samples"].shape
    assert not close(result, plain, 1e-3)


def test_areas_see_their_part_of_the_mask(routes: Routes) -> None:
    """A prompt for the left half runs a task whose mask is the left half as if it had none."""
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    set_area = tiny.nodes.ConditioningSetArea().append
    conds = [tiny.prompt(seed) for seed in (1, 2)]
    here = [set_area(cond, 32, 64, 0, 0, 1.0)[0] for cond in conds]
    there = [set_area(cond, 32, 64, 32, 0, 1.0)[0] for cond in conds]
    regional, plain = tiny.apply(model, task, region=left()), tiny.apply(model, task)

    def first_call(applied: Any, conds: Any) -> Tensor:
        found: list[Tensor] = []

        def record(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            found.append(executor(*args, **kwargs).clone())
            return found[-1]

        watched = applied.clone()
        watched.add_wrapper_with_key("apply_model", "record", record)
        tiny.run(watched, *conds, steps=1)
        return found[0]

    assert first_call(regional, here).shape[-2:] == (8, 4)
    assert close(first_call(regional, here), first_call(plain, here))
    assert close(first_call(regional, there), first_call(model, there))
    both = [a + b for a, b in zip(here, there, strict=True)]
    with calls_of(model) as calls:
        rows = first_call(regional, both)
    assert calls == [8]
    with_task, without = first_call(plain, both), first_call(model, both)
    for row in range(0, 8, 2):  # which area a row is of, its result says
        near = [(rows[row] - other[row]).abs().max() for other in (with_task, without)]
        assert min(near) < 1e-5 * rows[row].abs().max()
    assert not close(rows, with_task, 1e-3)
    assert not close(rows, without, 1e-3)


def test_regions_beside_routes_schedules_and_ranges(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    a, b, c = (tiny.task(model, seed) for seed in (1, 2, 3))
    late = routes.schedule(a, start=0.5)
    regional = tiny.apply(model, late, region=left())
    routed = routes.route(
        regional, tiny.prompt(1), b, c, mode="one task per latent", negative=tiny.prompt(2)
    )
    with calls_of(model) as calls:
        result = tiny.run(*routed, steps=4)
    assert calls == [4] * 4
    ranged = tiny.apply(model, a, 1.0, 0.5, 1.0, region=left())
    for row, task in enumerate((b, c)):
        assert close(result[row], tiny.run(tiny.apply(ranged, task), steps=4)[row])


def test_the_same_object_serves_all_steps_and_is_let_go(
    routes: Routes, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    given: list[Any] = []
    put = tiny.patching.Carrier.set_regions

    def noted(self: Any, regions: Any) -> None:
        given.append(regions)
        put(self, regions)

    monkeypatch.setattr(tiny.patching.Carrier, "set_regions", noted)
    regional = tiny.apply(model, tiny.task(model), region=left())
    tiny.run(regional, steps=4)
    made = [regions for regions in given if regions is not None]
    assert len(made) == 4
    assert len(set(map(id, made))) == 1
    assert given[-1] is None
    tiny.run(tiny.apply(model, tiny.task(model)), steps=1)  # another carrier, without regions


def test_the_same_task_with_and_without_a_region_in_turn(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    branches = [tiny.apply(model, task), tiny.apply(model, task, region=left()), model]
    first = [tiny.run(branch) for branch in branches]
    for i in (1, 0, 2, 0, 1):
        assert torch.equal(tiny.run(branches[i]), first[i])


def test_a_region_over_an_unknown_shape_is_refused(routes: Routes) -> None:
    model = routes.tiny.load("tiny_sd3")
    with pytest.raises(routes.core.DiffScalerError, match=r"must be a mask \(N, H, W\)"):
        routes.tiny.apply(model, routes.tiny.task(model), region=torch.ones(1, 3, 8, 8))


def test_on_another_model_object_and_another_gpu(routes: Routes) -> None:
    tiny = routes.tiny
    model, other = tiny.load("tiny_sd3"), tiny.load("tiny_sd3")
    regional = tiny.apply(model, tiny.task(model), region=left())
    wanted = tiny.run(regional)
    moved = regional.clone(model_override=(other.model, ({}, {}, {}, set())))
    assert torch.equal(tiny.run(moved), wanted)
    clone = regional.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert torch.equal(tiny.run(clone), wanted)


def test_videos_and_bases_that_draw_pictures_as_videos(routes: Routes) -> None:
    """The same mask in every frame; routes and per-latent masks go by row there too."""
    tiny = routes.tiny
    positive, negative = tiny.prompt(1), tiny.prompt(2)
    for kind, config, shape in (
        ("WAN21_T2V", hosts.WAN, (1, 16, 3, 8, 8)),
        ("QwenImage", hosts.QWEN, (2, 16, 1, 8, 8)),
    ):
        model = hosts._patcher(kind, config)
        a, b = tiny.task(model, 1), tiny.task(model, 2)
        latent = {"samples": torch.zeros(shape)}

        def run(applied: Any, conds: Any = (positive, negative), at: Any = latent) -> Tensor:
            return routes.sample(applied, *conds, at)

        full = torch.ones(1, 64, 64)
        assert close(run(tiny.apply(model, a, region=full)), run(tiny.apply(model, a)), 2e-5)
        half = run(tiny.apply(model, a, region=left()))
        both = [run(tiny.apply(tiny.apply(model, a, region=left()), a, region=1 - left()))]
        assert close(both[0], run(tiny.apply(model, a)), 2e-5)
        assert not close(half, both[0], 1e-3)
        if shape[0] == 2:
            routed = routes.route(
                tiny.apply(model, b, region=torch.cat([left(), 1 - left()])),
                positive,
                *(a, b),
                mode="one task per latent",
                negative=negative,
            )
            result = run(routed[0], routed[1:])
            regional = tiny.apply(model, b, region=left())
            assert close(result[0], run(tiny.apply(regional, a))[0], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_under_torch_compile_masks_and_strengths_change_without_recompiling(
    routes: Routes, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    import torch._dynamo
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules import mmdit
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # On the CPU the default attention looks at the free memory, and recompiles when it changes.
    monkeypatch.setattr(mmdit, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    tiny = routes.tiny
    model = tiny.load(family)
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager")

    def run(start: Any, mask: Tensor, strength: float) -> Tensor:
        applied = tiny.apply(start, a, strength, region=mask)
        return tiny.run(tiny.apply(applied, b, region=1 - mask), steps=2)

    assert close(run(compiled, left(), 1.0), run(model, left(), 1.0), 2e-5)
    run(compiled, left(), 0.5)
    torch._dynamo.utils.counters.clear()
    for i in range(1, 5):
        mask = torch.zeros(1, 64, 64)
        mask[..., : 12 * i] = 1
        assert close(run(compiled, mask, 0.2 * i), run(model, mask, 0.2 * i), 2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()
