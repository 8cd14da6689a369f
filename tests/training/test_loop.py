import dataclasses
import json

import pytest
import torch

from diffscaler_core import attach, load_task, new_task, save_task
from diffscaler_core.errors import DiffScalerError, UnknownNameError
from diffscaler_core.training import DivergedError, prompts_for, train_task
from diffscaler_core.training.frozen import frozen
from diffscaler_core.training.optimizer import Ema, rate_at

from .runs import config_of, data_of, same, trained, weights_of


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_goes_down_and_the_base_stays_bit_for_bit(denoiser, pictures, words, checkpointing):
    before = {k: v.clone() for k, v in denoiser.model.state_dict().items()}
    flags = [p.requires_grad for p in denoiser.model.parameters()]
    losses = []
    task = trained(
        denoiser, pictures, words, lambda p: losses.append(p.loss), checkpointing=checkpointing
    )
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    after = denoiser.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [p.requires_grad for p in denoiser.model.parameters()] == flags
    assert all(p.grad is None for p in denoiser.model.parameters())
    assert not any(module._forward_hooks for module in denoiser.model.modules())
    assert denoiser.model.training
    assert not getattr(denoiser.model, "is_gradient_checkpointing", False)
    assert any(bool(t["up"].any()) for t in task.layers.values())


def test_checkpointing_changes_memory_not_numbers(denoiser, pictures, words):
    plain, recomputed = (
        trained(denoiser, pictures, words, steps=3, checkpointing=flag) for flag in (False, True)
    )
    for a, b in zip(weights_of(plain), weights_of(recomputed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers(sd3, pictures, words):
    one, two = (trained(sd3, pictures, words, steps=5) for _ in range(2))
    other = trained(sd3, pictures, words, steps=5, seed=6)
    assert same(one, two)
    assert not same(one, other)


def test_global_random_state_is_left_alone(sd3, pictures, words):
    state = torch.random.get_rng_state()
    one = trained(sd3, pictures, words, steps=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert same(one, trained(sd3, pictures, words, steps=3))


def test_new_prompts_are_learned_and_stored_with_the_task(sd3, pictures, words, tmp_path):
    task = trained(sd3, pictures, words, steps=5, prompts="learned", prompt_noise=0.5)
    start = prompts_for(sd3, ("blue", "red"), "learned", words=words, noise=0.5, seed=5)
    assert task.prompts == ("blue", "red")
    assert task.conditioning["context"].shape == (2, 3, 12)
    assert not torch.equal(task.conditioning["context"], start.context)
    again = load_task(save_task(task, tmp_path / "t.safetensors"))
    context, pooled = again.prompt("red")
    assert torch.equal(context[0], task.conditioning["context"][1])
    assert pooled is not None


def test_prompts_alone_can_be_learned(sd3, pictures, words, tmp_path):
    task = trained(sd3, pictures, words, steps=5, method="prompts", prompts="learned")
    assert not task.layers
    assert load_task(save_task(task, tmp_path / "p.safetensors")).prompts == ("blue", "red")


def test_stored_words_are_not_copied_into_the_task(sd3, pictures, words):
    assert not trained(sd3, pictures, words, steps=2).conditioning


@pytest.mark.parametrize("how", ["ctrl-c", "callback"])
def test_an_early_end_keeps_the_state_so_far(sd3, pictures, words, how):
    before = {k: v.clone() for k, v in sd3.model.state_dict().items()}

    def stop(progress):
        if progress.step == 7 and how == "ctrl-c":
            raise KeyboardInterrupt
        return progress.step == 7

    task = trained(sd3, pictures, words, stop, schedule="constant")
    assert task.info["training"]["steps_done"] == 7
    assert same(task, trained(sd3, pictures, words, steps=7, schedule="constant"))
    assert all(torch.equal(v, before[k]) for k, v in sd3.model.state_dict().items())


def test_an_exception_leaves_the_base_clean(sd3, pictures, words):
    def fail(progress):
        raise RuntimeError("no more disk")

    flags = [p.requires_grad for p in sd3.model.parameters()]
    with pytest.raises(RuntimeError, match="no more disk"):
        trained(sd3, pictures, words, fail)
    assert [p.requires_grad for p in sd3.model.parameters()] == flags
    assert not any(module._forward_hooks for module in sd3.model.modules())


def test_a_loss_that_is_no_number_is_one_error_with_the_last_good_state(sd3, pictures, words):
    calls = []

    def predict(x, timestep, condition):
        calls.append(1)
        last = len(calls) == 7  # the first call is the look before the first step
        return sd3.predict(x, timestep, condition) * (float("nan") if last else 1)

    broken = dataclasses.replace(sd3, predict=predict)
    with pytest.raises(DivergedError, match="became nan at step 6 of 40") as caught:
        trained(broken, pictures, words, schedule="constant")
    good = caught.value.task
    assert good.info["training"]["steps_done"] == 5
    assert same(good, trained(sd3, pictures, words, steps=5, schedule="constant"))
    assert not any(module._forward_hooks for module in sd3.model.modules())


def test_training_goes_on_from_a_task_and_leaves_that_one_alone(sd3, pictures, words):
    first = trained(sd3, pictures, words, steps=3)
    kept = [t.clone() for t in weights_of(first)]
    half = first.replace(
        layers={n: {p: t.half() for p, t in own.items()} for n, own in first.layers.items()}
    )
    second = trained(sd3, pictures, words, steps=3, task=half)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first), kept, strict=True))
    assert all(t.dtype == torch.float32 for t in weights_of(second))
    assert not same(first, second)


