"""Control tasks learn from pairs: what a picture is to show, and the picture."""

import json
import math

import pytest
import torch
from PIL import Image

from diffscaler_core import load_task, new_task, save_task
from diffscaler_core.control import Control
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import (
    TaskRun,
    TrainingData,
    as_denoiser,
    encode_folder,
    prompts_for,
    train_task,
    train_tasks,
    validation_loss,
)
from diffscaler_core.training.command.finish import finished
from diffscaler_core.training.data.streaming import stream
from diffscaler_core.training.learner import Learner
from diffscaler_core.training.objective import draw_times
from diffscaler_core.training.preview import sample_controls

from .conftest import PIPES
from .runs import config_of, farthest, same

SETTINGS = {"control": "colour", "lr_control": 1e-2, "targets": "all", "rank": 4}


def pairs(seed, count=12, channels=4, side=8, prompts=("red",), control=True):
    """Pictures of one random colour each, which nothing tells but their control."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(1, count, channels, 1, 1, generator=generator).sign()
    plain = colours.expand(-1, -1, -1, side, side).contiguous()
    x0 = plain + 0.1 * torch.randn(plain.shape, generator=generator)
    index = torch.arange(count) % len(prompts)
    return TrainingData(x0, index, prompts, control=plain if control else None)


def trained(base, words=None, data=None, **changes):
    more = {key: changes.pop(key) for key in MORE & changes.keys()}
    config = config_of(**{**SETTINGS, **changes})
    return train_task(base, pairs(0) if data is None else data, config, words=words, **more)


MORE = {"task", "validation", "prior", "folder", "on_step", "resume"}


def stop_at(step):
    return lambda now: now.step == step


def test_a_control_task_goes_by_its_control(sd3, words):
    before = {name: t.clone() for name, t in sd3.model.state_dict().items()}
    seen = []
    unseen = pairs(1)
    task = trained(sd3, words, steps=60, validation=unseen, on_step=seen.append)
    prompts = prompts_for(sd3, ("red",), words=words)
    base, own, other = (
        validation_loss(sd3, unseen, prompts, *given, others=others)
        for given, others in (((), False), ((task,), False), ((task,), True))
    )
    assert own < 0.7 * base
    assert own < 0.7 * other
    # the run itself says so, at the same noise, and how the loss lies over the noise
    last = seen[-1]
    assert (last.validation, last.validation_other) == pytest.approx((own, other), rel=1e-5)
    facts = task.info["training"]
    assert facts["validation_loss_other_control"] == pytest.approx(other, abs=1e-4)
    assert len(facts["loss_by_noise"]) == 4
    assert facts["control"] == "colour"
    assert task.info["control"]["kind"] == "colour"
    after = sd3.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in sd3.model.parameters())


@pytest.mark.parametrize("kind", PIPES)
def test_a_step_moves_the_control_affiner_and_every_other_affiner_of_every_kind_of_base(
    kind, words
):
    base = as_denoiser(PIPES[kind]())
    channels, side = (3, 16) if kind == "unet2d" else (4, 8)
    data = pairs(0, 4, channels, side, ("a",) if kind == "dit" else ("red",))
    task = train_task(
        base, data, config_of(**{**SETTINGS, "steps": 3, "batch": 4}),
        words=words if kind == "sd3" else None,
    )  # fmt: skip
    (up,) = [t for name, t in task.extras.items() if name.endswith(".up")]
    assert bool(up.any())
    fresh = new_task(base.model, control="colour", component=base.component)
    assert sorted(task.extras) == sorted(fresh.extras)


def test_only_the_tasks_parameters_get_gradients_the_control_affiner_among_them(sd3, words):
    task = new_task(sd3.model, rank=2, control="colour")
    data = pairs(0, 4)
    told = prompts_for(sd3, ("red",), words=words)(data.index)
    with sd3.held(), sd3.attached({"t": task}) as trainable:
        trainable.requires_grad_(True)
        named = trainable.parameters_of("t")
        for _ in range(2):  # U starts at 0, so D's gradient does
            t = torch.full((4,), 0.5)
            timestep, x_t = sd3.objective.noisy(data.latents[0], data.latents[0], t)
            output = sd3(x_t, timestep, {**told, "control": data.control[0]})
            output.square().mean().backward()
            moved = {name for name, p in named.items() if p.grad is not None and p.grad.any()}
            with torch.no_grad():
                for parameter in named.values():
                    parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    assert set(task.extras) <= moved
    assert all(p.grad is None for p in sd3.model.parameters())
    assert not any(bool(t.any()) for name, t in task.extras.items() if name.endswith("up"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"control_embedding": "copy"}, {"accumulate": 2, "prompts": "learned"}],
    ids=["plain", "ema", "copy", "accumulated, learned prompts"],
)
def test_a_resumed_control_run_equals_one_in_one_go(sd3, words, tmp_path, changes):
    changes = {"steps": 8, **changes}
    whole = trained(sd3, words, **changes)
    trained(sd3, words, folder=tmp_path, on_step=stop_at(3), **changes)
    resumed = trained(sd3, words, folder=tmp_path, **changes)
    assert same(resumed, whole)
    assert whole.extras.keys()
    assert all(torch.equal(resumed.extras[n], t) for n, t in whole.extras.items())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"control": "depth"}, "control colour, now depth"),
        ({"control_rank": 3}, "control_rank 0, now 3"),
        ({"control_embedding": "copy"}, "control_embedding affiner, now copy"),
    ],
)
def test_a_run_cannot_go_on_as_another_kind_of_control(sd3, words, tmp_path, changed, said):
    trained(sd3, words, folder=tmp_path, steps=2)
    with pytest.raises(DiffScalerError, match="checkpoints of another run") as caught:
        trained(sd3, words, folder=tmp_path, steps=4, **changed)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "ema": 0.9}], ids=["plain", "accumulated, ema"]
)
def test_tasks_with_and_without_control_in_one_run_equal_separate_runs(sd3, words, changes):
    changes = {"steps": 5, "batch": 4, "name": "ignored", **changes}
    runs = [
        TaskRun("edges", pairs(0), words=words),
        TaskRun("plain", pairs(1, control=False), words=words, control=""),
        TaskRun("depth", pairs(2), words=words, control="depth"),
    ]
    config = config_of(**{**SETTINGS, **changes})
    together = train_tasks(sd3, runs, config)
    for run in runs:
        alone = train_tasks(sd3, [run], config)[run.name]
        assert farthest(together[run.name], alone) < 1e-5
    kinds = [(task.info.get("control") or {}).get("kind") for task in together.values()]
    assert kinds == ["colour", None, "depth"]
    assert not together["plain"].extras
    gap = [together["edges"].extras[n] - t for n, t in together["depth"].extras.items()]
    assert any(bool(g.abs().max() > 1e-4) for g in gap)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(sd3, words):
    whole, parts = (trained(sd3, words, steps=3, accumulate=n) for n in (1, 4))
    assert farthest(whole, parts) < 1e-5


def test_recomputed_activations_change_no_number(sd3, words):
    plain, again = (trained(sd3, words, steps=3, checkpointing=on) for on in (False, True))
    assert farthest(plain, again) < 1e-6


def test_prior_pictures_have_no_control(sd3, words):
    data, prior = pairs(0), pairs(3, 4, control=False)
    task = trained(sd3, words, steps=4, prior=prior, prior_share=0.5)
    with_controls = trained(sd3, words, steps=4, prior=pairs(3, 4), prior_share=0.5)
    assert same(task, with_controls)  # controls of prior pictures are not looked at
    assert not same(task, trained(sd3, words, steps=4))
    learner = learner_of(sd3, words, data, prior=prior, batch=8, control_drop=0.0)
    drawn = learner.draw(0)
    assert drawn.kept.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert not drawn.control[4:].any()


def learner_of(base, words, data, prior=None, **changes):
    config = config_of(**{**SETTINGS, **changes})
    run = TaskRun("tiny", data, words=words, prior=prior)
    prompts = prompts_for(base, data.prompts, words=words)
    task = new_task(base.model, control=config.control or None)
    with base.attached({"tiny": task}) as trainable:
        trainable.requires_grad_(True)
        return Learner(run, trainable, prompts, None, config, base.objective, base.device)


def test_the_share_of_controls_asked_for_is_left_out_and_its_rows_have_none(sd3, words):
    learner = learner_of(sd3, words, pairs(0), batch=64, control_drop=0.3)
    kept = torch.cat([learner.draw(step).kept for step in range(20)])
    assert set(kept.tolist()) == {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.04)
    assert torch.equal(learner.draw(3).kept, learner.draw(3).kept)
    told = learner.condition(learner.draw(0))
    # what a left-out control shows makes no difference at all; what a kept one shows does
    task = trained(sd3, words, steps=4)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 500.0])
    plain = {name: rows[:2] for name, rows in told.items() if not name.startswith("control")}
    with sd3.held(), sd3.attached({"t": task}), torch.no_grad():

        def output(shown):
            control = torch.full((2, 4, 8, 8), shown)
            return sd3(x, t, {**plain, "control": control, "control_kept": torch.tensor([0.0, 1])})

        first, second = output(1.0), output(-1.0)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_a_task_does_better_without_its_control_where_it_was_left_out_in_training(sd3, words):
    """Without any dropping the task's other affiners never see what they meet without a control."""
    prompts, unseen = prompts_for(sd3, ("red",), words=words), pairs(1)
    blind = TrainingData(unseen.latents, unseen.index, unseen.prompts)
    losses = [
        validation_loss(sd3, blind, prompts, trained(sd3, words, steps=60, control_drop=drop))
        for drop in (0.0, 0.5)
    ]
    assert losses[1] < losses[0]


