"""Controls beside what else ComfyUI does, and the same picture in diffusers."""

import gc
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .controls import Calls, Controls, image
from .formula import close, lora_for, merged

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"


@pytest.fixture(scope="session")
def control(tiny: Any, pack: Any) -> Controls:
    return Controls(tiny, pack)


@pytest.mark.parametrize("cond_only", [False, True])
def test_the_same_picture_as_in_diffusers(
    control: Controls, pack: ModuleType, cond_only: bool
) -> None:
    """One task file, one control picture, one seed, both hosts."""
    import comfy.sd
    import comfy.utils

    part = lambda name: importlib.import_module(f"{pack.__name__}.diffscaler_core.{name}")  # noqa: E731
    core, pocket = pack.diffscaler_core, part("pocket")
    pipe = pocket.load_pipeline(POCKET)
    pipe.set_progress_bar_config(disable=True)
    words = pocket.load_words(POCKET)
    inputs = pocket.prompt_inputs(words, "cat", "dog")
    task = core.new_task(pipe.transformer, rank=2, control="edges")
    generator = torch.Generator().manual_seed(1)

    def noisy(tensors: Any) -> Any:
        return {n: t + 0.03 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}

    layers = {name: noisy(own) for name, own in task.layers.items()}
    task = task.replace(layers=layers, extras=noisy(task.extras))
    picture = image(4, 128, 128)

    latents = pipe.vae.encode(picture.movedim(-1, 1) * 2 - 1).latents
    rows = torch.tensor([0.0, 0.0, 1.0, 1.0]) if cond_only else None

    def in_diffusers() -> Tensor:
        call = {**inputs, "guidance_scale": 3.5, "num_inference_steps": 6, "output_type": "np"}
        made = pipe(**call, generator=torch.Generator().manual_seed(7))
        return torch.from_numpy(made.images)

    base = in_diffusers()
    with core.attach(pipe.transformer, task) as attached, torch.no_grad():
        attached.set_controls({task.name: part("control").Control(latents, rows)})
        wanted = in_diffusers()
    assert (wanted - base).abs().max() > 0.1

    model = comfy.sd.load_diffusion_model(  # type: ignore[attr-defined]
        str(POCKET / "diffusion_models" / "diffscaler_pocket.safetensors")
    )
    file = POCKET / "vae" / "diffscaler_pocket_vae.safetensors"
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))  # type: ignore[attr-defined]
    prompts = [
        [[inputs[f"{sign}prompt_embeds"], {"pooled_output": inputs[f"{sign}pooled_prompt_embeds"]}]]
        for sign in ("", "negative_")
    ]
    output = pack.nodes.control.DiffScalerControl.execute(
        model, *prompts, task, vae, picture, 1.0, control_in_uncond=not cond_only
    )
    empty = {"samples": torch.zeros(2, 16, 16, 16)}
    nodes = control.tiny.nodes
    sampled = nodes.KSampler().sample(output[0], 7, 6, 3.5, "euler", "normal", *output[1:], empty)
    drawn = nodes.VAEDecode().decode(vae, sampled[0])[0]
    assert (drawn - wanted).abs().max() <= 2 / 255


def test_over_a_stock_lora_that_patches_the_embedding_too(control: Controls, clean: Any) -> None:
    import comfy.model_management
    import comfy.sd

    model = clean(control.tiny.load("tiny_sd3"))
    lora, task = lora_for(control.tiny, model), control.task(model)
    embed = "diffusion_model.x_embedder.proj"  # a convolution, which lora_for leaves out
    generator = torch.Generator().manual_seed(8)
    lora[f"{embed}.diff_b"] = torch.randn(128, generator=generator)
    lora[f"{embed}.diff"] = torch.randn(128, 16, 2, 2, generator=generator) * 0.05
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)  # type: ignore[attr-defined]
    plain = control.apply(model, task)
    before = control.run(plain)
    result = control.run(control.apply(patched, task))
    other = merged(control.tiny.load("tiny_sd3"), lora)
    layer = other.model.diffusion_model.x_embedder.proj
    layer.weight.data = layer.weight + lora[f"{embed}.diff"]
    assert close(result, control.run(control.apply(other, task)), 2e-5)
    assert torch.equal(control.run(plain), before)
    comfy.model_management.unload_all_models()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("file", "dtype"),
    [
        ("tiny_flux_float8_e4m3fn", "default"),
        ("tiny_flux_int8_tensorwise", "default"),
        ("tiny_flux", "fp8_e4m3fn"),
    ],
)
def test_on_quantised_bases(control: Controls, clean: Any, file: str, dtype: str) -> None:
    model = clean(control.tiny.load(file, dtype))
    base = control.tiny.run(model)
    assert torch.equal(control.run(control.apply(model, control.task(model, std=0))), base)
    task = control.task(model, std=0.02)
    with Calls(model, control.embedding(model)) as calls:
        result = control.run(control.apply(model, task), steps=2)
    assert calls.rows == [4] * 2
    assert calls.embedded == 2 + 1
    rounded = control.tiny.load("tiny_flux")
    if dtype != "default":
        for parameter in rounded.model.diffusion_model.parameters():
            parameter.data = parameter.to(torch.float8_e4m3fn).float()
    wanted = control.run(control.apply(rounded, task)) - control.tiny.run(rounded)
    assert (result - base - wanted).norm() < 0.1 * wanted.norm()  # 8 bits, and guidance of 4


