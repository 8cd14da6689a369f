"""The pocket base in diffusers, and the same pictures as in ComfyUI."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffscaler_core import DiffScalerError, UnknownNameError, new_task, save_task
from diffscaler_core.pocket import comfy_sigmas, load_pipeline, load_words, prompt_inputs

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "pocket"
SEED, STEPS, GUIDANCE = 7, 6, 3.5
CLOSE = 2 / 255

pytestmark = pytest.mark.skipif(
    not (FOLDER / "diffscaler/words.safetensors").is_file(), reason="no pocket base in assets"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def words() -> dict[str, tuple[Tensor, Tensor]]:
    return load_words(FOLDER)


@pytest.fixture
def task_path(pipe: Any, make_noisy: Any, tmp_path: Path) -> Path:
    task = make_noisy(new_task(pipe.transformer, name="noisy", rank=4), 1, 0.05)
    return save_task(task, tmp_path / "noisy.safetensors")


def pictures(pipe: Any, inputs: dict[str, Tensor], **schedule: Any) -> Tensor:
    """(B, H, W, 3) in 0..1."""
    generator = torch.Generator().manual_seed(SEED)
    call = {**inputs, "guidance_scale": GUIDANCE, "generator": generator, "output_type": "np"}
    return torch.from_numpy(pipe(**call, **schedule).images)


def comfy_pictures(
    comfy: ModuleType, inputs: dict[str, Tensor], scheduler: str, change: Any = None
) -> Tensor:
    (model,) = comfy.UNETLoader().load_unet("diffscaler_pocket.safetensors", "default")
    (vae,) = comfy.VAELoader().load_vae("diffscaler_pocket_vae.safetensors")
    model = model if change is None else change(model)
    prompts = [
        [[inputs[f"{sign}prompt_embeds"], {"pooled_output": inputs[f"{sign}pooled_prompt_embeds"]}]]
        for sign in ("", "negative_")
    ]
    latents = {"samples": torch.zeros(len(inputs["prompt_embeds"]), 16, 16, 16)}
    (latents,) = comfy.KSampler().sample(
        model, SEED, STEPS, GUIDANCE, "euler", scheduler, *prompts, latents
    )
    return comfy.VAEDecode().decode(vae, latents)[0]


def test_it_draws_what_is_asked_for(pipe: Any, words: dict[str, Any]) -> None:
    drawn = pictures(pipe, prompt_inputs(words, "cat", "dog"), num_inference_steps=2)
    assert drawn.shape == (2, 128, 128, 3)
    assert drawn.std() > 0.05
    with pytest.raises(UnknownNameError, match="unknown word 'unicorn'"):
        prompt_inputs(words, "unicorn")


def test_the_simple_schedule_takes_every_nth_noise_level() -> None:
    assert comfy_sigmas(4) == [1.0, 0.75, 0.5, 0.25]
    assert comfy_sigmas(3) == [1.0, 0.667, 0.334]
    with pytest.raises(DiffScalerError, match="at least 1"):
        comfy_sigmas(0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiffScalerError, match=r"no file .*config\.json"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("scheduler", ["normal", "simple"])
def test_both_hosts_draw_the_same_picture(
    comfy: ModuleType, pipe: Any, words: dict[str, Any], scheduler: str
) -> None:
    inputs = prompt_inputs(words, "cat")
    by_name = {"normal": {"num_inference_steps": STEPS}, "simple": {"sigmas": comfy_sigmas(STEPS)}}
    ours = pictures(pipe, inputs, **by_name[scheduler])
    theirs = comfy_pictures(comfy, inputs, scheduler)
    assert ours.shape == theirs.shape
    print(f"{scheduler}: largest difference {(ours - theirs).abs().max() * 255:.4f} / 255")
    assert (ours - theirs).abs().max() <= CLOSE


def test_a_task_draws_the_same_picture_in_both_hosts(
    pack: ModuleType, comfy: ModuleType, pipe: Any, words: dict[str, Any], task_path: Path
) -> None:
    from importlib import import_module

    core = import_module(f"{pack.__name__}.diffscaler_core")
    patching = import_module(f"{pack.__name__}.nodes.patching")
    inputs = prompt_inputs(words, "cat")
    base = pictures(pipe, inputs, num_inference_steps=STEPS)
    pipe.load_diffscaler(task_path)
    ours = pictures(pipe, inputs, num_inference_steps=STEPS)
    pipe.unload_diffscaler()
    assert (ours - base).abs().max() > 10 * CLOSE
    theirs = comfy_pictures(
        comfy, inputs, "normal", lambda model: patching.apply_task(model, core.load_task(task_path))
    )
    print(f"task: largest difference {(ours - theirs).abs().max() * 255:.4f} / 255")
    assert (ours - theirs).abs().max() <= CLOSE