def test_controls_are_drawn_at_middle_times_whatever_the_base_predicts():
    """The benefit lies at times 0.25 to 0.75 (our trial), so also a DDPM is shown more of these."""
    base = as_denoiser(PIPES["dit"]())
    assert not base.objective.is_flow
    drawn = [learner_of(base, None, pairs(0), batch=256, prompts="labels").draw(0).t]
    plain = learner_of(base, None, pairs(0, control=False), batch=256, control="").draw(0).t
    middle = [float(((t > 0.25) & (t < 0.75)).float().mean()) for t in (*drawn, plain)]
    assert middle[0] > middle[1] + 0.1
    expected = draw_times(20000, "logit_normal", generator=torch.Generator(), uniform_share=0.1)
    share = float(((expected > 0.25) & (expected < 0.75)).float().mean())
    assert middle[0] == pytest.approx(share, abs=0.1)


def test_pictures_without_controls_and_controls_nobody_asked_for_are_each_one_error(sd3, words):
    with pytest.raises(DiffScalerError, match=r"to learn from control pictures \(colour\)"):
        trained(sd3, words, data=pairs(0, control=False))
    with pytest.raises(DiffScalerError, match="takes none: say what they show"):
        trained(sd3, words, control="")
    for control, said in ((True, "pictures have none"), (False, "pictures have some")):
        with pytest.raises(DiffScalerError, match=said):
            trained(
                sd3, words, data=pairs(0, control=control), control="colour" if control else "",
                validation=pairs(1, control=not control),
            )  # fmt: skip
    wrong = pairs(0)
    narrow = TrainingData(
        wrong.latents, wrong.index, wrong.prompts, control=wrong.control[:, :, :3]
    )
    with pytest.raises(DiffScalerError, match="3 channels as latents"):
        trained(sd3, words, data=narrow)
    small = TrainingData(
        wrong.latents, wrong.index, wrong.prompts, control=wrong.control[..., :4, :4]
    )
    with pytest.raises(DiffScalerError, match="encoded at the size that is drawn"):
        trained(sd3, words, data=small)