def test_hooked_weights_of_the_embedding_are_read_anew(control: Controls) -> None:
    """A stock LoRA hook whose strength changes in the middle of sampling."""
    import comfy.hooks

    model = control.tiny.load("tiny_sd3")
    embed = "diffusion_model.x_embedder.proj"
    lora = {f"{embed}.diff": torch.randn(128, 16, 2, 2, generator=torch.Generator().manual_seed(1))}
    task = control.task(model)
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)  # type: ignore[attr-defined]
    group = comfy.hooks.HookKeyframeGroup()  # type: ignore[attr-defined]
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        group.add(comfy.hooks.HookKeyframe(strength, start))  # type: ignore[attr-defined]
    hooks.set_keyframes_on_hooks(group)
    conds = [
        comfy.hooks.set_hooks_for_conditioning(cond, hooks)  # type: ignore[attr-defined]
        for cond in control.prompts(model)
    ]
    result = control.run(control.apply(model, task, conds=conds), steps=1)
    assert close(result, control.run(control.apply(model, task), steps=1), 1e-5)
    added = _added(control, model, task, conds)
    assert len(added) == 4
    assert close(added[0], added[1], 1e-4)
    assert not close(added[0], added[-1], 1e-2)


def _added(control: Controls, model: Any, task: Any, conds: Any) -> list[Tensor]:
    """What the control adds to the tokens, step by step."""
    found: list[Tensor] = []
    stack_class = control.core.control.ControlStack
    forward = stack_class.forward

    def noted(self: Any, embed: Any, y: Tensor) -> Tensor:
        result = forward(self, embed, y)
        found.append((result - y).clone())
        return result

    stack_class.forward = noted
    try:
        control.run(control.apply(model, task, conds=conds), steps=4)
    finally:
        stack_class.forward = forward
    return found


def test_on_another_model_object_and_another_gpu(control: Controls, clean: Any) -> None:
    model, other = clean(control.tiny.load("tiny_sd3")), clean(control.tiny.load("tiny_sd3"))
    applied, *conds = control.apply(model, control.task(model))
    wanted = control.run((applied, *conds))
    moved = applied.clone(model_override=(other.model, ({}, {}, {}, set())))
    assert torch.equal(control.run((moved, *conds)), wanted)
    clone = applied.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert clone.model is not model.model
    assert torch.equal(control.run((clone, *conds)), wanted)


def test_memory_counts_the_control_affiner(control: Controls) -> None:
    import comfy.model_management as management

    management.unload_all_models()
    model = control.tiny.load("tiny_sd3")
    task = control.task(model)
    applied = control.apply(model, task)
    control.run(applied)
    (known,) = [m for m in management.loaded_models() if type(m.model).__name__ == "TaskParameters"]
    keymap = control.pack.nodes.keymap
    native = keymap.native_layers(task, model.model) | keymap.native_controls(task, model.model)
    held = sum(t.numel() * t.element_size() for own in native.values() for t in own.values())
    assert known.model.nbytes == held
    assert known.model_size() == held + known.model.folded_bytes
    del known, applied, task
    gc.collect()
    management.cleanup_models_gc()
    management.cleanup_models()
    assert "TaskParameters" not in [type(m.model).__name__ for m in management.loaded_models()]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux"])
