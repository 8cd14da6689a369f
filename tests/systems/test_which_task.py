"""Which task fits: on clusters whose truth is known."""

from __future__ import annotations

import pytest
import torch

from diffscaler_core import DiffScalerError, attach, scale_task
from diffscaler_core.systems.which_task import (
    ERRORS,
    ProbeSettings,
    halving,
    which_task,
    which_tasks,
)
from diffscaler_core.training.objective import KINDS, Objective, combine, separate, spread

from .clusters import LABELS, NULL, World, world

EIGHT = ProbeSettings(probes=8, stages=((8, 1),))
SIXTEEN = ProbeSettings(probes=16, stages=((16, 1),))


@pytest.fixture(scope="module")
def base() -> World:
    return world()


def three(base: World, strength: float = 1.0):
    return {n: scale_task(t, strength) for n, t in list(base.tasks.items())[:3]}


def rankings(base: World, tasks, count: int, settings=EIGHT):
    """(number of the true task, ranking) of so many points of each of the first three clusters."""
    for truth in range(3):
        points = base.points(LABELS + truth, count, 77 + truth)
        found = which_tasks(base.denoiser, points[:, None], tasks, None, settings, latents=True)
        yield from ((f"task{truth}", ranking) for ranking in found)


def accuracy(found) -> float:
    hits = [ranking.best.name == truth for truth, ranking in found]
    return sum(hits) / len(hits)


def test_three_tasks_are_told_apart_by_eight_probes(base):
    found = list(rankings(base, three(base), 20))
    assert accuracy(found) >= 0.9
    assert sum(ranking.answer == truth for truth, ranking in found) >= 0.9 * len(found)


def test_tasks_at_strength_0_are_not_told_apart(base):
    found = list(rankings(base, three(base, 0.0), 4))
    assert accuracy(found) == pytest.approx(1 / 3)
    assert all(ranking.answer is None for _, ranking in found)
    assert all(fit.difference == 0 for _, ranking in found for fit in ranking.fits)


def test_one_seed_gives_one_ranking_and_another_seed_another(base):
    point = base.points(LABELS + 1, 1, 3)
    again = [
        which_task(base.denoiser, point, three(base), settings=settings, latents=True)
        for settings in (EIGHT, EIGHT, ProbeSettings(probes=8, stages=((8, 1),), seed=1))
    ]
    assert again[0] == again[1]
    assert again[0] != again[2]


def test_a_picture_does_not_depend_on_those_beside_it(base):
    points = base.points(LABELS, 3, 3)[:, None]
    together = list(which_tasks(base.denoiser, points, three(base), None, EIGHT, latents=True))
    alone = which_task(base.denoiser, points[2], three(base), None, EIGHT, latents=True)
    assert together[2] == alone


@pytest.mark.parametrize("batch", [1, 3, 5, 1000])
def test_the_batch_changes_nothing_but_rounding(base, batch):
    point = base.points(LABELS, 1, 3)
    settings = ProbeSettings(probes=8, stages=((3, 2), (8, 1)))
    one, other = (
        which_task(base.denoiser, point, three(base), {None: ["red"]}, own, latents=True)
        for own in (settings, ProbeSettings(probes=8, stages=((3, 2), (8, 1)), batch=batch))
    )
    assert one.forwards == other.forwards
    for a, b in zip(one.fits, other.fits, strict=True):
        assert (a.name, a.probes) == (b.name, b.probes)
        assert a.difference == pytest.approx(b.difference, abs=1e-5)
        assert a.standard_error == pytest.approx(b.standard_error, abs=1e-5)


def test_the_error_is_that_of_each_task_alone(base):
    """The same numbers, one probe and one task at a time, with nothing shared but the noise."""
    from diffscaler_core.training.randomness import generator_for

    point, tasks = base.points(LABELS, 1, 3), three(base)
    found = which_task(base.denoiser, point, tasks, None, EIGHT, latents=True)

    def error(task) -> torch.Tensor:
        total = []
        for i in range(8):
            noise = torch.randn(2, 2, 2, generator=generator_for(0, "which task", i, 0))[None]
            t = torch.tensor([(0.5 + i * (5**0.5 - 1) / 2) % 1])
            x_t = (1 - t) * point + t * noise
            with torch.no_grad(), attach(base.denoiser.model, task):
                said = base.denoiser.model(x_t, t, torch.tensor([NULL]))
            total.append((said - (noise - point)).square().mean())
        return torch.stack(total).double()

    nobody = error(scale_task(tasks["task0"], 0.0))
    assert found.base_error == pytest.approx(float(nobody.mean()), abs=1e-5)
    for fit in found.fits:
        gap = error(tasks[fit.name]) - nobody
        assert fit.difference == pytest.approx(float(gap.mean()), abs=1e-5)
        assert fit.standard_error == pytest.approx(float(gap.std() / 8**0.5), abs=1e-5)


