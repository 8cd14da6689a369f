"""Baselines train by the same engine, act when they are put on, and leave the base as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from diffscaler_core import DiffScalerError
from diffscaler_core.errors import UnknownNameError
from diffscaler_core.training import as_denoiser, validation_loss
from diffscaler_core.training.baselines import BASELINES, TrainedBaseline, train_baseline
from diffscaler_core.training.conditioning import Prompts, prompts_for

from .bases import dit_pipe, unet_pipe
from .runs import config_of, data_of

SETTINGS = {
    "full": {},
    "peft_lora": {"r": 2, "lora_alpha": 2},
    "peft_dora": {"r": 2, "lora_alpha": 2},
    "peft_oft": {"oft_block_size": 4},
    "peft_ia3": {},
}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(pipe, baseline, pictures, **changes):
    denoiser = as_denoiser(pipe)
    return train_baseline(
        denoiser,
        data_of(denoiser, pictures),
        config_of(drop=0.0, **changes),
        baseline=baseline,
        settings=SETTINGS[baseline],
    )


def loss(denoiser, data):
    return validation_loss(denoiser, data, prompts_for(denoiser, data.prompts))


@pytest.mark.parametrize("make", [dit_pipe, unet_pipe])
@pytest.mark.parametrize("baseline", BASELINES)
def test_learns_and_leaves_the_base_alone(baseline, make, pictures):
    if baseline.startswith("peft"):
        pytest.importorskip("peft")
    pipe = make()
    denoiser = as_denoiser(pipe)
    model, data = denoiser.model, data_of(denoiser, pictures)
    before, start = state(model), loss(denoiser, data)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    done = trained(pipe, baseline, pictures, lr=3e-3 if baseline == "full" else 3e-2)
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    with done.on(denoiser):
        assert loss(denoiser, data) < start - 0.002
    assert loss(denoiser, data) == start
    assert all(torch.equal(state(model)[name], before[name]) for name in before)


def test_counts_what_is_trained(pictures):
    pytest.importorskip("peft")
    model = as_denoiser(dit_pipe()).model
    full = trained(dit_pipe(), "full", pictures, steps=1)
    rows = 2 * 2 * 16  # two new classes in the tables of two blocks, which travel in the task
    assert full.task.num_parameters == rows
    assert full.num_parameters == sum(p.numel() for p in model.parameters()) + rows
    lora = trained(dit_pipe(), "peft_lora", pictures, steps=1)
    linears = [model.get_submodule(name) for name in lora.names]
    assert lora.num_parameters == sum(2 * (m.in_features + m.out_features) for m in linears) + rows
    dora = trained(dit_pipe(), "peft_dora", pictures, steps=1)
    assert dora.num_parameters == lora.num_parameters + sum(m.out_features for m in linears)


def test_full_fine_tuning_is_plain_adamw(pictures):
    """The same steps written out: PyTorch's optimiser on the model, the engine's own batches."""
    pipe = dit_pipe()
    denoiser = as_denoiser(pipe)
    data = data_of(denoiser, pictures)
    config = config_of(steps=3, drop=0.0, lr=1e-3, schedule="constant", warmup=0, batch=4)
    labels = {"label": torch.tensor([3, 7])}  # the base's own: nothing is trained but weights
    prompts = Prompts(data.prompts, labels, {"label": torch.tensor([10])})
    seen = []
    done = train_baseline(
        denoiser, data, config, prompts=prompts, on_step=lambda now: seen.append(now.loss)
    )

    from diffscaler_core.training.learner import _DRAWS
    from diffscaler_core.training.objective import draw_times
    from diffscaler_core.training.randomness import generator_for

    other = as_denoiser(dit_pipe())
    moved = torch.optim.AdamW(
        other.model.requires_grad_(True).parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0
    )
    other.model.eval()
    losses = []
    for step in range(3):
        batch, draws = data.batch(4, config.seed, step), generator_for(config.seed, _DRAWS, step)
        t = draw_times(4, "uniform", generator=draws)
        noise = torch.randn(batch.x0.shape, generator=draws)
        timestep, x_t = other.objective.noisy(batch.x0, noise, t)
        output = other.predict(x_t, timestep, prompts(batch.index))
        loss = other.objective.loss(output, batch.x0, noise, t).mean()
        moved.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), config.clip)
        moved.step()
        losses.append(loss.item())
    assert seen == pytest.approx(losses, rel=1e-5)
    for name, parameter in other.model.named_parameters():
        assert torch.allclose(done.weights[name], parameter, atol=1e-5), name


def test_saves_a_checkpoint(pictures, tmp_path):
    done = trained(dit_pipe(), "full", pictures, steps=2)
    tensors = load_file(done.save(tmp_path / "tuned.safetensors"))
    model = as_denoiser(dit_pipe()).model
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert not [name for name in missing if name in dict(model.named_parameters())]
    assert any(
        not torch.equal(tensors[n], p) for n, p in as_denoiser(dit_pipe()).model.named_parameters()
    )


@pytest.mark.parametrize("baseline", ["full", "peft_lora"])
def test_an_interrupt_leaves_the_base_alone(baseline, pictures):
    pytest.importorskip("peft")
    pipe = dit_pipe()
    model = as_denoiser(pipe).model
    before, steps = state(model), itertools.count()

    def stop(now):
        if next(steps) == 2:
            raise RuntimeError("the host says stop")
        return False

    denoiser = as_denoiser(pipe)
    with pytest.raises(RuntimeError, match="host says stop"):
        train_baseline(
            denoiser,
            data_of(denoiser, pictures),
            config_of(),
            baseline=baseline,
            settings=SETTINGS[baseline],
            on_step=stop,
        )
    assert list(state(model)) == list(before)
    assert all(torch.equal(state(model)[name], before[name]) for name in before)


def test_refuses_what_is_no_baseline(pictures):
    denoiser = as_denoiser(dit_pipe())
    with pytest.raises(UnknownNameError, match="peft_lora"):
        train_baseline(denoiser, data_of(denoiser, pictures), baseline="dora")


def test_peft_missing_is_one_line(pictures, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    denoiser = as_denoiser(dit_pipe())
    before = state(denoiser.model)
    with pytest.raises(DiffScalerError, match=r"pip install 'diffscaler\[peft\]'"):
        train_baseline(denoiser, data_of(denoiser, pictures), baseline="peft_lora")
    assert all(torch.equal(state(denoiser.model)[name], before[name]) for name in before)


def test_is_a_record(pictures):
    done = trained(dit_pipe(), "full", pictures, steps=2)
    assert isinstance(done, TrainedBaseline)
    assert done.task.info["training"]["steps_done"] == 2
    assert done.nbytes == 4 * done.num_parameters