def test_a_task_goes_on_as_what_it_is(sd3, words):
    first = trained(sd3, words, steps=4)
    on = trained(sd3, words, steps=4, task=first, control="")  # nobody has to say it again
    assert on.info["control"] == first.info["control"]
    assert not same(on, first)
    kept = {name: t.clone() for name, t in first.extras.items()}
    assert all(torch.equal(first.extras[name], t) for name, t in kept.items())
    plain = trained(sd3, words, steps=2, data=pairs(0, control=False), control="")
    with pytest.raises(
        DiffScalerError, match="takes no control pictures, but this run is to train"
    ):
        trained(sd3, words, task=plain)
    run = TaskRun("x", pairs(0, control=False), words=words, task=first, control="")
    with pytest.raises(DiffScalerError, match=r"takes control pictures \(colour\)"):
        train_tasks(sd3, [run], config_of(**SETTINGS))


def test_the_files_of_a_run_carry_the_control_affiner(sd3, words, tmp_path):
    changes = {"steps": 9, "validate_every": 3, "validation": pairs(1), "folder": tmp_path}
    last = trained(sd3, words, ema=0.9, **changes)
    best = load_task(tmp_path / "tiny-best.safetensors")
    assert sorted(best.extras) == sorted(last.extras)
    prompts = prompts_for(sd3, ("red",), words=words)
    told = best.info["training"]["best_validation_loss"]
    assert validation_loss(sd3, pairs(1), prompts, best) == pytest.approx(told, abs=2e-5)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "validation_other" in entry] == [3, 6, 9]
    for dtype in (torch.float32, torch.bfloat16):
        file = save_task(finished(last, dtype), tmp_path / "last.safetensors")
        back = load_task(file)
        assert {t.dtype for t in back.tensors if t.ndim != 3} == {dtype}
        assert all(torch.equal(back.extras[n], t.to(dtype)) for n, t in last.extras.items())


