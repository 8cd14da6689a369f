"""Condition embedding perturbation (arXiv:2405.20494), as it reaches the base in a real run."""

import itertools
import math

import pytest
import torch

from diffscaler_core.training import TaskRun, TrainingData, train_tasks

from .runs import config_of, same

WIDTH, G = 12, 1.0  # of the tiny base's prompts; γ


def data_for(seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 6, 4, 8, 8, generator=generator)
    return TrainingData(latents, torch.arange(6) % 2, ("blue", "red"))


def seen_by_the_base(sd3, words, **changes):
    """Returns (task, embeddings per training step, embeddings of validations), (B, 3, 12) each."""
    trained, validated = [], []
    predict = sd3.predict

    def watched(x_t, timestep, told):
        (trained if torch.is_grad_enabled() else validated).append(told["context"].detach().clone())
        return predict(x_t, timestep, told)

    object.__setattr__(sd3, "predict", watched)
    run = TaskRun("tiny", data_for(0), words=words, validation=data_for(1))
    task = train_tasks(sd3, [run], config_of(steps=30, batch=16, **changes))["tiny"]
    object.__setattr__(sd3, "predict", predict)
    # without the look at one picture that every run begins with
    return task, trained, [rows for rows in validated if len(rows) > 1]


def apart(rows, words):
    """Returns what was added to each row, with the stored prompt it is nearest to, and which."""
    table = words.conditioning["context"]
    gaps = rows[:, None] - table[None]
    nearest = gaps.flatten(2).norm(dim=2).argmin(1)
    return gaps[torch.arange(len(rows)), nearest], nearest


@pytest.mark.parametrize(("kind", "factor"), [("uniform", 1 / math.sqrt(3)), ("gaussian", 1.0)])
def test_the_base_is_told_noisy_prompts_in_training_and_clean_ones_elsewhere(
    sd3, words, kind, factor
):
    config = {"perturb": kind, "perturb_gamma": G, "drop": 0.3}
    _, trained, validated = seen_by_the_base(sd3, words, **config)
    noise, which = zip(*(apart(rows, words) for rows in trained), strict=True)
    null = [one == words.prompts.index("") for one in which]
    told = torch.cat([one[~out] for one, out in zip(noise, null, strict=True)])
    assert abs(float(told.std()) / (factor * G / math.sqrt(WIDTH)) - 1) < 0.03
    dropped = torch.cat([one[out] for one, out in zip(noise, null, strict=True)])
    assert len(dropped) > 50
    assert not bool(dropped.any())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(noise))
    assert validated
    assert not any(bool(apart(rows, words)[0].any()) for rows in validated)
    _, again, _ = seen_by_the_base(sd3, words, **config)
    assert all(torch.equal(a, b) for a, b in zip(trained, again, strict=True))
    _, other, _ = seen_by_the_base(sd3, words, **config, seed=6)
    assert not any(torch.equal(a, b) for a, b in zip(trained, other, strict=True))


def test_off_and_no_gamma_are_the_same_run_bit_for_bit(sd3, words):
    plain, trained, _ = seen_by_the_base(sd3, words)
    assert not any(bool(apart(rows, words)[0].any()) for rows in trained)
    none, _, _ = seen_by_the_base(sd3, words, perturb="gaussian", perturb_gamma=0.0)
    assert same(none, plain)
    some, _, _ = seen_by_the_base(sd3, words, perturb="gaussian")
    assert not same(some, plain)
