"""Control on stock pipelines of many families: with their own VAEs, guidance, packing and sizes."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffscaler_core import DiffScalerError, new_task
from diffscaler_core.autoencoder import vae_decode, vae_encode
from diffscaler_core.targets import resolve
from diffscaler_core.task import embedding_of

#: Of the pictures, in pixels; latents are half of it, or as the family's VAE has it.
HEIGHT, WIDTH = 16, 32


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


A, B = picture(1), picture(2, 20, 20)


def kl(latents: int = 4, **more: Any) -> Any:
    return d.AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latents,
        norm_num_groups=1,
        scaling_factor=0.5,
        **more,
    )


def dc() -> Any:
    blocks = ("ResBlock", "EfficientViTBlock")
    return d.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip


def video_vae(kind: Any) -> Any:
    scales = {"scale_factor_spatial": 2, "scale_factor_temporal": 2}
    return kind(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, 0.2, -0.1, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
        **(scales if kind is d.AutoencoderKLWan else {}),
    )  # fmt: skip


def ltx_vae() -> Any:
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=6, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, False, False, False),
        decoder_spatio_temporal_scaling=(True, False, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    vae.latents_mean.copy_(rand(6))
    vae.latents_std.copy_(rand(6).abs() + 0.5)
    return vae


def flux2_vae() -> Any:
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=1,
        layers_per_block=1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    vae.bn.running_mean.copy_(rand(16))
    vae.bn.running_var.copy_(rand(16).abs() + 0.5)
    return vae


def flow() -> Any:
    return d.FlowMatchEulerDiscreteScheduler()


def pndm() -> Any:
    return d.PNDMScheduler(skip_prk_steps=True)


def ddim() -> Any:
    return d.DDIMScheduler(clip_sample=False)


@dataclass
class Case:
    """A stock pipeline at tiny size, and how it is called for n prompts, with guidance."""

    pipeline: type
    model: str
    inputs: Callable[[int], dict[str, Any]]
    vae: Callable[[], Any] = kl
    scheduler: Callable[[], Any] = flow
    component: str = "transformer"
    size: tuple[int, int] | None = (HEIGHT, WIDTH)
    more: dict[str, Any] = field(default_factory=dict)
    images: str | None = "num_images_per_prompt"

    def pipe(self, tiny: Any) -> Any:
        model = tiny(self.model)
        torch.manual_seed(7)
        parts = {self.component: model, "vae": self.vae().eval(), "scheduler": self.scheduler()}
        wanted = inspect.signature(self.pipeline.__init__).parameters
        rest = {n: None for n, p in wanted.items() if n != "self" and p.default is p.empty}
        pipe = self.pipeline(**{**rest, **parts, **self.more})
        pipe.set_progress_bar_config(disable=True)
        if self.pipeline is d.Lumina2Pipeline:  # it takes for granted what its VAE has
            pipe.vae_scale_factor = 2
        return pipe

    def run(self, pipe: Any, prompts: int = 3, steps: int = 2, **more: Any) -> Tensor:
        size = {} if self.size is None else dict(zip(("height", "width"), self.size, strict=True))
        out = pipe(
            **{**self.inputs(prompts), **size, "num_inference_steps": steps, **more},
            generator=torch.Generator().manual_seed(0),
            output_type="np" if self.pipeline is d.DiTPipeline else "latent",
        )
        found = out[0] if self.pipeline is not d.DiTPipeline else torch.from_numpy(out.images)
        return torch.stack(list(found)).float()

    def task(self, pipe: Any, noisy: Any, **options: Any) -> Any:
        model = getattr(pipe, self.component)
        task = new_task(
            model, rank=2, name="edges", control="edges", component=self.component, **options
        )
        return noisy(task, 1, 0.3)


CONTEXT, POOLED, SHORT = rand(4, 5, 12), rand(4, 10, seed=4), torch.ones(4, 5, dtype=torch.long)


def texts(n: int, **other: Any) -> dict[str, Any]:
    """Prompts; the negative ones are zeros."""
    return {
        "prompt_embeds": CONTEXT[:n], "negative_prompt_embeds": torch.zeros(n, 5, 12), **other,
    }  # fmt: skip


def pooled(n: int, **other: Any) -> dict[str, Any]:
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return texts(n, **dict(zip(names, (POOLED[:n], torch.zeros(n, 10)), strict=True)), **other)


def masked(n: int, **other: Any) -> dict[str, Any]:
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return texts(n, **dict.fromkeys(names, SHORT[:n]), **other)


def qwen(n: int) -> dict[str, Any]:
    names = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return texts(n, **dict.fromkeys(names, SHORT[:n]), true_cfg_scale=2.0)


def z_image(n: int) -> dict[str, Any]:
    return {
        "prompt_embeds": list(CONTEXT[:n]), "negative_prompt_embeds": list(0 * CONTEXT[:n]),
        "guidance_scale": 2.0,
    }  # fmt: skip


def wan(n: int) -> dict[str, Any]:
    return texts(n, num_frames=3, guidance_scale=2.0)


BINS = {"use_resolution_binning": False}
SAFE = {"requires_safety_checker": False}
CASES = {
    "sd3": Case(d.StableDiffusion3Pipeline, "sd3", pooled, lambda: kl(shift_factor=0.2)),
    "flux": Case(
        d.FluxPipeline, "flux", lambda n: pooled(n, true_cfg_scale=2.0),
        lambda: kl(shift_factor=0.2),
    ),
    "flux2": Case(
        d.Flux2Pipeline, "flux2", lambda n: {"prompt_embeds": CONTEXT[:n]}, flux2_vae,
    ),
    "chroma": Case(
        d.ChromaPipeline, "chroma",
        lambda n: masked(n, guidance_scale=2.0) | {
            "prompt_attention_mask": SHORT[:n].float(),
            "negative_prompt_attention_mask": SHORT[:n].float(),
        },
    ),
    "qwen_image": Case(
        d.QwenImagePipeline, "qwen_image", qwen, lambda: video_vae(d.AutoencoderKLQwenImage),
    ),
    "lumina2": Case(d.Lumina2Pipeline, "lumina2", lambda n: masked(n, guidance_scale=2.0)),
    "z_image": Case(d.ZImagePipeline, "z_image", z_image),
    "pixart": Case(
        d.PixArtSigmaPipeline, "pixart", lambda n: masked(n, negative_prompt=None, **BINS),
        scheduler=d.DPMSolverMultistepScheduler,
    ),
    "sana": Case(
        d.SanaPipeline, "sana", lambda n: masked(n, negative_prompt=None, **BINS), dc,
        size=(32, 64),
    ),
    "auraflow": Case(d.AuraFlowPipeline, "auraflow", masked),
    "cogview4": Case(
        d.CogView4Pipeline, "cogview4", texts,
        scheduler=lambda: d.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
        ),
    ),
    "dit": Case(
        d.DiTPipeline, "dit", lambda n: {"class_labels": list(range(n))}, scheduler=ddim,
        size=None, images=None,
    ),
    "sd15": Case(
        d.StableDiffusionPipeline, "sd15", texts, scheduler=ddim, component="unet", more=SAFE
    ),
    "sd15 pndm": Case(
        d.StableDiffusionPipeline, "sd15", texts, scheduler=pndm, component="unet",
        more=SAFE,
    ),
    "sdxl": Case(
        d.StableDiffusionXLPipeline, "sdxl", pooled, scheduler=d.EulerDiscreteScheduler,
        component="unet",
    ),
    "wan": Case(
        d.WanPipeline, "wan", wan, lambda: video_vae(d.AutoencoderKLWan),
        scheduler=d.UniPCMultistepScheduler, images="num_videos_per_prompt",
    ),
    "ltx": Case(
        d.LTXPipeline, "ltx_video", lambda n: masked(n, num_frames=3, guidance_scale=2.0),
        ltx_vae, size=(32, 64), images="num_videos_per_prompt",
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_an_untrained_control_changes_no_bit(case: Case, tiny: Any) -> None:
    pipe = case.pipe(tiny)
    before = case.run(pipe)
    fresh = new_task(getattr(pipe, case.component), control="edges", component=case.component)
    pipe.load_diffscaler(fresh)
    assert torch.equal(case.run(pipe), before)
    with pipe.diffscaler_control(A):
        assert torch.equal(case.run(pipe), before)
    pipe.unload_diffscaler()
    assert torch.equal(case.run(pipe), before)


def test_a_list_of_pictures_equals_separate_calls(case: Case, tiny: Any, make_noisy: Any) -> None:
    pipe = case.pipe(tiny)
    base = case.run(pipe)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    assert torch.equal(case.run(pipe), base)  # without a picture it rests
    with pipe.diffscaler_control(A):
        all_a = case.run(pipe)
    with pipe.diffscaler_control(B):
        all_b = case.run(pipe)
    with pipe.diffscaler_control([A, None, B]):
        mixed = case.run(pipe)
    scale = float(base.abs().max())
    for one, other, row in ((all_a, base, 0), (all_b, base, 2), (all_a, all_b, 1)):
        assert (one[row] - other[row]).abs().max() > 1e-3 * scale
    expected = torch.stack([all_a[0], base[1], all_b[2]])
    torch.testing.assert_close(mixed, expected, atol=1e-5 * max(scale, 1), rtol=1e-4)
    with pipe.diffscaler_control([None, None, None]):
        assert torch.equal(case.run(pipe), base)
    assert torch.equal(case.run(pipe), base)
    with pipe.diffscaler_control(A, strength=0.0):
        assert torch.equal(case.run(pipe), base)
    with pipe.diffscaler_control(A, start=0.5, end=0.5):
        assert torch.equal(case.run(pipe), base)


def test_each_prompts_pictures_have_its_control(case: Case, tiny: Any, make_noisy: Any) -> None:
    if case.images is None:
        pytest.skip("this pipeline makes one image per prompt")
    pipe = case.pipe(tiny)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    heard: list[tuple[int, Any]] = []
    with watched(pipe, case, heard), pipe.diffscaler_control([A, None]):
        try:
            case.run(pipe, 2, **{case.images: 2})
        except (RuntimeError, ValueError) as error:  # some repeat no ready-made prompts
            if "control" in str(error):
                raise
    if not heard:
        pytest.skip("this pipeline cannot repeat prompts that come ready-made")
    (_, on), *_ = heard
    assert [bool(v) for v in on[:4]] == [True, True, False, False]
    assert on[4:] in ([], on[:4])


@contextmanager
def watched(pipe: Any, case: Case, heard: list[Any]) -> Iterator[None]:
    """Notes at each call which rows' embedded latents a control changed: [(which half, rows)]."""
    model: nn.Module = getattr(pipe, case.component)
    module: Any = resolve(model, embedding_of(model).name)
    told: dict[str, Any] = {}

    def call(m: Any, args: Any, kwargs: Any) -> None:
        told.clear()
        told.update(kwargs, latents=args[0] if args else None, args=args)

    def embedded(m: Any, args: Any, y: Tensor) -> None:
        changed = y - m.forward(args[0])
        latents = told["latents"] if told["latents"] is not None else told.get("hidden_states")
        latents = told.get("sample") if latents is None else latents
        rows = [bool(part.any()) for part in changed.chunk(len(latents))]
        heard.append((dict(told), rows))

    handles = [
        model.register_forward_pre_hook(call, with_kwargs=True),
        module.register_forward_hook(embedded),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conditional(told: dict[str, Any], rows: int) -> list[bool]:
    """Which rows of a call have a prompt: the negative prompts here are zeros."""
    if "class_labels" in told:
        return [label != 1000 for label in told["class_labels"].tolist()]
    texts = told.get("encoder_hidden_states")
    texts = told["args"][2] if texts is None else texts  # Z-Image: a list
    return [bool(text.any()) for text in texts]


def test_the_unconditional_half_can_do_without(case: Case, tiny: Any, make_noisy: Any) -> None:
    pipe = case.pipe(tiny)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    seen = []
    for pictures in (A, [None, A]):
        heard: list[Any] = []
        with watched(pipe, case, heard), pipe.diffscaler_control(pictures, control_in_uncond=False):
            case.run(pipe, 2)
        assert heard
        for told, rows in heard:
            wanted = conditional(told, len(rows))
            seen += wanted
            if isinstance(pictures, list):
                wanted = [on and i % 2 == 1 for i, on in enumerate(wanted)]
            assert rows == wanted
    assert set(seen) == ({True} if case.pipeline is d.Flux2Pipeline else {True, False})


def test_the_task_rests_outside_of_its_steps(case: Case, tiny: Any, make_noisy: Any) -> None:
    pipe = case.pipe(tiny)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    heard: list[Any] = []
    with watched(pipe, case, heard), pipe.diffscaler_control(A, start=0.25, end=0.75):
        case.run(pipe, 1, steps=4)
    steps = [any(rows) for _, rows in heard]
    per_step = len(steps) // 4
    if case.scheduler is pndm:  # it makes five steps of four, the second of them twice
        assert steps == [False, False, False, True, False]
        return
    assert steps == [on for on in (False, True, True, False) for _ in range(per_step)]


def test_pictures_are_encoded_once_and_embedded_once(
    case: Case, tiny: Any, make_noisy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = case.pipe(tiny)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    encoded, embedded, called = [], [], []
    plain = pipe.vae.encode
    monkeypatch.setattr(
        pipe.vae, "encode", lambda x, *a, **k: encoded.append(x.shape) or plain(x, *a, **k)
    )
    model = getattr(pipe, case.component)
    module: Any = resolve(model, embedding_of(model).name)
    own = module.forward
    monkeypatch.setattr(module, "forward", lambda x: embedded.append(1) or own(x))
    handle = model.register_forward_pre_hook(lambda *a: called.append(1))
    with pipe.diffscaler_control([A, B, A]):
        case.run(pipe, 3, steps=3)
    handle.remove()
    assert len(encoded) == 2
    assert len(embedded) == len(called) + 1


def test_rows_and_controls_go_together(case: Case, tiny: Any, make_noisy: Any) -> None:
    pipe = case.pipe(tiny)
    style = new_task(getattr(pipe, case.component), rank=2, name="style", component=case.component)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    pipe.load_diffscaler(make_noisy(style, 2, 0.3))
    only_style = case.run(pipe, 3)
    with pipe.diffscaler_control(A):
        both = case.run(pipe, 3)
    pipe.set_diffscaler([])
    base = case.run(pipe, 3)
    with pipe.diffscaler_control(A):
        only_control = case.run(pipe, 3)
    with pipe.diffscaler_rows(["style", None, "style"]), pipe.diffscaler_control([A, A, None]):
        mixed = case.run(pipe, 3)
    with pipe.diffscaler_control(A), pipe.diffscaler_rows(["edges", None, {"style": 1.0}]):
        routed = case.run(pipe, 3)  # a row that names no control has none, once one does
    close = {"atol": 1e-5 * max(1.0, float(both.abs().max())), "rtol": 1e-4}
    torch.testing.assert_close(
        mixed, torch.stack([both[0], only_control[1], only_style[2]]), **close
    )
    torch.testing.assert_close(
        routed, torch.stack([only_control[0], base[1], only_style[2]]), **close
    )


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "z_image", "flux2"])
def test_each_call_has_its_own_size_and_prompts(name: str, tiny: Any, make_noisy: Any) -> None:
    case = CASES[name]
    pipe = case.pipe(tiny)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    wide, high = {"height": 16, "width": 32}, {"height": 32, "width": 16}  # as many tokens

    def draw(size: dict[str, int]) -> Tensor:
        call = {**case.inputs(2), **size, "num_inference_steps": 1, "output_type": "latent"}
        found = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
        return torch.stack(list(found))

    alone = []
    for size in (wide, high):
        with pipe.diffscaler_control(B):
            alone.append(draw(size))
    with pipe.diffscaler_control(B):
        for size, expected in zip((wide, high, wide), (*alone, alone[0]), strict=True):
            assert torch.equal(draw(size), expected)
    with pipe.diffscaler_control([A, None]):
        case.run(pipe, 2)
        with pytest.raises(DiffScalerError, match="2 pictures, but the pipeline runs 1 prompts"):
            case.run(pipe, 1, num_images_per_prompt=2)  # as large a batch


