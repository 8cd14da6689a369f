"""The same prompt and noise under several tasks, and the grid of what came of it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .formula import close
from .routes import Routes, calls_of


@pytest.fixture(scope="session")
def routes(tiny: Any, pack: Any) -> Routes:
    return Routes(tiny, pack)


def latent(count: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(count, 16, 8, 8)}


@pytest.mark.parametrize("start", [None, [0], [3]])
def test_each_row_is_what_the_task_makes_alone_with_the_same_seed(
    routes: Routes, clean: Any, start: Any
) -> None:
    """Also for a latent taken out of a batch, which has noise of its own."""
    tiny = routes.tiny
    model = clean(tiny.load("tiny_sd3"))
    positive, negative = tiny.prompt(1), tiny.prompt(2)
    a, b = tiny.task(model, 1, name="ink"), tiny.task(model, 2, name="neon")
    one = latent() if start is None else {**latent(), "batch_index": start}
    *compared, names = routes.compare(
        model, positive, negative, one, a, b, a, strengths="1, 0.5, 0.25"
    )
    with calls_of(model) as calls:
        result = routes.sample(*compared, steps=3)
    assert calls == [8] * 3
    alone = [model, tiny.apply(model, a), tiny.apply(model, b, 0.5), tiny.apply(model, a, 0.25)]
    for row, applied in enumerate(alone):
        assert close(result[row], routes.sample(applied, positive, negative, one, steps=3)[0])
    assert names.splitlines() == ["base", "ink 1", "neon 0.5", "ink 0.25"]


def test_the_noise_of_all_rows_is_comfyuis_noise_of_the_seed(routes: Routes) -> None:
    import comfy.sample

    model = routes.tiny.load("tiny_sd3")
    prompts = (routes.tiny.prompt(1), routes.tiny.prompt(2))
    tasks = [routes.tiny.task(model, seed) for seed in (1, 2)]
    batch = routes.compare(model, *prompts, latent(), *tasks)[3]
    prepare = comfy.sample.prepare_noise  # type: ignore[attr-defined]
    noise = prepare(batch["samples"], 5, batch["batch_index"])
    assert len(noise) == 3
    assert all(torch.equal(row, prepare(latent()["samples"], 5)[0]) for row in noise)


def test_without_the_base_and_from_a_picture_with_a_mask(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    prompts = (tiny.prompt(1), tiny.prompt(2))
    tasks = [tiny.task(model, seed, name=f"task {seed}") for seed in (1, 2)]
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    start = {"samples": torch.randn(1, 16, 8, 8, generator=generator), "noise_mask": mask}
    *compared, names = routes.compare(model, *prompts, start, *tasks, include_base=False)
    result = routes.sample(*compared, steps=3)
    for row, task in enumerate(tasks):
        alone = routes.sample(tiny.apply(model, task), *prompts, start, steps=3)
        assert close(result[row], alone[0])
    assert names == "task 1\ntask 2"
    assert len(start["samples"]) == 1


def test_several_latents_are_refused(routes: Routes) -> None:
    model = routes.tiny.load("tiny_sd3")
    prompts = (routes.tiny.prompt(1), routes.tiny.prompt(2))
    with pytest.raises(routes.core.DiffScalerError, match="batch has 2, but one latent"):
        routes.compare(model, *prompts, latent(2), routes.tiny.task(model))


def grid(routes: Routes, images: Tensor, names: str = "", columns: int = 0) -> Tensor:
    return routes.pack.nodes.task_grid.DiffScalerTaskGrid.execute(images, names, columns).args[0]


def find(page: Tensor, color: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the box of a colour."""
    ys, xs = np.nonzero(((page[0] - color).abs() < 1e-3).all(-1).numpy())
    return ys.min(), xs.min(), ys.max() - ys.min() + 1, xs.max() - xs.min() + 1


def test_a_grid_shows_every_picture_whole_in_order(routes: Routes) -> None:
    colors = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    images = colors.view(5, 1, 1, 3).expand(5, 40, 64, 3)
    page = grid(routes, images, columns=2)
    boxes = [find(page, color) for color in colors]
    assert all(box[2:] == (40, 64) for box in boxes)
    tops, lefts = [box[0] for box in boxes], [box[1] for box in boxes]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]
    (about_square,) = grid(routes, images).shape[1:2]
    assert about_square < page.shape[1]
    assert grid(routes, images, columns=64).shape[2] > 5 * 64


def test_names_stand_below_their_pictures_and_fit(routes: Routes) -> None:
    images = torch.ones(3, 128, 128, 3)
    plain = grid(routes, images, columns=3)
    named = grid(routes, images, "base\nink 0.5\n" + "a very long name of a task " * 4, 3)
    assert named.shape[1] > plain.shape[1] + 13
    width = named.shape[2] // 3
    ink = [(named[0, :, i * width : (i + 1) * width] < 0.5).any(-1) for i in range(3)]
    rows = [column.any(1).nonzero().flatten() for column in ink]
    assert all(len(row) >= 8 for row in rows)
    assert all(row.min() > 128 for row in rows)
    assert rows[2].max() - rows[2].min() > 1.5 * (rows[0].max() - rows[0].min())  # two lines
    assert not ink[2][:, :2].any()
    assert not ink[2][:, -2:].any()
    with pytest.raises(routes.core.DiffScalerError, match="2 names for 3 pictures"):
        grid(routes, images, "one\ntwo\n")