def test_one_task_under_two_names_has_one_score(base):
    """Which would not be so if each candidate had noise of its own."""
    task = base.tasks["task0"]
    point = base.points(LABELS, 1, 3)
    found = which_task(base.denoiser, point, {"a": task, "b": task}, None, EIGHT, latents=True)
    one, other = found.fits
    assert one.difference == pytest.approx(other.difference, abs=1e-6)
    assert found.margin == pytest.approx((0.0, 0.0), abs=1e-6)
    assert one.standard_error > 1e-4


def noise_pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return 1.5 * torch.randn(count, 1, 2, 2, 2, generator=generator)


def test_noise_is_none_of_them(base):
    found = list(
        which_tasks(base.denoiser, noise_pictures(20), three(base), None, SIXTEEN, latents=True)
    )
    assert sum(ranking.answer is None for ranking in found) >= 0.9 * len(found)
    assert all(ranking.best.name in base.tasks for ranking in found)  # the rule alone says none


def test_a_cluster_without_a_task_is_none_of_them(base):
    strangers = base.points(LABELS + 7, 10, 4)[:, None]
    few, settings = three(base), ProbeSettings(stages=((32, 1),))
    found = list(which_tasks(base.denoiser, strangers, few, None, settings, latents=True))
    assert sum(ranking.answer is None for ranking in found) >= 9
    many = {**few, "task7": base.tasks["task7"]}
    found = list(which_tasks(base.denoiser, strangers, many, None, settings, latents=True))
    assert sum(ranking.answer == "task7" for ranking in found) >= 9


def test_halving_gives_the_same_answer_with_half_the_forwards(base):
    points = torch.cat([base.points(LABELS + i, 2, i) for i in range(12)])[:, None]
    quick, full = (
        list(which_tasks(base.denoiser, points, base.tasks, None, own, latents=True))
        for own in (ProbeSettings(probes=16), SIXTEEN)
    )
    assert [r.best.name for r in quick] == [r.best.name for r in full]
    assert all(2 * r.forwards <= r.full_forwards for r in quick)
    assert all(r.forwards == r.full_forwards == 13 * 16 for r in full)
    for one, other in zip(quick, full, strict=True):
        assert one.best.difference == pytest.approx(other.best.difference, abs=1e-5)


def test_prompts_of_the_base_are_candidates(base):
    for label, name in enumerate(("red", "green", "blue")):
        points = base.points(label, 6, label)[:, None]
        words = {None: ["red", "green", "blue"]}
        found = list(which_tasks(base.denoiser, points, {}, words, SIXTEEN, latents=True))
        assert sum(ranking.answer == name for ranking in found) >= 5
        told = which_task(
            base.denoiser, points[0], {}, words, SIXTEEN, latents=True,
            nothing={"label": torch.tensor([label])},
        )  # fmt: skip
        assert told.answer is None  # the base was told already


def test_tasks_with_prompts_are_named_by_both(base):
    found = which_task(
        base.denoiser, base.points(LABELS, 1, 3), three(base),
        {"task0": ["red", "blue"], None: ["red"]}, EIGHT, latents=True,
    )  # fmt: skip
    assert {(f.name, f.task, f.prompt) for f in found.fits} == {
        ("task0: red", "task0", "red"),
        ("task0: blue", "task0", "blue"),
        ("task1", "task1", None),
        ("task2", "task2", None),
        ("red", None, "red"),
    }


def test_several_pictures_are_judged_together(base):
    points = base.points(LABELS + 2, 5, 9)
    found = which_task(base.denoiser, points, three(base), None, EIGHT, latents=True)
    assert found.answer == "task2"
    assert found.forwards == 5 * 8 * 4
    assert found.best.probes == 8
    alone = which_task(base.denoiser, points[:1], three(base), None, EIGHT, latents=True)
    assert found.best.sigmas > alone.best.sigmas


