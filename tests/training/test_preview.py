import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffscaler_core.training import Objective, as_denoiser, prompts_for, sample_latents  # noqa: E402
from diffscaler_core.training.preview import grid, to_image  # noqa: E402


def sd3_pipeline(denoiser):
    return diffusers.StableDiffusion3Pipeline(
        transformer=denoiser.model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderTiny(
            latent_channels=4, scaling_factor=1.0, shift_factor=0.0,
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        ),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def test_samples_are_those_of_the_pipeline(sd3, words):
    pipe = sd3_pipeline(sd3)
    pipe.set_progress_bar_config(disable=True)
    denoiser = as_denoiser(pipe)
    prompts = prompts_for(denoiser, ["red", "blue"], words=words)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition, null = prompts(torch.tensor([0, 1])), prompts.null(2)
    mine = sample_latents(denoiser, condition, null, noise, steps=4, guidance=3.5, shift=3.0)
    theirs = pipe(
        prompt_embeds=condition["context"],
        pooled_prompt_embeds=condition["pooled"],
        negative_prompt_embeds=null["context"],
        negative_pooled_prompt_embeds=null["pooled"],
        guidance_scale=3.5,
        sigmas=np.linspace(1, 1 / 4, 4),
        latents=noise,
        output_type="latent",
        height=8 * pipe.vae_scale_factor,
        width=8 * pipe.vae_scale_factor,
    ).images
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flow", "flow_reversed", "epsilon", "v"])
def test_a_perfect_model_gives_back_the_data(denoiser, kind):
    """An oracle that knows x0 leads every sampler to it, whatever the objective."""
    import dataclasses

    from diffscaler_core.training.objective import combine

    x0 = torch.randn(2, 3, 4, 4)
    bars = None if kind.startswith("flow") else torch.linspace(0.999, 0.01, 1000)
    objective = Objective(kind, alphas_cumprod=bars)

    def predict(x, timestep, condition):
        if bars is None:
            clock = timestep / 1000
            sigma = 1 - clock if kind == "flow_reversed" else clock
            alpha = 1 - sigma
        else:
            alpha, sigma = bars[timestep].sqrt(), (1 - bars[timestep]).sqrt()
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return combine(kind, x0, (x - a * x0) / s, alpha, sigma)

    oracle = dataclasses.replace(denoiser, objective=objective, predict=predict)
    found = sample_latents(oracle, {}, {}, torch.randn(2, 3, 4, 4), steps=5)
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-4)


def test_a_grid_holds_every_picture():
    pictures = [torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 1.0)]
    sheet = grid(pictures, columns=2)
    assert sheet.size == (12, 8)
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    assert sheet.getpixel((0, 4)) == (255, 255, 255)
    assert to_image(torch.zeros(1, 4, 4)).mode == "L"