@torch.no_grad()
def test_pictures_become_the_latents_that_the_models_know(tiny: Any) -> None:
    """As diffusers' own pipelines encode pictures, where they do; else written out by hand."""
    pixels = rand(1, 3, 16, 32).clamp(-1, 1)
    own = {name: CASES[name].pipe(tiny).vae for name in ("sd3", "sana", "wan", "ltx")}
    z = own["sd3"].encode(pixels).latent_dist.mode()
    torch.testing.assert_close(vae_encode(own["sd3"])(pixels), (z - 0.2) * 0.5)
    z = own["sana"].encode(pixels).latent
    torch.testing.assert_close(vae_encode(own["sana"])(pixels), z * 0.4)
    z = own["wan"].encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = torch.tensor([0.1, 0.2, -0.1, 0.0]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    wanted = (z - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(vae_encode(own["wan"])(pixels), wanted)
    z = own["ltx"].encode(pixels[:, :, None]).latent_dist.mode()
    statistics = own["ltx"].latents_mean, own["ltx"].latents_std
    wanted = d.LTXPipeline._normalize_latents(z, *statistics, own["ltx"].config.scaling_factor)
    torch.testing.assert_close(vae_encode(own["ltx"])(pixels), wanted[:, :, 0])
    pipe = CASES["flux2"].pipe(tiny)
    wanted = pipe._encode_vae_image(pixels, generator=None)
    torch.testing.assert_close(vae_encode(pipe.vae)(pixels), wanted)
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(-1, 1, 1)
    z = pipe._unpatchify_latents(wanted * std + pipe.vae.bn.running_mean.view(-1, 1, 1))
    decoded = pipe.vae.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(vae_decode(pipe.vae)(wanted), decoded)
    qwen = CASES["qwen_image"].pipe(tiny)
    edit = d.QwenImageEditPipeline._encode_vae_image
    qwen.latent_channels = 4
    wanted = edit(qwen, pixels[:, :, None], generator=None)[:, :, 0]
    torch.testing.assert_close(vae_encode(qwen.vae)(pixels), wanted)


def test_a_reference_picture_has_no_control_of_its_own(tiny: Any, make_noisy: Any) -> None:
    case = CASES["flux"]
    pipe = d.FluxKontextPipeline(**case.pipe(tiny).components)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_diffscaler(case.task(pipe, make_noisy))
    heard: list[Any] = []
    module: Any = pipe.transformer.x_embedder
    handle = module.register_forward_hook(
        lambda m, a, y: heard.append((y - m.forward(a[0])).abs().sum(-1) > 0)
    )
    reference = torch.rand(1, 3, 64, 32)
    with pipe.diffscaler_control(A):
        pipe(
            prompt_embeds=CONTEXT[:1], pooled_prompt_embeds=POOLED[:1], image=reference,
            height=16, width=32, num_inference_steps=1, output_type="latent",
            _auto_resize=False, max_area=16 * 32,
        )  # fmt: skip
    handle.remove()
    drawn = (16 // 4) * (32 // 4)
    assert heard[0].shape[1] > drawn
    assert bool(heard[0][:, :drawn].all())
    assert not heard[0][:, drawn:].any()