def test_another_pictures_control_is_the_same_one_for_every_batch_size(sd3, words):
    task, prompts = trained(sd3, words, steps=20), prompts_for(sd3, ("red",), words=words)
    data = pairs(1, 5)
    losses = [
        validation_loss(sd3, data, prompts, task, batch=batch, others=True) for batch in (1, 2, 5)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    moved = TrainingData(data.latents, data.index, data.prompts, control=data.control.roll(2, 1))
    assert losses[0] == pytest.approx(validation_loss(sd3, moved, prompts, task), rel=1e-5)
    alone = validation_loss(sd3, pairs(1, 1), prompts, task, others=True)
    assert math.isnan(alone)


def test_samples_show_each_control_and_what_became_of_it(sd3, words, tmp_path):
    shown = []
    task = trained(
        sd3, words, steps=2, sample_every=2, sample_steps=2, folder=tmp_path,
        on_step=lambda now: shown.append(now.samples),
    )  # fmt: skip
    assert len(shown[-1]) == 16
    data, prompts = pairs(0), prompts_for(sd3, ("red",), words=words)
    with sd3.held(), sd3.attached({"t": task}):
        batch = data.batch(8, 5, 0)
        drawn = sample_controls(sd3, prompts, batch, seed=5, steps=2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(drawn, shown[-1], strict=True))
    controls = sd3.decode(batch.control)
    assert torch.allclose(torch.stack(drawn[::2]), controls, atol=1e-6)
    with Image.open(tmp_path / "samples" / "step-000002.png") as sheet:
        assert sheet.size == (4 * controls.shape[-1], 4 * controls.shape[-2])


def test_a_trained_task_without_its_control_is_the_base_and_its_strength_scales_it(sd3, words):
    from diffscaler_core import attach

    task = trained(sd3, words, steps=4)
    data = pairs(0, 2)
    told = prompts_for(sd3, ("red",), words=words)(data.index)
    x, t = data.latents[0], torch.tensor([500.0, 500.0])

    def run():
        with torch.no_grad():
            return sd3.predict(x, t, told)

    base = run()
    with attach(sd3.model, {"t": task}) as attachment:
        assert torch.equal(run(), base)
        attachment.set_controls({"t": Control(data.control[0])})
        assert not torch.allclose(run(), base)
        attachment.set_weights({"t": 0.0})
        assert torch.equal(run(), base)


def test_a_folder_of_pairs_and_pairs_made_on_the_fly_train_alike(sd3, words, pictures, tmp_path):
    """The same controls, once as files beside the pictures and once made while encoding."""
    made = encode_folder(pictures, 16, lambda pixels: pixels, control_from="grey")
    for i, path in enumerate(sorted(pictures.rglob("*.png"))):
        beside = pictures.with_name("pictures_control") / path.relative_to(pictures)
        beside.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("L").convert("RGB").save(beside)
        assert made.control[0, i].shape == (3, 16, 16)
    losses = []
    for how in ({"control": True}, {"control_from": "grey"}):
        data = encode_folder(pictures, 16, sd3.encode, flip=True, **how)
        seen = []
        trained(
            sd3, words, data=data, steps=3, on_step=lambda now, seen=seen: seen.append(now.loss)
        )
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_stream_of_pairs_trains_validates_and_goes_on(sd3, words, pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = sorted(str(path) for path in pictures.rglob("*.png")) * 3
    table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())

    def data():
        return stream(
            table, 16, sd3.encode, prompts=["red"], name="red", control_from="edges", validation=4
        )

    changes = {"steps": 6, "batch": 4, "validation_share": 0.5, "sample_steps": 2}
    changes |= {"sample_every": 2}
    whole = trained(sd3, words, data(), folder=tmp_path / "whole", **changes)
    trained(sd3, words, data(), folder=tmp_path / "cut", on_step=stop_at(3), **changes)
    resumed = trained(sd3, words, data(), folder=tmp_path / "cut", **changes)
    assert same(resumed, whole)
    assert "validation_loss_other_control" in whole.info["training"]
