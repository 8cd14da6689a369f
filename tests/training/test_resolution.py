"""Training at a higher resolution: stretched positions while it lasts, and said in the file."""

import pytest
import torch

from diffscaler_core import DiffScalerError, load_task, save_task
from diffscaler_core.describe import describe
from diffscaler_core.resolution import at_resolution
from diffscaler_core.training import (
    TrainingData,
    choose_ranks,
    prompts_for,
    train_task,
    validation_loss,
)
from diffscaler_core.training.command.plan import plan_task
from diffscaler_core.training.command.run_data import picture_size
from diffscaler_core.training.settings import settings_of

from .runs import config_of

CONFIG = dict(steps=3, batch=2, at_resolution=2.0, validate_every=3)


def pictures(side: int = 16) -> TrainingData:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 4, side, side, generator=generator)
    return TrainingData(latents, torch.tensor([0, 0, 1, 1]), ("red", "blue"))


def test_a_run_stretches_positions_and_says_so(sd3, words, tmp_path):
    data, seen = pictures(), []
    prompts = prompts_for(sd3, data.prompts, words=words)
    config = config_of(**CONFIG)
    task = train_task(
        sd3, data, config, words=words, validation=data, on_step=lambda now: seen.append(now)
    )
    assert task.info["resolution"] == 2.0
    assert "cropped_pos_embed" not in sd3.model.pos_embed.__dict__
    plain = validation_loss(sd3, data, prompts, task)
    with at_resolution(sd3.model, 2):
        stretched = validation_loss(sd3, data, prompts, task)
    assert seen[-1].validation == pytest.approx(stretched, rel=1e-5)
    assert abs(plain - stretched) > 1e-5
    back = load_task(save_task(task, tmp_path / "t.safetensors"))
    assert "2 times the base's" in describe(back)
    assert "resolution" not in train_task(sd3, data, config_of(steps=1), words=words).info


def test_the_plan_and_the_pictures_follow(sd3, words):
    data = pictures(24)  # 12 tokens a side, where the table has 8
    prompts = prompts_for(sd3, data.prompts, words=words)
    assert plan_task(sd3, config_of(**CONFIG), data, prompts).activation_bytes > 0
    said = {"base": "b", "data": "d", "at_resolution": 2.0}
    assert picture_size(settings_of(said), sd3) == 2 * sd3.size
    with pytest.raises(DiffScalerError, match="at_resolution must be above 0"):
        config_of(at_resolution=0.0)


def test_ranks_are_chosen_at_that_resolution(sd3, words):
    """A picture of 12 tokens a side, where the table has 8: only stretched it can be looked at."""
    data, config = pictures(24), config_of(**CONFIG, rank_budget=2)
    chosen = choose_ranks(sd3, data, config, words=words)
    with at_resolution(sd3.model, 2):
        same = choose_ranks(sd3, data, config_of(**{**CONFIG, "at_resolution": 1.0}, rank_budget=2),
                            words=words)  # fmt: skip
    assert chosen.ranks == same.ranks
    assert "cropped_pos_embed" not in sd3.model.pos_embed.__dict__