def test_progress_counts_forwards_and_may_end_it(base):
    seen: list[tuple[int, int]] = []
    point = base.points(LABELS, 1, 3)
    before = base.denoiser.model(point, torch.tensor([0.5]), torch.tensor([NULL]))
    found = which_task(
        base.denoiser, point, base.tasks, latents=True,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (found.forwards, found.forwards)
    assert {total for _, total in seen} == {found.forwards}

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        which_task(base.denoiser, point, base.tasks, latents=True, on_progress=stop)
    after = base.denoiser.model(point, torch.tensor([0.5]), torch.tensor([NULL]))
    assert torch.equal(before, after)


def test_a_group_without_a_name_is_the_bare_base(base):
    x = base.points(0, 6, 1)
    t, label = torch.full((6,), 0.5), torch.full((6,), NULL)
    model, tasks = base.denoiser.model, three(base)
    with torch.no_grad():
        plain = model(x, t, label)
        with attach(model, tasks) as worn:
            worn.set_groups([None])
            assert torch.equal(model(x, t, label), plain)
            worn.set_groups(["task0", None, "task1"])
            mixed = model(x, t, label)
            worn.set_groups(["task0"])
            alone = model(x, t, label)
    assert torch.equal(mixed[2:4], plain[2:4])
    assert torch.allclose(mixed[:2], alone[:2], atol=1e-5)
    assert not torch.allclose(mixed[:2], plain[:2], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_the_noise_is_the_papers(kind):
    """‖ε − ε^‖² from the error of p and its weight, and by way of ε^ itself."""
    alphas = torch.linspace(0.99, 0.01, 10) if "flow" not in kind else None
    objective = Objective(kind, alphas_cumprod=alphas)
    x0, noise, wrong = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    _, alpha, sigma = objective.at(t)
    x_t = spread(alpha, x0) * x0 + spread(sigma, x0) * noise
    output = combine(kind, x0, noise, alpha, sigma) + wrong
    _, guessed = separate(kind, output, x_t, alpha, sigma)
    weighted = objective.loss(output, x0, noise, t) * ERRORS["noise"](objective, t)
    assert torch.allclose(weighted, (guessed - noise).square().mean(1), rtol=1e-3)


def test_a_share_of_the_bases_error_can_be_asked_for(base):
    point, tasks = base.points(LABELS, 1, 3), three(base)
    found = which_task(base.denoiser, point, tasks, None, EIGHT, latents=True)
    share = found.best.share
    assert found.answer == "task0"
    assert share == pytest.approx(-found.best.difference / found.base_error)
    for least, answer in ((share - 0.01, "task0"), (share + 0.01, None)):
        own = ProbeSettings(probes=8, stages=((8, 1),), least=least)
        again = which_task(base.denoiser, point, tasks, None, own, latents=True)
        assert again.answer == answer
        assert again.fits == found.fits


def test_halving_doubles_probes_and_halves_candidates():
    assert halving(1, 8) == ((8, 1),)
    assert halving(4, 16) == ((8, 2), (16, 1))
    assert halving(12, 16) == ((4, 3), (8, 2), (16, 1))
    assert halving(100, 3) == ((3, 1),)


def test_what_makes_no_sense_is_refused(base):
    point, few = base.points(LABELS, 1, 3), three(base)
    for wrong, said in [
        ({"probes": 1}, "at least 2"),
        ({"stages": ((4, 2), (4, 1))}, "grow from stage to stage"),
        ({"stages": ((4, 0),)}, "keep at least one"),
        ({"batch": 0}, "batch must be"),
        ({"low": 0.7, "high": 0.2}, "low < high"),
        ({"threshold": -1.0}, "threshold must not be negative"),
        ({"least": 1.0}, "least from 0 to below 1"),
        ({"error": "l7"}, "unknown error 'l7'"),
    ]:
        with pytest.raises(DiffScalerError, match=said):
            ProbeSettings(**wrong)
    for tasks, prompts, said in [
        ({}, None, "no candidate"),
        (few, {"task9": ["red"]}, "there is no such task"),
        ({"red": few["task0"]}, {None: ["red"]}, "two candidates are called 'red'"),
    ]:
        with pytest.raises(DiffScalerError, match=said):
            which_task(base.denoiser, point, tasks, prompts, EIGHT, latents=True)
