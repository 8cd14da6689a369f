"""Features of a frozen base: where they are read, and that they tell what pixels do not."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffscaler_core import DiffScalerError, UnknownNameError, load_task, new_task
from diffscaler_core.blocks import block_named, blocks_of
from diffscaler_core.systems.features import (
    block_features,
    data_features,
    pixel_means,
    untold,
)
from diffscaler_core.systems.probe import ProbeGrid, fit_probe, probe_grid, split
from diffscaler_core.systems.taps import pooled, tapped
from diffscaler_core.token_layout import TokenLayout
from diffscaler_core.training import TrainingData, as_denoiser
from diffscaler_core.training.denoiser import Denoiser

from .tiny_bases import PIPES, words_of

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "assets" / "pocket"
#: Subjects whose silhouettes have no colour to be told by, drawn without an emoji font.
WORDS = ("circle", "square", "triangle", "letter-a", "letter-b", "letter-k")
PER_WORD = 12
TIMES = (0.05, 0.4, 1.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- where features are read ----------------------------------------------------------------------


@pytest.mark.parametrize("family", PIPES)
def test_features_are_the_means_of_what_a_block_gives(family: str) -> None:
    denoiser = as_denoiser(PIPES[family]())
    told = untold(denoiser, words_of())
    channels = denoiser.model.config.in_channels
    x0 = torch.randn(3, channels, 8, 8)
    name = block_named(denoiser.model)
    seen: list[Any] = []
    block = denoiser.model.get_submodule(name)
    with denoiser.held():
        handle = block.register_forward_hook(lambda m, i, o: seen.append(o))
        found = block_features(denoiser, x0, 0.3, told, [name])
        handle.remove()
        again = block_features(denoiser, x0[1:], 0.3, told, [name], batch=1)
    own = seen[0]
    if family == "sd3":
        own = own[1]  # text first, picture second
    expected = own.float().mean((2, 3)) if own.ndim == 4 else own.float().mean(1)
    assert torch.allclose(found[name], expected, atol=1e-6)
    assert torch.allclose(found[name][1:], again[name], atol=1e-5)  # whatever the batch
    assert not any(module._forward_hooks for module in denoiser.model.modules())


def test_a_u_nets_blocks_come_in_the_order_they_run_and_the_middle_is_its_middle() -> None:
    model = PIPES["unet2d"]().unet
    names = list(blocks_of(model))
    assert names == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert block_named(model) == "mid_block"
    assert block_named(model, "3") == block_named(model, 3) == "up_blocks.0"
    with pytest.raises(UnknownNameError, match="mid_block"):
        block_named(model, "middle")
    with pytest.raises(UnknownNameError, match=r"4 \(up_blocks\.1\)"):
        block_named(model, 5)


def test_a_call_ends_behind_the_last_block_that_is_read_and_hooks_go_after_an_error() -> None:
    denoiser = as_denoiser(PIPES["dit"]())
    model, layout = denoiser.model, TokenLayout(1, 8, 8, 2)
    names, ran = list(blocks_of(model)), []
    handle = model.get_submodule(names[1]).register_forward_hook(lambda *_: ran.append(1))
    x, t, told = torch.randn(1, 4, 8, 8), torch.tensor([5]), untold(denoiser)(1)
    found = tapped(model, names[:1], lambda: denoiser(x, t, told), layout, pool=2)
    assert found[names[0]].shape == (1, 16 * 4)
    assert not ran
    tapped(model, names, lambda: denoiser(x, t, told), layout)
    assert ran
    handle.remove()
    with pytest.raises(DiffScalerError, match="did not run its block"):
        tapped(model, names[:1], lambda: None, layout)
    with pytest.raises(ZeroDivisionError):
        tapped(model, names[:1], lambda: 1 / 0, layout)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_pictures_tokens_are_found_among_others() -> None:
    text_first = TokenLayout(1, 8, 8, 2, text="first")
    tokens = torch.randn(2, 5 + 16, 7)
    assert torch.allclose(pooled("b", tokens, text_first), tokens[:, 5:].mean(1), atol=1e-6)
    last = TokenLayout(1, 8, 8, 2, text="last")
    assert torch.allclose(pooled("b", (tokens,), last), tokens[:, :16].mean(1), atol=1e-6)
    alone, text = tokens[:, :16], torch.randn(2, 5, 7)
    for output in ((text, alone), (alone, text), {"x": alone, "c": text}):
        assert torch.allclose(pooled("b", output, text_first), alone.mean(1), atol=1e-6)
    quarters = pooled("b", alone, text_first, 2).view(2, 7, 2, 2)
    grid = alone.transpose(1, 2).view(2, 7, 4, 4)
    assert torch.allclose(quarters[..., 0, 1], grid[..., :2, 2:].mean((2, 3)), atol=1e-6)
    with pytest.raises(DiffScalerError, match="as many text tokens"):
        pooled("b", (alone, alone), text_first)
    with pytest.raises(DiffScalerError, match="none is the picture"):
        pooled("b", torch.zeros(2, 3, 7), text_first)


def test_a_task_that_is_on_takes_part_and_noise_may_be_averaged() -> None:
    denoiser = as_denoiser(PIPES["dit"]())
    told, x0 = untold(denoiser), torch.randn(2, 4, 8, 8)
    task = new_task(denoiser.model, rank=2, name="one")
    loud = task.replace(
        layers={n: {p: t + 0.3 for p, t in own.items()} for n, own in task.layers.items()}
    )

    def seen(**more: Any) -> Tensor:
        return block_features(denoiser, x0, 0.2, told, [1], **more)["transformer_blocks.1"]

    with denoiser.held():
        base = seen()
        with denoiser.attached({"one": task}):
            assert torch.equal(seen(), base)  # identity at the start
        with denoiser.attached({"one": loud}):
            assert not torch.allclose(seen(), base, atol=1e-2)
        assert torch.equal(seen(), base)
        assert torch.allclose(seen(noises=1, seed=0), base)
        assert not torch.allclose(seen(noises=3), base, atol=1e-4)
        with pytest.raises(DiffScalerError, match=r"a time in 0\.\.1"):
            block_features(denoiser, x0, 1.5, told)


def test_a_base_that_is_told_prompts_needs_its_empty_one() -> None:
    with pytest.raises(DiffScalerError, match="null prompt"):
        untold(as_denoiser(PIPES["sd3"]()))


# --- the probe ------------------------------------------------------------------------------------


def test_a_probe_finds_a_line_where_there_is_one_and_none_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 8, generator=generator)
    told = noise.clone()
    told[:, 2] += 5.0 * (labels == 1)
    told[:, 5] += 5.0 * (labels == 2)
    fit, choose, judge = split(labels)
    assert sorted(torch.cat([fit, choose, judge]).tolist()) == list(range(300))
    probe = fit_probe(told[fit], labels[fit], 3)
    assert probe.accuracy(told[judge], labels[judge]) > 0.9
    blind = fit_probe(noise[fit], labels[fit], 3)
    assert blind.accuracy(noise[judge], labels[judge]) < 0.55
    with pytest.raises(DiffScalerError, match="at least 3 pictures of each class"):
        split(torch.tensor([0, 0, 0, 1, 1]))


def drawn() -> TrainingData:
    """Silhouettes of simple subjects, as the repository's own script draws them, as latents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "pocket")
        for name in ("styles", "words"):  # the script's neighbours, not somebody else's
            patch.delitem(sys.modules, name, raising=False)
        pytest.importorskip("matplotlib")
        import draw  # type: ignore[import-not-found]

        pictures = [
            draw.draw(word, "silhouette", seed=77, index=i, poses=draw.ANYWHERE)
            for word in WORDS
            for i in range(PER_WORD)
        ]
    small = [np.asarray(p.resize((64, 64), Image.Resampling.LANCZOS), np.float32) for p in pictures]
    pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 127.5 - 1
    labels = torch.arange(len(WORDS)).repeat_interleave(PER_WORD)
    return TrainingData(pixels[None], labels, WORDS)


