"""REPA: an early block is drawn towards an encoder's features of the clean pictures."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from diffscaler_core import load_task, new_task, save_task
from diffscaler_core.blocks import blocks_of, picture_of, read_outputs
from diffscaler_core.errors import DiffScalerError
from diffscaler_core.token_layout import TokenLayout
from diffscaler_core.training import TaskRun, TrainingData, as_denoiser, train_task, train_tasks
from diffscaler_core.training.aligner import early_block
from diffscaler_core.training.alignment import Projector, cosines, grid_of, on_grid, weight_at
from diffscaler_core.training.picture_encoders import Dinov2Tokens, load_encoder
from diffscaler_core.training.randomness import generator_for
from diffscaler_core.training.run_folder import read_log

from .bases import PIPES, sd3_pipe
from .runs import config_of, farthest, same, tensors_of


class Convolution(nn.Module):
    """A fixed random encoder: 4 × 4 tokens of 12 numbers of a picture of 16 pixels a side."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.register_buffer("weight", torch.randn(12, 3, 4, 4, generator=generator))
        self.seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        maps = nn.functional.conv2d(pixels, self.weight, stride=pixels.shape[-1] // 4)
        return torch.tanh(maps).flatten(2).transpose(1, 2)


def data_for(seed, channels=4, side=8, count=5):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, count, channels, side, side, generator=generator)
    return TrainingData(latents, torch.arange(count) % 2, ("blue", "red"))


def test_tokens_go_onto_another_grid_as_pictures_do():
    grid = torch.arange(16.0).view(1, 16, 1)
    assert torch.equal(on_grid(grid, (4, 4), (4, 4)), grid)
    halved = on_grid(grid, (4, 4), (2, 2)).view(2, 2)
    assert halved[0, 0] < halved[0, 1] < halved[1, 0] < halved[1, 1]
    torch.testing.assert_close(halved.mean(), grid.mean())
    even = on_grid(torch.full((2, 12, 3), 0.7), (3, 4), (6, 5))
    torch.testing.assert_close(even, torch.full((2, 30, 3), 0.7))
    assert grid_of(64, 16, 16) == (8, 8)
    assert grid_of(12, 48, 64) == (3, 4)
    with pytest.raises(DiffScalerError, match="257 tokens fill no grid"):
        grid_of(257, 16, 16)


