"""Pictures that must not be forgotten, and pictures that come with their own prompts."""

import pytest
import torch

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.training import (
    Prompts,
    TaskRun,
    TrainingConfig,
    TrainingData,
    prompts_for,
    train_tasks,
    validation_loss,
)
from diffscaler_core.training.data.batches import Batch
from diffscaler_core.training.learner import Learner

from .runs import config_of, farthest, same


def data_for(seed, names=("blue", "red")):
    latents = torch.randn(1, 6, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TrainingData(latents, torch.arange(6) % len(names), names)


def learner_for(base, trainable, words, config, prior=None):
    run = TaskRun("tiny", data_for(0), words=words, prior=prior)
    told = prompts_for(base, run.data.prompts, words=words)
    others = None if prior is None else prompts_for(base, prior.prompts, words=words)
    return Learner(run, trainable, told, others, config, base.objective, base.device)


@pytest.fixture
def trainable(sd3):
    from diffscaler_core import new_task

    with sd3.attached({"tiny": new_task(sd3.model, rank=2, name="tiny")}) as trainable:
        yield trainable.requires_grad_(True)


def test_prior_pictures_take_their_share_with_their_own_prompts(sd3, words, trainable):
    config = config_of(batch=8, prior_share=0.25, drop=0.0)
    prior = data_for(1, ("green", ""))
    learner = learner_for(sd3, trainable, words, config, prior)
    drawn = learner.draw(3)
    assert drawn.prior.tolist() == [False] * 6 + [True] * 2
    shown = drawn.x0[drawn.prior]
    assert all(any(torch.equal(x, y) for y in prior.latents[0]) for x in shown)
    told = learner.condition(drawn)["context"]
    for row, is_prior, index in zip(told, drawn.prior, drawn.index, strict=True):
        name = (("green", "") if is_prior else ("blue", "red"))[int(index)]
        assert torch.equal(row, words.prompt(name)[0][0])


def test_prior_pictures_weigh_what_they_are_told_to(sd3, words, trainable):
    config = config_of(batch=8, prior_share=0.5, prior_weight=0.25)
    learner = learner_for(sd3, trainable, words, config, data_for(1))
    drawn = learner.draw(0)
    weighted, plain = learner.losses(torch.zeros_like(drawn.x0), drawn)
    torch.testing.assert_close(weighted[drawn.prior], 0.25 * plain[drawn.prior])
    torch.testing.assert_close(weighted[~drawn.prior], plain[~drawn.prior])


def test_chained_weights_grow_for_the_task_and_fall_for_the_prior(sd3, words, trainable):
    config = config_of(batch=64, weighting="chain", prior_weight=1.0)
    learner = learner_for(sd3, trainable, words, config, data_for(1))
    drawn = learner.draw(0)
    weighted, plain = learner.losses(torch.zeros_like(drawn.x0), drawn)
    weights = weighted / plain
    torch.testing.assert_close(weights[~drawn.prior], 2 * drawn.t[~drawn.prior])
    torch.testing.assert_close(weights[drawn.prior], 2 * (1 - drawn.t[drawn.prior]))


def test_the_prior_holds_the_task_back(sd3, words):
    """With the base's own predictions to keep, the task moves the base less elsewhere."""
    told = prompts_for(sd3, ("green",), words=words)
    other = data_for(5, ("green",))

    def drift(prior):
        run = TaskRun("tiny", data_for(0), words=words, prior=prior)
        task = train_tasks(sd3, [run], config_of(steps=30, prior_share=0.5))["tiny"]
        return validation_loss(sd3, other, told, task)

    assert drift(other) < drift(None)


def test_learned_prompts_and_other_sizes_are_refused_for_the_prior(sd3, words):
    small = TrainingData(torch.randn(1, 4, 4, 4, 4), torch.zeros(4).long(), ("red",))
    with pytest.raises(DiffScalerError, match="prepare both at one size"):
        train_tasks(sd3, [TaskRun("a", data_for(0), words=words, prior=small)], config_of(steps=1))
    unknown = data_for(1, ("zebra",))
    with pytest.raises(DiffScalerError, match="must be known to the base"):
        train_tasks(sd3, [TaskRun("a", data_for(0), words=words, prior=unknown)], config_of())


class Stream:
    """Batches that bring their own conditions, as a stream of captioned pictures does."""

    prompts, skipped, image_ids, control = ("caption",), (), (), None
    shape = (4, 8, 8)

    def __init__(self, words):
        self.data, self.words = data_for(0), words

    def __len__(self):
        return 0

    def batch(self, size, seed, step):
        own = self.data.batch(size, seed, step)
        rows = [self.words.prompts.index(self.data.prompts[i]) for i in own.index]
        told = {name: table[rows] for name, table in self.words.conditioning.items()}
        return Batch(own.x0, torch.zeros(size).long(), None, told)

    def whole(self, size):
        return iter(())

    def split(self, share, seed=0):
        return self, data_for(3).select([])


def test_a_stream_with_its_own_conditions_trains_as_the_same_prompts_would(sd3, words):
    null = {name: table[:1] for name, table in words.conditioning.items()}
    prompts = Prompts(("caption",), null, null)
    config = config_of(steps=4, perturb="gaussian")
    streamed = train_tasks(sd3, [TaskRun("tiny", Stream(words), prompts)], config)["tiny"]
    plain = train_tasks(sd3, [TaskRun("tiny", data_for(0), words=words)], config)["tiny"]
    assert farthest(streamed, plain) < 1e-6
    told_nothing = train_tasks(sd3, [TaskRun("tiny", data_for(0, ("",)), words=words)], config)[
        "tiny"
    ]
    assert not same(streamed, told_nothing)


def test_validation_of_a_single_picture_or_a_stream_is_left_out(sd3, words):
    one = TrainingData(torch.randn(1, 1, 4, 8, 8), torch.zeros(1).long(), ("red",))
    config = TrainingConfig(steps=1, batch=2, rank=2, validation_share=0.5)
    task = train_tasks(sd3, [TaskRun("a", one, words=words)], config)["a"]
    assert "validation_loss" not in task.info["training"]
