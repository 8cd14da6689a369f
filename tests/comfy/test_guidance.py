"""Guided sampling on the real host: eps (a U-Net), flow (SD3), and the pocket base with its VAE."""

from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import POCKET

GREEN = "#30c040"


@pytest.fixture(scope="module")
def nodes(pack: Any) -> Any:
    return pack.nodes


def loss_of(nodes: Any, kind: str = "colour", **inputs: Any) -> Any:
    node = nodes.guidance_loss.DiffScalerGuidanceLoss
    with torch.inference_mode():
        return node.execute(kind, 1.0, GREEN, **inputs).args[0]


def guided(nodes: Any, model: Any, losses: Any, strength: float = 0.5, **inputs: Any) -> Any:
    return nodes.guide_model.DiffScalerGuideModel.execute(model, losses, strength, **inputs).args[0]


def value(nodes: Any, model: Any, losses: Any, samples: Tensor, vae: Any = None) -> float:
    decode = nodes.model_guidance.decoder(model.model, vae)
    with torch.no_grad():
        pictures = decode(model.model.process_latent_in(samples))
    return float(losses[0].function(pictures).mean())


# Untrained, the U-Net predicts pictures of huge values, of which a small share is enough.
@pytest.mark.parametrize(("base", "strength"), [("tiny_sd3", 1.0), ("tiny_unet", 0.1)])
def test_guided_samples_have_a_smaller_loss(
    nodes: Any, tiny: Any, clean: Any, base: str, strength: float
) -> None:
    model = clean(tiny.load(base))
    task = tiny.apply(model, tiny.task(model, 1))
    losses = loss_of(nodes)
    with torch.inference_mode():
        plain = tiny.run(task, steps=5)
        for gradient in (nodes.model_guidance.CHEAP, nodes.model_guidance.EXACT):
            led = tiny.run(guided(nodes, task, losses, strength, gradient=gradient), steps=5)
            ratio = value(nodes, task, losses, led) / value(nodes, task, losses, plain)
            assert ratio < 0.5, gradient
        none = guided(nodes, task, losses, start_percent=0.9, end_percent=0.8)
        assert torch.equal(tiny.run(none, steps=5), plain)
        assert torch.equal(tiny.run(task, steps=5), plain)
    assert guided(nodes, task, losses, 0.0) is task


def test_through_the_vae_on_the_pocket_base(nodes: Any, pocket: Any, words: Any, tiny: Any) -> None:
    import comfy.sd
    import comfy.utils

    with torch.inference_mode():
        file = POCKET / "vae" / "diffscaler_pocket_vae.safetensors"
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    model = pocket
    prompts = [[[c, {"pooled_output": p}]] for c, p in (words.prompt("cat"), words.prompt(""))]
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    source = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))

    def draw(led: Any, latent: Any) -> Tensor:
        sampled = tiny.nodes.KSampler().sample(
            led, 1, 4, 1.0, "euler", "normal", *prompts, latent, 1.0
        )
        return sampled[0]["samples"].clone()

    empty, masked = torch.zeros(1, 16, 8, 8), {"samples": source, "noise_mask": mask}
    losses = loss_of(nodes)
    with torch.inference_mode():
        plain = draw(model, {"samples": empty})
        before = value(nodes, model, losses, plain, vae)
        # Through the model, the same strength gets about half as far.
        for gradient, strength in (
            (nodes.model_guidance.CHEAP, 2.0),
            (nodes.model_guidance.EXACT, 4.0),
        ):
            led = guided(nodes, model, losses, strength, vae=vae, gradient=gradient)
            assert value(nodes, model, losses, draw(led, {"samples": empty}), vae) < 0.5 * before
        within = draw(led, masked)
    assert (within - source)[..., :3].abs().max() < 1e-5
    assert (within - source)[..., 5:].abs().max() > 0.1


def test_losses_add_up_and_say_what_they_lack(nodes: Any, pack: Any) -> None:
    image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    losses = loss_of(nodes, "edges", image=image, losses=loss_of(nodes))
    losses = loss_of(nodes, "features", image=image, losses=losses)
    assert [each.name for each in losses] == ["colour", "edges", "features"]
    same = image.movedim(-1, 1) * 2 - 1
    assert all(float(each.function(same)) < 1e-5 for each in losses[1:])
    with pytest.raises(pack.diffscaler_core.DiffScalerError, match="connect 'image'"):
        loss_of(nodes, "edges")
    with pytest.raises(pack.diffscaler_core.DiffScalerError, match=r"must be a mask \(N, H, W\)"):
        loss_of(nodes, mask=torch.ones(1, 0, 0))
    with pytest.raises(pack.diffscaler_core.DiffScalerError, match="guidance loss") as error:
        loss_of(nodes, "a\x00b")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
