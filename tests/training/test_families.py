"""Each family against its own pipeline: the same calls, the same steps, and tasks that train."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

d = pytest.importorskip("diffusers")

from diffscaler_core import new_task  # noqa: E402
from diffscaler_core.errors import DiffScalerError  # noqa: E402
from diffscaler_core.training import as_denoiser  # noqa: E402
from diffscaler_core.training.bases.calls import CALLS, pack, unpack  # noqa: E402
from diffscaler_core.training.objective import combine, separate  # noqa: E402

#: Not square, so that rows and columns cannot be mixed up unnoticed.
HEIGHT, WIDTH, PIXELS = 8, 12, 8
PICTURE = {"height": HEIGHT * PIXELS, "width": WIDTH * PIXELS}


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(*lengths: int, of: int) -> Tensor:
    return (torch.arange(of) < torch.tensor(lengths)[:, None]).long()


@dataclass
class Case:
    """A tiny pipeline, how it is called without guidance, and what the trainer calls that."""

    build: Callable[[], Any]
    inputs: dict[str, Any]
    condition: dict[str, Tensor] = field(default_factory=dict)
    scheduler: Callable[[], Any] = d.FlowMatchEulerDiscreteScheduler
    size: tuple[int, int] = (HEIGHT, WIDTH)
    component: str = "transformer"
    patched: dict[str, Any] = field(default_factory=dict)
    texts: bool = True

    def pipe(self) -> Any:
        torch.manual_seed(5)
        pipe = self.build()
        model = getattr(pipe, self.component).eval()
        for parameter in model.parameters():  # some layers start at zero and would hide a mistake
            if parameter.ndim > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.02)
        pipe.scheduler = self.scheduler()
        if not isinstance(pipe, d.DDPMPipeline | d.DiTPipeline):
            pipe.vae_scale_factor = PIXELS
        pipe.set_progress_bar_config(disable=True)
        return pipe


def flow(shift: float = 3.0, **more: Any) -> Callable[[], Any]:
    return lambda: d.FlowMatchEulerDiscreteScheduler(shift=shift, **more)


def ddim(**more: Any) -> Callable[[], Any]:
    return lambda: d.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **more)


def nothing(kind: type, **parts: Any) -> Any:
    """A pipeline of which only the named parts are there."""
    wanted = inspect.signature(kind.__init__).parameters
    rest = {n: None for n, p in wanted.items() if n != "self" and p.default is p.empty}
    return kind(**{**rest, **parts})


def sd3() -> Any:
    model = d.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
        joint_attention_dim=12, pooled_projection_dim=10, pos_embed_max_size=16,
    )  # fmt: skip
    return nothing(d.StableDiffusion3Pipeline, transformer=model)


def flux() -> Any:
    model = d.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return nothing(d.FluxPipeline, transformer=model)


def chroma() -> Any:
    model = d.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=[4, 4, 8],
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return nothing(d.ChromaPipeline, transformer=model)


def qwen_image() -> Any:
    model = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return nothing(d.QwenImagePipeline, transformer=model)


def z_image() -> Any:
    model = d.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    # Its padding tokens are made empty and only ever loaded.
    for parameter in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.normal_(parameter)
    return nothing(d.ZImagePipeline, transformer=model)


def lumina2() -> Any:
    model = d.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
        axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=12,
    )  # fmt: skip
    return nothing(d.Lumina2Pipeline, transformer=model)


def sana() -> Any:
    model = d.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=12, sample_size=16, patch_size=1, timestep_scale=0.5,
    )  # fmt: skip
    return nothing(d.SanaPipeline, transformer=model)


def auraflow() -> Any:
    model = d.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=256,
    )  # fmt: skip
    return nothing(d.AuraFlowPipeline, transformer=model)


def cogview4() -> Any:
    model = d.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
        rope_axes_dim=(16, 16),
    )  # fmt: skip
    return nothing(d.CogView4Pipeline, transformer=model)


def pixart(sizes: bool) -> Callable[[], Any]:
    def build() -> Any:
        model = d.PixArtTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, num_layers=2, patch_size=2,
            cross_attention_dim=24, caption_channels=12, in_channels=4, out_channels=8,
            sample_size=128 if sizes else 16, use_additional_conditions=sizes,
        )  # fmt: skip
        kind = d.PixArtAlphaPipeline if sizes else d.PixArtSigmaPipeline
        return nothing(kind, transformer=model)

    return build


def hunyuan_dit() -> Any:
    model = d.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=16,
        hidden_size=24, activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=True, text_len=77, text_len_t5=256,
    )  # fmt: skip
    return nothing(d.HunyuanDiTPipeline, transformer=model, requires_safety_checker=False)


def dit() -> Any:
    model = d.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = d.AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    return d.DiTPipeline(model, vae, None)


def unet(**more: Any) -> Any:
    return d.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **more,
    )  # fmt: skip


def sd() -> Any:
    return nothing(d.StableDiffusionPipeline, unet=unet(), requires_safety_checker=False)


def sdxl() -> Any:
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )  # fmt: skip
    return nothing(d.StableDiffusionXLPipeline, unet=model)


def unet2d() -> Any:
    model = d.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return d.DDPMPipeline(model, None)


CONTEXT, POOLED = rand(2, 5, 12), rand(2, 10, seed=4)
MASK = mask(5, 3, of=5)
T5 = {"prompt_embeds": CONTEXT, "prompt_attention_mask": MASK}
CLIP_AND_T5 = {"prompt_embeds": CONTEXT, "pooled_prompt_embeds": POOLED}
TWO = {"context": CONTEXT, "pooled": POOLED}
MASKED = {"context": CONTEXT, "mask": MASK}
BERT, MT5 = rand(2, 77, 12), rand(2, 256, 16)
HUNYUAN = {
    "prompt_embeds": BERT, "prompt_attention_mask": mask(77, 9, of=77), "prompt_embeds_2": MT5,
    "prompt_attention_mask_2": mask(256, 7, of=256), "negative_prompt_embeds": BERT,
    "negative_prompt_attention_mask": mask(77, 9, of=77), "negative_prompt_embeds_2": MT5,
    "negative_prompt_attention_mask_2": mask(256, 7, of=256),
}  # fmt: skip
FLOATS = {"prompt_attention_mask": MASK.float()}  # as its text encoder gives it
BINS = {"use_resolution_binning": False}

CASES = {
    "sd3": Case(sd3, {**PICTURE, **CLIP_AND_T5, "guidance_scale": 1.0}, TWO, flow()),
    "flux": Case(flux, {**PICTURE, **CLIP_AND_T5}, TWO, flow()),
    "flux, shifted by size": Case(
        flux, {**PICTURE, **CLIP_AND_T5}, TWO, flow(use_dynamic_shifting=True)
    ),
    "chroma": Case(chroma, {**PICTURE, **T5, **FLOATS, "guidance_scale": 1.0}, MASKED, flow()),
    "qwen_image": Case(
        qwen_image,
        {**PICTURE, "prompt_embeds": CONTEXT, "prompt_embeds_mask": MASK, "true_cfg_scale": 1.0},
        MASKED,
        flow(),
    ),
    "z_image": Case(
        z_image,
        {**PICTURE, "prompt_embeds": [CONTEXT[0], CONTEXT[1, :3]], "guidance_scale": 0.0},
        MASKED,
        flow(),
    ),
    "lumina2": Case(lumina2, {**PICTURE, **T5, "guidance_scale": 1.0}, MASKED, flow(6.0)),
    "sana": Case(sana, {**PICTURE, **T5, **BINS, "guidance_scale": 1.0}, MASKED, flow()),
    "auraflow": Case(
        auraflow, {**PICTURE, **T5, "guidance_scale": 1.0}, {"context": CONTEXT}, flow(1.73)
    ),
    "cogview4": Case(
        cogview4,
        {**PICTURE, "prompt_embeds": CONTEXT, "guidance_scale": 1.0},
        {"context": CONTEXT},
        flow(1.0, use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25,
             max_shift=0.75),
    ),
    "pixart sigma": Case(
        pixart(False), {**PICTURE, **T5, **BINS, "guidance_scale": 1.0}, MASKED, ddim()
    ),
    "pixart alpha": Case(
        pixart(True), {**PICTURE, **T5, **BINS, "guidance_scale": 1.0}, MASKED, ddim()
    ),
    "hunyuan_dit": Case(
        hunyuan_dit,
        {**PICTURE, **HUNYUAN, **BINS, "guidance_scale": 1.0},
        {
            "context": BERT, "mask": HUNYUAN["prompt_attention_mask"], "context_2": MT5,
            "mask_2": HUNYUAN["prompt_attention_mask_2"],
        },
        ddim(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    ),
    "dit": Case(
        dit, {"class_labels": [3, 7], "guidance_scale": 1.0}, {"label": torch.tensor([3, 7])},
        ddim(), size=(8, 8),
    ),
    "sd": Case(
        sd, {**PICTURE, "prompt_embeds": CONTEXT, "guidance_scale": 1.0}, {"context": CONTEXT},
        ddim(), component="unet",
    ),
    "sd, v": Case(
        sd, {**PICTURE, "prompt_embeds": CONTEXT, "guidance_scale": 1.0}, {"context": CONTEXT},
        ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True), component="unet",
    ),
    "sdxl": Case(
        sdxl, {**PICTURE, **CLIP_AND_T5, "guidance_scale": 1.0}, TWO, ddim(), component="unet"
    ),
    "unet2d": Case(unet2d, {"batch_size": 2}, {}, d.DDPMScheduler, (8, 8), "unet"),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@dataclass
class Step:
    """One step of the stock pipeline: its latents before and after, and what the model got."""

    before: Tensor
    after: Tensor
    timestep: Tensor
    told: dict[str, Any]
    said: Tensor


def heard_by(model: Any, log: list[dict[str, Any]]) -> Any:
    names = inspect.signature(type(model).forward.__wrapped__ if hasattr(
        type(model).forward, "__wrapped__") else type(model).forward)  # fmt: skip

    def hear(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = names.bind(module, *args, **kwargs).arguments
        leave = ("self", "return_dict", "joint_attention_kwargs", "attention_kwargs",
                 "cross_attention_kwargs", "timestep_cond")  # fmt: skip
        log.append({k: v for k, v in bound.items() if k not in leave and v is not None})

    return model.register_forward_pre_hook(hear, with_kwargs=True)


def stock_steps(pipe: Any, case: Case, count: int = 2) -> list[Step]:
    """Runs the stock pipeline as it is, and notes each of its steps."""
    steps: list[Step] = []
    told: list[dict[str, Any]] = []
    plain = pipe.scheduler.step

    def step(said: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = plain(said, timestep, sample, *args, **kwargs)
        after = out[0] if isinstance(out, tuple) else out.prev_sample
        steps.append(Step(sample.clone(), after.clone(), torch.as_tensor(timestep), told[-1], said))
        return out

    pipe.scheduler.step = step
    model = getattr(pipe, case.component)
    handle = heard_by(model, told)
    pipe(
        **case.inputs,
        num_inference_steps=count,
        output_type="np" if case.component == "unet" and not case.condition else "latent",
        generator=torch.Generator().manual_seed(0),
    )
    handle.remove()
    assert len(steps) == count
    return steps


def as_latents(pipe: Any, tensor: Tensor) -> Tensor:
    """The stock pipeline's latents as (B, C, h, w), by its own way back."""
    if tensor.ndim == 3:
        tensor = pipe._unpack_latents(tensor, HEIGHT * PIXELS, WIDTH * PIXELS, PIXELS)
    return tensor.squeeze(2) if tensor.ndim == 5 else tensor