def test_the_loss_is_the_papers_cosine():
    one, other = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    expected = [
        sum(
            float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            for a, b in zip(x, y, strict=True)
        )
        / 3
        for x, y in zip(one, other, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(cosines(one, other), torch.tensor(expected))
    assert [weight_at(step, 10, 0.5, 0.3) for step in range(5)] == [0.5, 0.5, 0.5, 0.0, 0.0]


def test_a_projector_follows_from_its_seed_and_draws_from_nothing_else():
    before = torch.get_rng_state()
    one, other = (Projector(6, 0, 4, generator_for(3, "p")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(p.shape) for p in one.parameters()][::2] == [(24, 6), (24, 24), (4, 24)]
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert Projector(1152, 0, 768, generator_for(3, "p"))[0].out_features == 2048


def test_blocks_are_found_in_every_architecture(denoiser):
    names = list(blocks_of(denoiser.model))
    assert len(names) >= 2
    assert early_block(denoiser.model, 0) == names[0]
    assert early_block(denoiser.model, 2) == names[1]
    with pytest.raises(DiffScalerError, match="repa_block 99"):
        early_block(denoiser.model, 99)


def test_an_early_block_is_that_of_the_paper():
    model = nn.Module()
    blocks = [nn.Sequential(nn.Linear(2, 2)) for _ in range(28)]
    model.transformer_blocks = nn.ModuleList(blocks)
    assert early_block(model, 0) == "transformer_blocks.7"  # the eighth


def test_what_is_no_single_picture_is_refused():
    layout = TokenLayout(1, 8, 8, 2)
    with pytest.raises(DiffScalerError, match="none is the picture, which has 16 tokens"):
        picture_of("b", torch.zeros(2, 15, 6), layout)
    with pytest.raises(DiffScalerError, match="as many text tokens as tokens of the picture"):
        picture_of("b", (torch.zeros(2, 16, 6), torch.zeros(2, 16, 6)), layout)
    own = picture_of("b", (torch.zeros(2, 3, 6), torch.ones(2, 16, 6)), layout)
    assert (own.mean(), own.shape) == (1, (2, 6, 4, 4))


def gradients(words, block, weight, own_loss):
    """Gradients of a fresh task's shifts per block, of the alignment and the denoising loss."""
    denoiser, encoder = as_denoiser(sd3_pipe()), Convolution()
    task = new_task(denoiser.model, rank=2, seed=0)
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    told = {
        name: words.conditioning[name][1].expand(4, *words.conditioning[name].shape[1:])
        for name in ("context", "pooled")
    }
    blocks = blocks_of(denoiser.model)
    names = list(blocks)
    with denoiser.held(), denoiser.attached({"t": task}) as trainable:
        trainable.requires_grad_(True)
        noise, t = torch.randn_like(x0), torch.full((4,), 0.5)
        timestep, x_t = denoiser.objective.noisy(x0, noise, t)
        found = []
        with read_outputs(blocks[names[block - 1]], found.append):
            output = denoiser(x_t, timestep, told)
        hidden = picture_of("b", found[-1], denoiser.layout((8, 8)))
        tokens = hidden.flatten(2).transpose(1, 2)
        projector = Projector(tokens.shape[-1], 0, 12, generator_for(0, "p"))
        features = encoder(denoiser.decode(x0))
        total = -weight * cosines(projector(tokens), features).mean()
        if own_loss:
            total = total + denoiser.objective.loss(output, x0, noise, t).mean()
        total.backward()
        named = trainable.parameters_of("t")
        per_block = []
        for i in range(len(blocks)):
            own = [p for n, p in named.items() if f"transformer_blocks.{i}." in n]
            per_block.append([p.grad for p in own if p.grad is not None])
    return [sum(float(g.abs().sum()) for g in grads) for grads in per_block], per_block


def test_the_term_alone_moves_the_blocks_up_to_its_own_and_no_other(words):
    sums, grads = gradients(words, block=1, weight=1.0, own_loss=False)
    assert sums[0] > 1e-3
    assert not grads[1]  # not even zeros
    sums, _ = gradients(words, block=2, weight=1.0, own_loss=False)
    assert min(sums) > 1e-4
    # switched off: nothing moves, but for what the denoising loss moves everywhere
    sums, _ = gradients(words, block=1, weight=0.0, own_loss=False)
    assert max(sums) == 0
    sums, _ = gradients(words, block=1, weight=0.0, own_loss=True)
    assert min(sums) > 1e-4


def cosine_of_run(sd3, words, tmp_path, **changes):
    """Returns (the task, cosines of the first and last step that was aligned)."""
    folder = tmp_path / "-".join(f"{k}{v}" for k, v in changes.items())
    config = config_of(steps=60, batch=4, repa="random", repa_until=1.0, **changes)
    task = train_task(sd3, data_for(0), config, words=words, encoder=Convolution(), folder=folder)
    told = [e["alignment"] for e in read_log(folder / "log.jsonl") if "alignment" in e]
    return task, told


def test_the_block_comes_to_see_what_the_encoder_sees(sd3, words, tmp_path):
    task, told = cosine_of_run(sd3, words, tmp_path, repa_weight=0.5)
    assert len(told) == 60
    assert abs(told[0]) < 0.25
    assert told[-1] > 0.5
    # so little weight that nothing is learned from it (Adam divides by the gradient's size: the
    # rates are what is switched off)
    still, told = cosine_of_run(sd3, words, tmp_path, repa_weight=0.5, lr=1e-9, lr_scale_shift=1e-9)
    assert abs(told[-1]) < 0.25
    assert not same(task, still)


def test_no_weight_is_no_flag_bit_for_bit_and_a_weight_is_not(sd3, words):
    plain = train_task(sd3, data_for(0), config_of(steps=4), words=words)
    for off in ({"repa_weight": 0.0}, {"repa_until": 0.0}):
        config = config_of(steps=4, repa="random", **off)
        encoder = Convolution()
        assert same(train_task(sd3, data_for(0), config, words=words, encoder=encoder), plain)
        assert encoder.seen == 0
    on = config_of(steps=4, repa="random")
    assert not same(train_task(sd3, data_for(0), on, words=words, encoder=Convolution()), plain)


def test_each_picture_is_shown_to_the_encoder_once_and_the_term_ends(sd3, words, tmp_path):
    encoder = Convolution()
    config = config_of(steps=20, repa="random", repa_until=0.5)
    train_task(sd3, data_for(0), config, words=words, encoder=encoder, folder=tmp_path / "run")
    assert encoder.seen == 5
    entries = read_log(tmp_path / "run" / "log.jsonl")
    assert ["alignment" in entry for entry in entries] == [True] * 10 + [False] * 10


def test_the_projector_is_kept_in_checkpoints_and_not_in_the_task(sd3, words, tmp_path):
    from diffscaler_core.training.checkpoints import newest_checkpoint

    config = config_of(steps=6, save_every=3, repa="random", ema=0.9)
    task = train_task(
        sd3, data_for(0), config, words=words, encoder=Convolution(), folder=tmp_path / "run"
    )
    found = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert any("beside/" in name for name in found.tensors)
    plain = train_task(sd3, data_for(0), config_of(steps=1), words=words)
    assert sorted(tensors_of(task)) == sorted(tensors_of(plain))
    saved = load_task(save_task(task, tmp_path / "task.safetensors"))
    assert same(saved, task)
    assert task.info["training"]["repa"] == "random"


@pytest.mark.parametrize("stop", [3, 7])  # while the term is on, and after it has ended
def test_a_stopped_run_goes_on_exactly(sd3, words, tmp_path, stop):
    config = config_of(steps=10, batch=4, repa="random", repa_until=0.5, save_every=0)

    def run(folder, on_step=None):
        return train_task(
            sd3, data_for(0), config, words=words, encoder=Convolution(),
            folder=tmp_path / folder, on_step=on_step,
        )  # fmt: skip

    whole = run("whole")
    run("parts", lambda now: now.step == stop)
    assert same(run("parts"), whole)


def test_another_encoder_half_way_is_another_run(sd3, words, tmp_path):
    config = config_of(steps=2, repa="random")
    options = {"words": words, "encoder": Convolution(), "folder": tmp_path / "run"}
    train_task(sd3, data_for(0), config, **options)
    other = dataclasses.replace(config, repa="else", steps=4)
    with pytest.raises(DiffScalerError, match=r"another run .*repa random, now else"):
        train_task(sd3, data_for(0), other, **options)


def test_two_tasks_in_one_run_equal_two_runs(sd3, words):
    config = config_of(steps=6, batch=4, accumulate=2, repa="random")
    runs = [TaskRun(name, data_for(i), words=words) for i, name in enumerate(("one", "two"))]
    together = train_tasks(sd3, runs, config, encoder=Convolution())
    for run in runs:
        alone = train_tasks(sd3, [run], config, encoder=Convolution())[run.name]
        assert farthest(together[run.name], alone) < 1e-5
    assert not same(together["one"], together["two"])


@pytest.mark.parametrize("kind", PIPES)
def test_every_architecture_and_checkpointing(kind, words):
    base = as_denoiser(PIPES[kind]())
    channels, side = (3, 16) if kind == "unet2d" else (4, 8)
    for checkpointing in (False, True):
        told = []
        config = config_of(steps=4, batch=2, repa="random", checkpointing=checkpointing)
        train_task(
            base, data_for(0, channels, side), config, words=words, encoder=Convolution(),
            on_step=lambda now, told=told: told.append(now.alignment),
        )  # fmt: skip
        assert [value is not None for value in told] == [True, True, False, False]


def test_what_cannot_be_meant_is_said(sd3, words):
    def run(encoder=None, data=None, **changes):
        config = config_of(steps=2, **{"repa": "random", **changes})
        shown = data_for(0) if data is None else data
        train_task(sd3, shown, config, words=words, encoder=encoder)

    with pytest.raises(DiffScalerError, match="no picture encoder 'random' for repa here"):
        run()
    with pytest.raises(DiffScalerError, match="repa looks into a block of the base, and shard"):
        run(Convolution(), shard=True)
    with pytest.raises(DiffScalerError, match="a stream that is never kept"):
        run(Convolution(), data=Streamed(data_for(0)))
    with pytest.raises(DiffScalerError, match=r"gives tokens .*, not \(1, 3, 16, 16\)"):
        run(lambda pixels: pixels)
    with pytest.raises(DiffScalerError, match="gave NaN or Inf"):
        run(lambda pixels: torch.full((len(pixels), 16, 3), math.nan))
    with pytest.raises(DiffScalerError, match="repa_block 7"):
        run(Convolution(), repa_block=7)


class Streamed:
    """Pictures that only pass by."""

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return 0


def test_the_pocket_network_gives_its_last_map():
    encoder = load_encoder("pocket")
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    tokens = encoder(pixels)
    assert tokens.shape == (2, 64, 40)
    torch.testing.assert_close(tokens[0], encoder(pixels[:1])[0])
    pooled = encoder.net(pixels)
    assert pooled.shape == (2, 64)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_from_a_folder_gives_its_patches_alone(tmp_path, registers):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14,
        "image_size": 28,
    }  # fmt: skip
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / "dino")
    encoder = load_encoder(str(tmp_path / "dino"))
    assert isinstance(encoder, Dinov2Tokens)
    pixels = torch.zeros(1, 3, 64, 64)
    tokens = encoder(pixels)
    assert tokens.shape == (1, 256, 16)
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = ((0.5 - mean) / spread).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    with torch.no_grad():
        whole = model.eval()(pixel_values=seen).last_hidden_state
    torch.testing.assert_close(tokens, whole[:, 1 + registers :])


def test_other_models_of_transformers_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(DiffScalerError, match="of kind 'vit', not DINOv2"):
        load_encoder(str(tmp_path / "vit"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffScalerError, match="transformers cannot read the encoder"):
        load_encoder(str(tmp_path / "empty"))
