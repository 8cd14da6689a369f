"""The control node on real ComfyUI models: what it computes, for whom, what it leaves behind."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .controls import Calls, Controls, image
from .formula import close

FAMILIES = ("tiny_sd3", "tiny_flux", "tiny_unet")


@pytest.fixture(scope="session")
def control(tiny: Any, pack: Any) -> Controls:
    return Controls(tiny, pack)


def latents_of(control: Controls, model: Any, picture: Tensor) -> Tensor:
    return model.model.process_latent_in(control.vae(model).encode(picture))


class Embedded(nn.Module):
    """The patch embedding with a control task's formula written out, for latents z of all rows."""

    def __init__(self, layer: Any, z: Tensor, tensors: dict[str, Tensor], strength: float) -> None:
        super().__init__()
        self.layer, self.z, self.t, self.strength = layer, z, tensors, strength
        self.weight, self.bias = layer.weight, layer.bias  # ComfyUI reads its dtype

    def forward(self, x: Tensor) -> Tensor:
        layer, t, z = self.layer, self.t, self.z
        y = layer(x)
        if layer.weight.ndim == 2:
            c, h, w = z.shape[1:]
            z = z.view(-1, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
            z = z.reshape(-1, h * w // 4, 4 * c)
            linear, hidden = z @ layer.weight.T, z @ t["down"].T
            added = linear * t["scale"] + t["shift"] + hidden @ t["up"].T
        else:
            options = (layer.stride, layer.padding)
            linear = nn.functional.conv2d(z, layer.weight, None, *options)
            hidden = nn.functional.conv2d(z, t["down"], None, *options)
            up = torch.einsum("or,brhw->bohw", t["up"], hidden)
            added = linear * t["scale"].view(-1, 1, 1) + t["shift"].view(-1, 1, 1) + up
        return y + self.strength * added


def written_out(control: Controls, name: str, task: Any, picture: Tensor, strength: float) -> Any:
    """A model of its own whose embedding is replaced, with the block affiners as a plain task."""
    model = control.tiny.load(name)
    z = latents_of(control, model, picture)
    tensors = {n.rpartition(".")[2]: t for n, t in task.extras.items()}
    embedding = control.embedding(model)
    inner = model.model.diffusion_model
    owner, leaf = next(
        (owner, leaf)
        for owner in inner.modules()
        for leaf, child in owner.named_children()
        if child is embedding
    )
    plain = control.core.TaskAdapter(task.layers, task.info)
    applied = control.tiny.apply(model, plain, strength)
    setattr(owner, leaf, Embedded(embedding, z, tensors, strength))
    return applied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_control_and_strength_zero_are_the_model_bit_for_bit(
    control: Controls, clean: Any, family: str
) -> None:
    model = clean(control.tiny.load(family))
    base = control.tiny.run(model)
    fresh = control.apply(model, control.task(model, std=0))
    assert torch.equal(control.run(fresh), base)
    zero = control.apply(model, control.task(model), strength=0.0)
    assert zero[0] is model
    assert torch.equal(control.run(zero), base)


def test_a_fresh_control_beside_another_task_is_that_task_bit_for_bit(
    control: Controls, clean: Any
) -> None:
    model = clean(control.tiny.load("tiny_sd3"))
    other = control.tiny.apply(model, control.tiny.task(model))  # adapts the embedding itself too
    fresh = control.apply(other, control.task(model, std=0))
    assert torch.equal(control.run(fresh), control.tiny.run(other))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_formula(
    control: Controls, clean: Any, family: str, strength: float
) -> None:
    model = clean(control.tiny.load(family))
    task, picture = control.task(model), image(5)
    base = control.tiny.run(model)
    result = control.run(control.apply(model, task, picture, strength))
    assert not close(result, base, 1e-2)
    wanted = control.tiny.run(written_out(control, family, task, picture, strength))
    assert close(result, wanted, 2e-5)
    assert not close(control.run(control.apply(model, task, image(6), strength)), result, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_keeps_one_call_a_step_and_the_picture_is_embedded_once(
    control: Controls, family: str
) -> None:
    model = control.tiny.load(family)
    applied = control.apply(model, control.task(model))
    with Calls(model, control.embedding(model)) as calls:
        control.run(applied, steps=5)
    assert calls.rows == [4] * 5
    assert calls.embedded == 5 + 1


def test_two_controls_add_up_each_at_its_strength_in_one_call(
    control: Controls, clean: Any
) -> None:
    model = clean(control.tiny.load("tiny_sd3"))
    a, b = control.task(model, 1, name="a"), control.task(model, 2, name="b")
    first = control.apply(model, a, image(5))
    second = control.apply(first[0], b, image(6), 0.5, conds=first[1:])
    with Calls(model, control.embedding(model)) as calls:
        result = control.run(second, steps=3)
    assert calls.rows == [4] * 3
    assert calls.embedded == 3 + 2
    swapped = control.apply(model, b, image(6), 0.5)
    swapped = control.apply(swapped[0], a, image(5), conds=swapped[1:])
    assert close(control.run(swapped, steps=3), result)
    assert not close(control.run(first, steps=3), result, 1e-3)
    twice = control.apply(model, a, image(5), 0.5)
    twice = control.apply(twice[0], a, image(5), 0.25, conds=twice[1:])  # the same task again
    assert close(control.run(twice), control.run(control.apply(model, a, image(5), 0.75)))


def test_each_latent_of_a_batch_follows_its_own_picture(control: Controls) -> None:
    model = control.tiny.load("tiny_sd3")
    task = control.task(model)
    pictures = torch.cat([image(5), image(6)])
    result = control.run(control.apply(model, task, pictures))
    for row in range(2):
        alone = control.run(control.apply(model, task, pictures[row : row + 1]))
        assert close(result[row], alone[row])
    assert not close(result[0], control.run(control.apply(model, task, image(6)))[0], 1e-3)


def test_without_the_control_rows_are_the_base_with_its_other_tasks(
    control: Controls, clean: Any
) -> None:
    """In calls of their own, and beside rows that have it."""
    model = clean(control.tiny.load("tiny_sd3"))
    other = control.tiny.apply(model, control.tiny.task(model))
    for start in (model, other):
        applied, *conds = control.apply(start, control.task(model), control_in_uncond=False)
        plain = control.prompts(model)
        assert torch.equal(control.run((applied, *plain)), control.tiny.run(start))
        without, beside = _first_call(control, start, plain), _first_call(control, applied, conds)
        assert len(without) == len(beside) == 4
        if start is model:
            assert torch.equal(beside[:2], without[:2])  # ComfyUI puts the negative prompt first
        else:
            assert close(beside[:2], without[:2], 1e-6)  # rows sum in another order
        assert not close(beside[2:], without[2:], 1e-3)


def _first_call(control: Controls, model: Any, conds: Any) -> Tensor:
    """What the denoiser gives in the first step, by rows."""
    calls: list[Tensor] = []

    def record(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(executor(*args, **kwargs).clone())
        return calls[-1]

    watched = model.clone()
    watched.add_wrapper_with_key("apply_model", "record", record)
    control.run((watched, *conds), steps=1)
    return calls[0]


def test_control_in_uncond_off_leaves_the_negative_prompt_alone_in_the_same_call(
    control: Controls, clean: Any
) -> None:
    model = clean(control.tiny.load("tiny_sd3"))
    task = control.task(model)
    applied, positive, negative = control.apply(model, task, control_in_uncond=False)
    with Calls(model, control.embedding(model)) as calls:
        result = control.run((applied, positive, negative), steps=3)
    assert calls.rows == [4] * 3
    plain = control.prompts(model)[1]
    with Calls(model, control.embedding(model)) as calls:
        apart = control.run((applied, positive, plain), steps=3)  # two calls, the same sum
    assert calls.rows == [2] * 6
    assert close(result, apart)
    assert not close(result, control.run(control.apply(model, task), steps=3), 1e-3)


def test_areas_get_the_same_part_of_the_picture(control: Controls) -> None:
    """A control of the area alone, on latents of the area alone, is what the area's rows run."""
    model = control.tiny.load("tiny_sd3")
    task, picture = control.task(model), image(5)
    applied, positive, negative = control.apply(model, task, picture)
    set_area = control.tiny.nodes.ConditioningSetArea().append
    (left,) = set_area(positive, 32, 64, 0, 0, 1.0)
    (right,) = set_area(positive, 32, 64, 32, 0, 1.0)
    seen: list[tuple[Any, Any]] = []

    def record(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        for name, value in kwargs.items():
            if name.startswith("ds_control:"):
                seen.append((tuple(args[0].shape), value.control().latents.clone()))
        return executor(*args, **kwargs)

    watched = applied.clone()
    mine = watched.wrappers["apply_model"].pop("diffscaler")
    watched.add_wrapper_with_key("apply_model", "record", record)  # outside of the pack's own
    watched.wrappers["apply_model"]["diffscaler"] = mine
    with Calls(model, control.embedding(model)) as calls:
        combined = control.run((watched, left + right, negative), steps=4)
    assert combined.isfinite().all()
    whole = latents_of(control, model, picture)
    parts = [latents for shape, latents in seen if shape[-1] == 4]
    assert parts
    for latents in parts:
        assert latents.shape[-2:] == (8, 4)
        halves = [whole[..., :4], whole[..., 4:]]
        assert all(any(torch.equal(row, half[0]) for half in halves) for row in latents)
    per_step = len(calls.rows) // 4
    assert len(calls.rows) == 4 * per_step
    assert calls.embedded <= len(calls.rows) + per_step  # each group's pictures once, not per step


def test_regional_masks_and_combined_prompts_stay_one_call(control: Controls) -> None:
    """Two prompts, each in its own half; one follows the control, the other does not."""
    model = control.tiny.load("tiny_sd3")
    applied, positive, negative = control.apply(model, control.task(model))
    picture = next(iter(positive[0][1]["model_conds"].values())).picture
    off = picture.on(control.tiny.prompt(3), model.model, False)
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    set_mask = control.tiny.nodes.ConditioningSetMask().append
    (here,) = set_mask(positive, left, "default", 1.0)
    (there,) = set_mask(off, 1 - left, "default", 1.0)
    (both,) = control.tiny.nodes.ConditioningCombine().combine(here, there)
    with Calls(model, control.embedding(model)) as calls:
        result = control.run((applied, both, negative), steps=3)
    assert calls.rows == [6] * 3
    assert calls.embedded == 3 + 1
    assert not close(result, control.run((applied, here, negative), steps=3), 1e-3)


def test_a_mask_weighs_what_is_embedded(control: Controls) -> None:
    model = control.tiny.load("tiny_sd3")
    task = control.task(model)
    task = task.replace(layers={})  # what the blocks do is not masked
    whole = control.run(control.apply(model, task))
    full = torch.ones(1, 64, 64)
    assert close(control.run(control.apply(model, task, mask=full)), whole)
    assert torch.equal(
        control.run(control.apply(model, task, mask=full * 0)), control.tiny.run(model)
    )
    half = full.clone()
    half[..., :32] = 0
    masked = control.run(control.apply(model, task, mask=half))
    assert not close(masked, whole, 1e-3)
    bigger = torch.nn.functional.interpolate(half[:, None], (256, 256))[:, 0]
    assert close(control.run(control.apply(model, task, mask=bigger)), masked, 1e-3)
    two = control.run(control.apply(model, task, mask=torch.cat([full, half])))
    assert close(two[0], whole[0])
    assert close(two[1], masked[1])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (48, 48)])
def test_the_picture_is_fitted_to_the_latents_that_are_sampled(
    control: Controls, height: int, width: int
) -> None:
    """An image of any size, and latents that are not square: cut from its middle, then resized."""
    model = control.tiny.load("tiny_flux")
    task = control.task(model)

    def run(picture: Tensor) -> Tensor:
        applied, positive, negative = control.apply(model, task, picture)
        latent = {"samples": torch.zeros(1, 16, height // 8, width // 8)}
        sampled = control.tiny.nodes.KSampler().sample(
            applied, 0, 2, 4.0, "euler", "normal", positive, negative, latent, 1.0
        )
        return sampled[0]["samples"]

    exact = image(5, height, width)
    wanted = run(exact)
    border = torch.rand(1, height, 160, 3)
    border[:, :, (160 - width) // 2 : (160 + width) // 2] = exact
    assert close(run(border), wanted)
    double = exact.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert close(run(double), wanted, 0.05)
    assert not close(run(image(6, height, width)), wanted, 0.05)


def test_one_node_serves_several_sizes(control: Controls) -> None:
    model = control.tiny.load("tiny_flux")
    applied, positive, negative = control.apply(model, control.task(model))

    def run(width: int) -> Tensor:
        latent = {"samples": torch.zeros(1, 16, 8, width)}
        sampled = control.tiny.nodes.KSampler().sample(
            applied, 0, 2, 4.0, "euler", "normal", positive, negative, latent, 1.0
        )
        return sampled[0]["samples"]

    first = run(8)
    assert run(12).shape[-1] == 12
    assert torch.equal(run(8), first)
    assert not _placed(positive)


def _placed(conditioning: Any) -> list[Any]:
    return [
        cond
        for _, more in conditioning
        for cond in more["model_conds"].values()
        if cond.placed is not None
    ]


def test_ranges_of_sampling_apply_to_the_whole_control(control: Controls) -> None:
    model = control.tiny.load("tiny_sd3")
    task = control.task(model)
    never = control.apply(model, task, start_percent=0.9999)
    assert torch.equal(control.run(never), control.tiny.run(model))
    early = control.run(control.apply(model, task, end_percent=0.5), steps=4)
    assert not close(early, control.run(control.apply(model, task), steps=4), 1e-3)
    assert not close(early, control.tiny.run(model, steps=4), 1e-3)


def test_a_model_that_does_not_run_the_control_warns_once_and_is_unharmed(
    control: Controls, clean: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for family in FAMILIES:
        caplog.clear()
        model = clean(control.tiny.load(family))
        _, positive, negative = control.apply(model, control.task(model))
        with caplog.at_level(logging.WARNING):
            result = control.tiny.run(model, positive, negative)
        assert torch.equal(result, control.tiny.run(model))
        assert _warnings(caplog, "does not run it") == 1


def test_a_model_that_refuses_unknown_arguments_is_unharmed_too(
    control: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As HiDream's does: without the control it must never be handed any."""
    model = control.tiny.load("tiny_sd3")
    inner = model.model.diffusion_model
    forward = inner.forward

    def strict(x, timesteps, context=None, y=None, control=None, transformer_options=None):  # type: ignore[no-untyped-def]
        return forward(x, timesteps, context, y, control, transformer_options)

    wanted = control.run(control.apply(model, control.task(model)))
    monkeypatch.setattr(inner, "forward", strict)
    applied, *conds = control.apply(model, control.task(model))
    assert torch.equal(control.run((applied, *conds)), wanted)
    assert torch.equal(control.tiny.run(model, *conds), control.tiny.run(model))


def test_reference_pictures_get_no_control(control: Controls) -> None:
    """Flux has them behind its own tokens; others call the same layer once more."""
    model = control.tiny.load("tiny_flux")
    reference = torch.randn(1, 16, 8, 4, generator=torch.Generator().manual_seed(1))
    conds = [
        [[c, {**more, "reference_latents": [reference]}] for c, more in cond]
        for cond in control.prompts(model)
    ]
    base = control.tiny.run(model, *conds)
    assert not torch.equal(base, control.tiny.run(model))
    fresh = control.apply(model, control.task(model, std=0), conds=conds)
    assert torch.equal(control.run(fresh), base)
    seen = []
    applied = control.apply(model, control.task(model).replace(layers={}), conds=conds)
    inner, embed = model.model.diffusion_model, control.embedding(model)
    handle = inner.double_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs.get("img", args[0] if args else None)).clone()),
        with_kwargs=True,
    )
    control.run(applied, steps=1)
    control.tiny.run(model, *conds, steps=1)
    handle.remove()
    added = (seen[0] - seen[1]).abs().amax(-1)
    assert (added[:, :16] > 0).all()
    assert not added[:, 16:].any()

    (entry,) = control.tiny.patching.tasks_on(applied[0])
    carrier = control.tiny.patching.Carrier(model.model, [entry.parameters], check=False)
    carrier.prepare(torch.ones(1, 3), torch.device("cpu"), torch.float32)
    carrier.set_control(torch.randn(1, 16, 8, 8))
    tokens = torch.randn(1, 16, 64)
    with carrier.running(model.model, references=1):
        first, second = embed(tokens), embed(tokens)
    assert not torch.equal(first, second)
    assert torch.equal(second, embed(tokens))


def test_a_model_with_other_controls_warns_and_runs_its_own(
    control: Controls, caplog: pytest.LogCaptureFixture
) -> None:
    model = control.tiny.load("tiny_sd3")
    applied, positive, negative = control.apply(model, control.task(model))
    wanted = control.run((applied, positive, negative))
    _, *strange = control.apply(model, control.task(model, 2), conds=(positive, negative))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(control.run((applied, *strange)), wanted)
    assert _warnings(caplog, "does not run it") == 1


def test_a_control_that_no_conditioning_carries_is_told(
    control: Controls, caplog: pytest.LogCaptureFixture
) -> None:
    model = control.tiny.load("tiny_sd3")
    applied, *_ = control.apply(model, control.task(model))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(control.run((applied, *control.prompts(model))), control.tiny.run(model))
    assert _warnings(caplog, "no conditioning carries") == 1


def _warnings(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_whatever_is_raised_inside_restores_the_model(
    control: Controls, clean: Any, error: Any
) -> None:
    import comfy.model_management

    error = error or comfy.model_management.InterruptProcessingException  # type: ignore[attr-defined]
    model = control.tiny.load("tiny_sd3")
    applied = control.apply(model, control.task(model))
    wanted = control.run(applied)
    clean(model)
    layer = model.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1
    handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error("stop")))
    with pytest.raises(error):
        control.run(applied)
    handle.remove()
    assert torch.equal(control.run(applied), wanted)


def test_the_inputs_stay_as_they_were(control: Controls) -> None:
    model = control.tiny.load("tiny_sd3")
    options, wrappers = repr(model.model_options), repr(model.wrappers)
    conds = control.prompts(model)
    before = [list(more) for cond in conds for _, more in cond]
    applied = control.apply(model, control.task(model), conds=conds)
    control.run(applied)
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert [list(more) for cond in conds for _, more in cond] == before


def test_what_was_computed_is_let_go_after_sampling(control: Controls) -> None:
    model = control.tiny.load("tiny_sd3")
    applied = control.apply(model, control.task(model))
    control.run(applied)
    carriers = list(control.tiny.patching._carriers[model.model].values())
    stacks = [stack for carrier in carriers for stack in carrier._controls.values()]
    assert stacks
    assert all(stack.kept_bytes == 0 for stack in stacks)


def test_one_clear_error_for_each_thing_that_does_not_fit(control: Controls, clean: Any) -> None:
    model, unet = clean(control.tiny.load("tiny_sd3")), control.tiny.load("tiny_unet")
    task, error = control.task(model), control.core.DiffScalerError
    for wrong in (
        lambda: control.tiny.apply(model, task),
        lambda: control.tiny.patching.apply_tasks(model, [task], [1.0]),
    ):
        with pytest.raises(error, match=r"'edges' takes a control picture .*DiffScaler Control"):
            wrong()
    with pytest.raises(error, match="'plain' takes no control picture: connect it to Apply"):
        control.apply(model, control.tiny.task(model, name="plain"))
    with pytest.raises(error, match="no VAE"):
        control.apply(model, task, vae=None)
    with pytest.raises(error, match=r"latents of 4 channels, but this SD3 draws 16"):
        control.apply(model, task, vae=control.vae(unet))
    with pytest.raises(error, match=r"'edges'.*does not fit"):
        control.apply(unet, task)
    with pytest.raises(error, match="3 control images of 'edges' for a latent batch of 2"):
        control.run(control.apply(model, task, image(5, count=3)))
    with pytest.raises(error, match="3 control masks of 'edges' for a latent batch of 2"):
        control.run(control.apply(model, task, mask=torch.ones(3, 64, 64)))
    with pytest.raises(error, match=r"must be \(N, H, W"):
        control.apply(model, task, torch.zeros(64, 64, 3))


def test_a_control_in_the_embedding_alone_works(control: Controls) -> None:
    """Nothing in the blocks: a task may have only its control affiner."""
    model = control.tiny.load("tiny_sd3")
    task = control.task(model)
    alone = task.replace(layers={})
    result = control.run(control.apply(model, alone))
    assert not close(result, control.tiny.run(model), 1e-3)
    assert close(result, control.tiny.run(written_out(control, "tiny_sd3", alone, image(5), 1.0)))
