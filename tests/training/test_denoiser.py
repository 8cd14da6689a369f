from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffscaler_core.errors import DiffScalerError, UnknownNameError  # noqa: E402
from diffscaler_core.training import TrainingConfig, TrainingData, as_denoiser, train_task  # noqa: E402


def pixart():
    return diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=8, cross_attention_dim=16, caption_channels=12, patch_size=2,
    )  # fmt: skip


def unet(**more):
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    )  # fmt: skip


def texts(words, **settings):
    rows = torch.stack([torch.full((3, 12), float(len(word))) for word in words])
    return rows, torch.ones(len(words), 3, dtype=torch.long)


def pipe_of(family):
    def encode_prompt(words, *args, **kwargs):
        rows, mask = texts(words)
        return (rows, mask, None, None) if family == "pixart" else (rows, None)

    model = {"transformer": pixart()} if family == "pixart" else {"unet": unet()}
    return SimpleNamespace(
        scheduler=diffusers.DDPMScheduler(), text_encoder=object(), device="cpu",
        encode_prompt=encode_prompt, **model,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["pixart", "unet2d_condition"])
def test_captions_reach_the_model_through_its_text_encoder(family):
    denoiser = as_denoiser(pipe_of(family))
    data = TrainingData(torch.randn(1, 4, 4, 8, 8), torch.tensor([0, 1, 1, 0]), ("a cat", "dog"))
    seen = []
    task = train_task(
        denoiser,
        data,
        TrainingConfig(steps=2, batch=4, rank=2, drop=0.5),
        on_step=lambda now: seen.append(now.loss),
    )
    assert len(seen) == 2
    assert task.info["training"]["objective"] == "epsilon"
    assert denoiser.objective.learned_sigma == (family == "pixart")
    assert any(bool(own["up"].any()) for own in task.layers.values())


def test_the_objective_is_the_schedulers_own():
    pipe = SimpleNamespace(unet=unet(), scheduler=None)
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", beta_end=0.012)
    objective = as_denoiser(pipe).objective
    assert objective.kind == "v"
    assert torch.equal(objective.alphas_cumprod, pipe.scheduler.alphas_cumprod)


def test_bases_that_cannot_be_trained_yet_are_named():
    with pytest.raises(DiffScalerError, match="neither a transformer nor a unet"):
        as_denoiser(SimpleNamespace())
    video = SimpleNamespace(transformer=diffusers.WanTransformer3DModel.__new__(
        diffusers.WanTransformer3DModel
    ))  # fmt: skip
    video.transformer._internal_dict = {}
    with pytest.raises(UnknownNameError, match="family to train: 'wan'; known: sd3, flux"):
        as_denoiser(video)
    with pytest.raises(DiffScalerError, match="needs its scheduler"):
        as_denoiser(SimpleNamespace(unet=unet()))
