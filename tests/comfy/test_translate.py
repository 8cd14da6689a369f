"""Translate on the real host: eps (a U-Net), flow (SD3), and the pocket base in both hosts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import POCKET


@pytest.fixture(scope="module")
def node(pack: Any) -> Any:
    return pack.nodes.translate.DiffScalerTranslate


def run(node: Any, source: Any, target: Any, prompt: Any, latent: Any, **settings: Any) -> Tensor:
    chosen = {"seed": 3, "steps": 3, "cfg": 1.0, "scheduler": "normal", "strength": 1.0}
    with torch.inference_mode():
        output = node.execute(source, target, prompt, prompt, prompt, latent, **chosen | settings)
    return output.args[0]["samples"].clone()


def latent_of(model: Any, rows: int = 2) -> dict[str, Any]:
    channels = model.model.latent_format.latent_channels
    generator = torch.Generator().manual_seed(8)
    return {"samples": torch.randn(rows, channels, 8, 8, generator=generator)}


@pytest.mark.parametrize("base", ["tiny_sd3", "tiny_unet"])
def test_the_same_task_gives_the_latent_back(node: Any, tiny: Any, clean: Any, base: str) -> None:
    model = clean(tiny.load(base))
    prompt = tiny.prompt(1, 768 if base == "tiny_unet" else 32)
    one, other = (tiny.apply(model, tiny.task(model, seed, name=str(seed))) for seed in (1, 2))
    latent = latent_of(model)
    back = run(node, one, one, prompt, latent)
    assert (back - latent["samples"]).abs().max() < 1e-4
    assert (run(node, one, other, prompt, latent) - latent["samples"]).abs().max() > 1e-3
    if base == "tiny_sd3":
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., 32:] = 1
        part = run(node, one, other, prompt, {**latent, "noise_mask": mask}, cfg=2.0, strength=0.6)
        assert (part - latent["samples"])[..., :3].abs().max() < 1e-5
        assert (part - latent["samples"])[..., 5:].abs().max() > 1e-3


def test_what_cannot_be_translated_is_told(node: Any, tiny: Any, pack: Any) -> None:
    flow, unet = tiny.load("tiny_sd3"), tiny.load("tiny_unet")
    error = pack.diffscaler_core.DiffScalerError
    with pytest.raises(error, match="other latents or another noise"):
        run(node, unet, flow, tiny.prompt(1), latent_of(flow))
    good = latent_of(flow)["samples"]
    for samples in (good[0], good[:, :4], good[:, :, None]):
        with pytest.raises(error, match=r"of another model: .* 16 channels and 2 dimensions"):
            run(node, flow, flow, tiny.prompt(1), {"samples": samples})
    for mask in (torch.tensor(1.0), torch.ones(1, 0, 0)):
        with pytest.raises(error, match="noise mask is"):
            run(node, flow, flow, tiny.prompt(1), {"samples": good, "noise_mask": mask})
    with pytest.raises(error, match=r"strength is from 0\.01 to 1, got 1e-09"):
        run(node, flow, flow, tiny.prompt(1), latent_of(flow), strength=1e-9)
    with pytest.raises(error, match="this latent is empty"):
        run(node, flow, flow, tiny.prompt(1), {"samples": torch.zeros(1, 16, 8, 8)})


def test_pocket_pictures_come_back_in_both_hosts(
    node: Any, pocket: Any, part: Any, words: Any, pack: Any, both: Any
) -> None:
    """And a task of another style takes the same picture elsewhere, the same way in both hosts."""
    core = pack.diffscaler_core
    ink = core.load_task(POCKET / "diffscaler" / "ink.safetensors")
    with_ink = pack.nodes.patching.apply_task(pocket, ink)
    context, pooled = words.prompt("cat")
    prompt = [[context, {"pooled_output": pooled}]]
    _, diffusers_base = both
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    translate = part("diffscaler_core.systems.translate").translate
    told = {"context": context.float(), "pooled": pooled.float()}
    common = {"steps": 3, "strength": 1.0, "shift": 3.0, "source_prompt": told}
    changes = []
    for target, task in ((pocket, None), (with_ink, ink)):
        here = run(node, pocket, target, prompt, {"samples": latent})
        there = translate(diffusers_base, latent, None, task, **common)
        changes.append([(found - latent).abs().max() for found in (here, there)])
    assert max(changes[0]) < 1e-4
    assert min(changes[1]) > 0.1