def test_facts_of_the_run_are_in_the_task(sd3, pictures, words):
    task = trained(sd3, pictures, words, steps=2)
    facts = json.loads(json.dumps(task.info["training"]))
    assert (facts["steps"], facts["steps_done"], facts["images"], facts["seed"]) == (2, 2, 6, 5)
    assert facts["objective"] == "flow"
    assert facts["lr"] == 1e-2
    assert facts["loss"] > 0
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert str(pictures) not in json.dumps(dict(task.info))


def test_the_running_mean_is_what_is_saved(sd3, pictures, words):
    seen = []
    data, config = data_of(sd3, pictures), config_of(steps=4, ema=0.9)
    plain = train_task(sd3, data, config_of(steps=4), words=words)
    mean = train_task(sd3, data, config, words=words, on_step=lambda p: seen.append(p.step))
    assert seen == [1, 2, 3, 4]
    assert not same(plain, mean)
    params = [torch.zeros(2)]
    ema = Ema(params, 0.5)
    ema.update([torch.ones(2)], 1)
    assert ema.mean[0].tolist() == pytest.approx([9 / 11, 9 / 11])


def test_bf16_autocast_trains_float32_parameters(sd3, pictures, words):
    losses = []
    task = trained(sd3, pictures, words, lambda p: losses.append(p.loss), precision="bf16")
    assert all(t.dtype == torch.float32 for t in weights_of(task))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_half_precision_base_trains_float32_parameters(sd3, pictures, words):
    data = data_of(sd3, pictures)
    sd3.model.to(torch.bfloat16)
    losses = []
    task = train_task(sd3, data, config_of(), words=words, on_step=lambda p: losses.append(p.loss))
    assert all(t.dtype == torch.float32 for t in weights_of(task))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_subspaces_may_have_another_activation(sd3, pictures, words):
    data = data_of(sd3, pictures)
    task = train_task(sd3, data, config_of(activation="identity"), words=words)
    assert (task.info["method"], task.info["activation"]) == ("diffscaler", "identity")
    assert train_task(sd3, data, config_of(), words=words).info["activation"] == "relu"


def test_scale_and_shift_have_their_own_rate(sd3, pictures, words):
    task = trained(sd3, pictures, words, steps=1, lr=1e-3, lr_scale_shift=0.5, warmup=0, clip=0)
    moved = next(t for t in task.layers.values() if bool(t["scale"].any()))
    assert float(moved["scale"].abs().max()) == pytest.approx(0.5, rel=1e-3)
    assert float(moved["up"].abs().max()) == pytest.approx(1e-3, rel=1e-3)


def test_rates_rise_then_fall():
    config = config_of(steps=100, warmup=10)
    rates = [rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[55] == pytest.approx(0.505)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.012


def test_the_task_of_another_base_is_refused(sd3, pictures, words):
    import diffusers

    other = diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    with pytest.raises(DiffScalerError, match="does not fit"):
        trained(sd3, pictures, words, task=new_task(other))
    assert not any(module._forward_hooks for module in sd3.model.modules())


def test_frozen_gives_every_flag_back(sd3):
    modes = [module.training for module in sd3.model.modules()]

    def interrupted():
        with frozen(sd3.model, checkpointing=True):
            assert sd3.model.is_gradient_checkpointing
            assert not sd3.model.training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in sd3.model.modules()] == modes
    assert not sd3.model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"drop": 1.5}, "drop must be 0 to 1"),
        ({"schedule": "sine"}, "unknown schedule 'sine'; known: cosine, linear, constant"),
        ({"precision": "fp8"}, "unknown precision"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises((DiffScalerError, UnknownNameError), match=message):
        config_of(**change)


def test_a_trained_task_changes_the_picture(sd3, pictures, words):
    from diffscaler_core.training import preview

    task = trained(sd3, pictures, words)
    prompts = prompts_for(sd3, ("blue", "red"), words=words)
    shown = preview(sd3, task, prompts, (4, 8, 8), steps=2)
    assert len(shown) == 2
    assert shown[0].shape == (3, 16, 16)
    again = preview(sd3, task, prompts, (4, 8, 8), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(shown, again, strict=True))
    base = preview(sd3, new_task(sd3.model, rank=2), prompts, (4, 8, 8), steps=2)
    assert not torch.equal(shown[0], base[0])
    with attach(sd3.model, task):
        assert any(module._forward_hooks for module in sd3.model.modules())


def test_fp16_scales_its_gradients_and_resumes(sd3, pictures, words, tmp_path):
    losses = []
    changes = {"precision": "fp16", "steps": 20}
    whole = trained(sd3, pictures, words, lambda p: losses.append(p.loss), **changes)
    assert all(t.dtype == torch.float32 for t in weights_of(whole))
    assert sum(losses[-5:]) < sum(losses[:5])
    trained(sd3, pictures, words, lambda p: p.step == 9, folder=tmp_path, **changes)
    assert same(trained(sd3, pictures, words, folder=tmp_path, **changes), whole)


def test_a_quantised_base_is_trained_on_as_it_is(sd3, pictures, words):
    quantization = pytest.importorskip("torchao.quantization")
    data = data_of(sd3, pictures)
    quantization.quantize_(sd3.model, quantization.Int8WeightOnlyConfig())
    kept = sd3.model.transformer_blocks[0].attn.to_q.weight
    assert type(kept) is not torch.nn.Parameter
    before, losses = kept.dequantize().clone(), []
    train_task(sd3, data, config_of(), words=words, on_step=lambda p: losses.append(p.loss))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert torch.equal(sd3.model.transformer_blocks[0].attn.to_q.weight.dequantize(), before)