def test_under_torch_compile_strengths_and_pictures_change_without_recompiling(
    control: Controls, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    import torch._dynamo
    from comfy.ldm.flux import layers
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules import mmdit
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # On the CPU the default attention looks at the free memory, and recompiles when it changes.
    monkeypatch.setattr(mmdit, "optimized_attention", attention.attention_pytorch)
    del layers
    torch._dynamo.reset()
    model = control.tiny.load(family)
    task = control.task(model)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager")

    def run(strength: float, seed: int = 5, start: Any = compiled) -> Tensor:
        return control.run(control.apply(start, task, image(seed), strength), steps=2)

    assert close(run(1.0), run(1.0, start=model))
    run(0.5)
    torch._dynamo.utils.counters.clear()
    for i in range(6):
        run(0.1 * (i + 1), seed=i)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert close(run(0.7, 3), run(0.7, 3, start=model))
    with Calls(model, control.embedding(model)) as calls:
        run(1.0, start=model)
    assert calls.embedded == 2 + 1
    torch._dynamo.reset()


def _patcher(kind: str, config: dict[str, Any]) -> Any:
    """A model of one of ComfyUI's classes with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    host = getattr(comfy.supported_models, kind)(dict(config))
    host.set_inference_dtype(torch.float32, None)
    model = host.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(model, cpu, cpu)


def _wan_vae() -> Any:
    import comfy.ldm.wan.vae
    import comfy.sd

    options = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    options |= {"attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0}
    state = comfy.ldm.wan.vae.WanVAE(**options).state_dict()
    generator = torch.Generator().manual_seed(1)
    state = {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in state.items()}
    return comfy.sd.VAE(sd=state)  # type: ignore[attr-defined]


WAN = dict(image_model="wan2.1", patch_size=(1, 2, 2), freq_dim=32, window_size=(-1, -1))
WAN |= dict(qk_norm=True, cross_attn_norm=True, eps=1e-6, dim=128, out_dim=16, num_heads=1)
WAN |= dict(ffn_dim=128, num_layers=1, in_dim=16, model_type="t2v", text_dim=32)
QWEN = dict(image_model="qwen_image", in_channels=64, num_layers=1, num_attention_heads=1)
QWEN |= dict(joint_attention_dim=32)


def _sample(control: Controls, applied: Any, shape: tuple[int, ...]) -> Tensor:
    latent = {"samples": torch.zeros(shape)}
    return control.tiny.nodes.KSampler().sample(
        applied[0], 0, 2, 4.0, "euler", "normal", *applied[1:], latent, 1.0
    )[0]["samples"]


def test_a_video_follows_one_picture_or_one_per_frame(control: Controls) -> None:
    model, vae = _patcher("WAN21_T2V", WAN), _wan_vae()
    shape = (1, 16, 3, 8, 8)
    task = control.task(model)
    prompts = control.prompts(model)
    base = _sample(control, (model, *prompts), shape)
    assert torch.equal(
        _sample(control, control.apply(model, control.task(model, std=0), vae=vae), shape), base
    )
    one = _sample(control, control.apply(model, task, vae=vae), shape)
    assert one.shape == base.shape
    assert not close(one, base, 1e-3)
    frames = image(5, count=9)
    many = _sample(control, control.apply(model, task, frames, vae=vae), shape)
    assert not close(many, one, 1e-3)
    with pytest.raises(
        control.core.DiffScalerError, match=r"the video has 3: .* for all frames, or 9"
    ):
        _sample(control, control.apply(model, task, image(5, count=5), vae=vae), shape)


def test_pictures_of_a_base_with_a_videos_vae_go_to_their_own_rows(control: Controls) -> None:
    """Qwen-Image draws pictures in the latents of a video."""
    model, vae = _patcher("QwenImage", QWEN), _wan_vae()
    task, two = control.task(model), torch.cat([image(5), image(6)])
    shape = (2, 16, 1, 8, 8)
    both = _sample(control, control.apply(model, task, two, vae=vae), shape)
    for row in range(2):
        alone = _sample(control, control.apply(model, task, two[row : row + 1], vae=vae), shape)
        assert close(both[row], alone[row], 1e-4)
    assert not close(both[0], alone[0], 1e-3)
