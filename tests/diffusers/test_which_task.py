"""Which task fits, on the pocket pipeline: pictures that the shipped tasks draw here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from diffscaler_core import load_task, scale_task
from diffscaler_core.pocket import load_pipeline
from diffscaler_core.systems.which_task import ProbeSettings, which_task, which_tasks
from diffscaler_core.training import as_denoiser
from diffscaler_core.training.conditioning import prompts_for
from diffscaler_core.training.preview import sample_latents

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"
ASKED = {"fruits": "apple", "smileys": "smile", "ink": "house", "neon": "house"}
SETTINGS = ProbeSettings(stages=((6, 1),))


@pytest.fixture(scope="module")
def base():
    return load_pipeline(POCKET)


@pytest.fixture(scope="module")
def words():
    return load_task(POCKET / "diffscaler" / "words.safetensors")


@pytest.fixture(scope="module")
def tasks():
    return {name: load_task(POCKET / "diffscaler" / f"{name}.safetensors") for name in ASKED}


@pytest.fixture(scope="module")
def pictures(base, words, tasks):
    """One picture (1, 3, 96, 96) by each task, in few steps."""
    denoiser, drawn = as_denoiser(base), {}
    with torch.no_grad(), denoiser.held():
        for seed, (name, word) in enumerate(ASKED.items()):
            stored = tasks[name] if tasks[name].prompts else words
            prompts = prompts_for(denoiser, [word], "stored", words=stored, null=words)
            noise = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(seed))
            with denoiser.attached({name: tasks[name]}):
                told = prompts(torch.tensor([0]))
                latents = sample_latents(denoiser, told, prompts.null(1), noise, steps=8)
            drawn[name] = denoiser.decode(latents)
    return drawn


def test_each_shipped_task_is_known_by_its_picture(base, words, tasks, pictures):
    found = which_tasks(base, pictures.values(), tasks, None, SETTINGS, words=words)
    assert [ranking.answer for ranking in found] == list(pictures)


def test_without_their_tasks_pictures_are_not_told_apart(base, words, tasks, pictures):
    off = {name: scale_task(task, 0.0) for name, task in tasks.items()}
    found = list(which_tasks(base, pictures.values(), off, None, SETTINGS, words=words))
    assert [ranking.answer for ranking in found] == [None] * 4
    assert len({ranking.best.name for ranking in found}) == 1


def test_a_control_task_is_refused_and_a_base_without_words(base, words, tasks, pictures):
    edges = load_task(POCKET / "diffscaler" / "edges.safetensors")
    with pytest.raises(ValueError, match="'edges' takes control pictures"):
        which_task(base, pictures["ink"], {**tasks, "edges": edges}, words=words)
    with pytest.raises(ValueError, match="the null prompt is not known"):
        which_task(base, pictures["ink"], tasks)