@pytest.mark.slow
def test_a_trained_base_tells_apart_what_a_random_one_and_mean_colours_do_not() -> None:
    from diffscaler_core.pocket import load_pipeline

    pixels = drawn()
    words = load_task(POCKET / "diffscaler" / "words.safetensors")
    trained, untrained = load_pipeline(POCKET), load_pipeline(POCKET)
    model = trained.transformer
    torch.manual_seed(0)
    untrained.transformer = type(model).from_config(model.config).eval()
    bases: dict[str, Denoiser] = {"trained": as_denoiser(trained), "random": as_denoiser(untrained)}
    encode = bases["trained"].encode
    assert encode is not None
    with torch.no_grad():
        latents = encode(pixels.latents[0])  # type: ignore[index]
    data = TrainingData(latents.float()[None], pixels.index, WORDS)
    grids: dict[str, ProbeGrid] = {}
    for name, denoiser in bases.items():
        with denoiser.held():
            seen = data_features(denoiser, data, TIMES, untold(denoiser, words))
        grids[name] = probe_grid(seen, data.index, WORDS, pixel_means(pixels))
    best = grids["trained"].best
    everywhere = [cell.accuracy for cell in grids["random"].cells]
    assert best.accuracy > grids["random"].best.accuracy + 0.15
    assert best.accuracy > max(everywhere) + 0.15  # whichever cell of the random base is taken
    assert best.accuracy > (grids["trained"].pixels or 1.0)
    assert best.time < 1.0
    blind = [cell.accuracy for cell in grids["trained"].cells if cell.time == 1.0]
    assert max(blind) < grids["trained"].chance + 0.15
    pytest.importorskip("matplotlib")
    from diffscaler_core.systems.probe_chart import draw_grid

    page = io.BytesIO()
    draw_grid(grids["trained"], page, title="silhouettes")
    assert Image.open(page).size[0] > 300