def same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, Tensor):
        ours, theirs = ours.float(), theirs.float()
        if where == "call.timestep":  # some pipelines pass one number for all rows
            theirs = theirs.expand_as(ours)
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(theirs, dict):
        ours = {k: v for k, v in ours.items() if v is not None}
        theirs = {k: v for k, v in theirs.items() if v is not None}
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            same(ours[i], value, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def level(pipe: Any, objective: Any, i: int, steps: list[Step]) -> tuple[Tensor, Tensor, Tensor]:
    """(t, α after, σ after) of the stock scheduler's step i, in its own numbers."""
    if objective.is_flow:
        t, after = pipe.scheduler.sigmas[i], pipe.scheduler.sigmas[i + 1]
        return t, 1 - after, after
    bars = pipe.scheduler.alphas_cumprod
    bar = bars[steps[i + 1].timestep] if i + 1 < len(steps) else torch.tensor(1.0)
    return (steps[i].timestep + 0.5) / len(bars), bar.sqrt(), (1 - bar).sqrt()


@torch.no_grad()
def test_every_call_and_every_step_is_the_stock_pipelines_own(case):
    pipe = case.pipe()
    steps = stock_steps(pipe, case)
    denoiser = as_denoiser(pipe)
    objective, heard = denoiser.objective, []
    handle = heard_by(denoiser.model, heard)
    for i, step in enumerate(steps):
        before, after = as_latents(pipe, step.before), as_latents(pipe, step.after)
        if isinstance(pipe, d.DiTPipeline):  # it doubles its rows, guided or not
            before, after = before[:2], after[:2]
        assert before.shape[2:] == case.size
        t, alpha, sigma = level(pipe, objective, i, steps)
        timestep, now_alpha, now_sigma = objective.at(t.expand(len(before)))
        output = denoiser.predict(before, timestep, case.condition)
        same(heard[-1], step.told, "call")
        # What was said, as data and noise, mixed at the next level, is where the pipeline went.
        x0, noise = separate(objective.kind, objective.mean(output), before, now_alpha, now_sigma)
        if isinstance(pipe.scheduler, d.DDPMScheduler):  # it adds noise of its own
            said = combine("epsilon", x0, noise, now_alpha, now_sigma)
            torch.testing.assert_close(said, step.said, rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(alpha * x0 + sigma * noise, after, rtol=1e-3, atol=1e-4)
    handle.remove()


def test_a_task_trains_and_the_base_stays(case):
    """Every affiner learns whose layer the base itself makes use of."""
    pipe = case.pipe()
    denoiser = as_denoiser(pipe)
    before = {k: v.clone() for k, v in denoiser.model.state_dict().items()}
    # of a few hidden units all may be at rest for two pictures; with this seed some are not
    task = new_task(denoiser.model, rank=16, component=denoiser.component, seed=1)
    channels = 3 if case.component == "unet" and not case.condition else 4
    x0, noise = rand(2, channels, *case.size), rand(2, channels, *case.size, seed=8)
    t = torch.tensor([0.3, 0.8])
    losses, last = [], {}
    with denoiser.held(), denoiser.attached({"t": task}) as trainable:
        trainable.requires_grad_(True)
        named = trainable.parameters_of("t")
        optimizer = torch.optim.Adam(named.values(), lr=0.02)
        for _ in range(3):
            timestep, x_t = denoiser.objective.noisy(x0, noise, t)
            output = denoiser.predict(x_t, timestep, case.condition)
            loss = denoiser.objective.loss(output, x0, noise, t).mean()
            optimizer.zero_grad()
            loss.backward()
            losses.append(float(loss.detach()))
            last = {n: torch.zeros(()) if p.grad is None else p.grad for n, p in named.items()}
            optimizer.step()
    assert all(bool(torch.isfinite(grad).all()) for grad in last.values())
    still = {name.rpartition(".")[0] for name, grad in last.items() if not bool(grad.any())}
    assert still <= {f"{case.component}.{n}" for n in _unread(denoiser, x_t, timestep, case)}
    assert losses[2] < losses[0]
    after = denoiser.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_control_starts_as_nothing_and_learns(case):
    """In the trainer's own way: through `Denoiser`, with one row's control left out."""
    pipe = case.pipe()
    denoiser = as_denoiser(pipe)
    component = denoiser.component
    task = new_task(denoiser.model, rank=4, component=component, control="edges", seed=1)
    channels = 3 if case.component == "unet" and not case.condition else 4
    x0, noise = rand(2, channels, *case.size), rand(2, channels, *case.size, seed=8)
    told = {**case.condition, "control": 3 * rand(2, channels, *case.size, seed=9)}
    timestep, x_t = denoiser.objective.noisy(x0, noise, torch.tensor([0.3, 0.8]))
    with denoiser.held():
        with torch.no_grad():
            base = denoiser(x_t, timestep, case.condition)
        with denoiser.attached({"t": task}) as trainable:
            with torch.no_grad():
                assert torch.equal(denoiser(x_t, timestep, told), base)
            trainable.requires_grad_(True)
            named = trainable.parameters_of("t")
            optimizer = torch.optim.Adam(named.values(), lr=0.02)
            losses = []
            for _ in range(3):
                output = denoiser(x_t, timestep, told)
                loss = denoiser.objective.loss(output, x0, noise, torch.tensor([0.3, 0.8])).mean()
                optimizer.zero_grad()
                loss.backward()
                losses.append(float(loss.detach()))
                optimizer.step()
            own = {name: p.grad for name, p in named.items() if name in task.extras}
            assert own.keys() == task.extras.keys()
            assert all(
                bool(grad.any()) and bool(torch.isfinite(grad).all()) for grad in own.values()
            )
            assert losses[2] < losses[0]
            with torch.no_grad():
                kept, left = (
                    denoiser(x_t, timestep, {**told, "control_kept": torch.tensor(rows)})
                    for rows in ([1.0, 1.0], [1.0, 0.0])
                )
                other = {**told, "control": -told["control"]}
                shown = denoiser(x_t, timestep, {**other, "control_kept": torch.tensor([1.0, 0.0])})
            assert torch.equal(left[1], shown[1])
            assert not torch.allclose(left[1], kept[1])
            assert not torch.allclose(left[0], shown[0])
        with torch.no_grad():
            assert torch.equal(denoiser(x_t, timestep, case.condition), base)


def _unread(denoiser: Any, x_t: Tensor, timestep: Tensor, case: Case) -> set[str]:
    """Layers whose own weights move nothing, such as a last block's way back to the text."""
    denoiser.model.requires_grad_(True)
    denoiser.objective.mean(
        denoiser.predict(x_t, timestep, case.condition)
    ).square().sum().backward()
    found = set()
    for name, parameter in denoiser.model.named_parameters():
        if name.endswith(".weight") and (parameter.grad is None or not bool(parameter.grad.any())):
            found.add(name.removesuffix(".weight"))
    return found


def test_packing_is_the_pipelines_own_and_comes_undone():
    x = rand(2, 4, HEIGHT, WIDTH)
    theirs = d.FluxPipeline._pack_latents(x, 2, 4, HEIGHT, WIDTH)
    assert torch.equal(pack(x), theirs)
    assert torch.equal(unpack(theirs, HEIGHT, WIDTH), x)


def test_every_family_that_can_be_trained_is_compared_here():
    named = {name.split(",")[0].split(" ")[0] for name in CASES}
    # no pipeline calls a U-Net of classes; tests/training/test_classes.py trains one
    assert named | {"unet2d_condition", "unet2d_classes"} == set(CALLS) | {"sd"}


#: Sides of a token, in latents.
PATCHES = {"sd3": 2, "flux": 2, "chroma": 2, "qwen_image": 2, "z_image": 2, "sana": 1, "sd": 1}


@pytest.mark.parametrize("name", PATCHES)
def test_sides_of_pictures_fit_the_bases_tokens(name):
    pipe, patch = CASES[name].pipe(), PATCHES[name]
    assert as_denoiser(pipe).factor == patch  # of latents: there is no VAE here
    pipe.vae = d.AutoencoderTiny()
    assert as_denoiser(pipe).factor == patch * PIXELS


def test_flux_says_how_big_its_pictures_are():
    pipe = CASES["flux"].pipe()
    pipe.vae = d.AutoencoderTiny()
    assert as_denoiser(pipe).size == 1024


def test_prompts_out_of_a_file_need_no_mask():
    for name in ("lumina2", "chroma", "z_image", "sana", "qwen_image", "pixart sigma"):
        denoiser = as_denoiser(CASES[name].pipe())
        x, t = rand(2, 4, *CASES[name].size), torch.tensor([0.5, 0.5])
        timestep = denoiser.objective.at(t)[0]
        seen = mask(5, 5, of=5)
        with torch.no_grad():
            bare = denoiser.predict(x, timestep, {"context": CONTEXT})
            full = denoiser.predict(x, timestep, {"context": CONTEXT, "mask": seen})
            part = denoiser.predict(x, timestep, MASKED)
        torch.testing.assert_close(bare, full, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(bare[1], part[1], rtol=1e-4, atol=1e-5), name


def test_what_a_base_is_told_besides_is_refused_by_name():
    refiner = CASES["sdxl"].pipe()
    denoiser = as_denoiser(refiner)
    wrong = {"context": CONTEXT, "pooled": POOLED[:, :6]}
    with pytest.raises(
        DiffScalerError, match="reads 34 numbers of text and sizes, and is given 30"
    ):
        denoiser.predict(rand(2, 4, 8, 12), torch.tensor([1, 1]), wrong)
    kandinsky = CASES["sd"].pipe()
    kandinsky.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(DiffScalerError, match="told 'image' conditions"):
        as_denoiser(kandinsky)
    sprint = CASES["sana"].pipe()
    sprint.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(DiffScalerError, match="TrigFlow"):
        as_denoiser(sprint)
    lost = CASES["sd"].pipe()
    lost.scheduler = d.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(DiffScalerError, match=r"does not say how .* noise grows"):
        as_denoiser(lost)
