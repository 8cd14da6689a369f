"""Real diffusers pipelines at tiny size, and tasks that visibly change them."""
# ruff: noqa: E402

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Where torchvision's compiled part cannot load, this keeps `import peft` and transformers alive.
sys.modules["comfy_launch"].prepare()

import diffusers as d

import diffscaler_core.pipelines  # noqa: F401
from diffscaler_core import TaskAdapter, new_task

TEXTLESS = dict.fromkeys(
    ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
)


@dataclass
class Case:
    """One pipeline: how to build it, and how to call it for n prompts."""

    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    component: str = "transformer"
    images: bool = True  # has num_images_per_prompt
    repeats: bool = True  # whether ready-made prompts must be repeated for it by hand
    targets: str = "blocks"
    kwargs: dict[str, Any] = field(default_factory=dict)

    def pipe(self) -> Any:
        torch.manual_seed(5)
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def model(self, pipe: Any) -> nn.Module:
        return getattr(pipe, self.component)

    def run(self, pipe: Any, prompts: int = 2, **kwargs: Any) -> Tensor:
        torch.manual_seed(9)
        call = {**self.inputs(prompts), "num_inference_steps": 2, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        if kwargs.get("num_images_per_prompt") and self.repeats:
            _repeat_prompts(pipe, prompts, kwargs["num_images_per_prompt"])
        return torch.from_numpy(pipe(**{**call, **kwargs}, generator=generator).images)

    def task(self, pipe: Any, name: str, seed: int, method: str = "diffscaler") -> TaskAdapter:
        model = self.model(pipe)
        task = new_task(model, method, 4, self.targets, name, component=self.component)
        return noisy(task, seed)

    def compiled(self, pipe: Any, **kwargs: Any) -> Tensor:
        """A run of the compiled model; fails if it compiles anything anew after two steps."""
        torch._dynamo.reset()
        self.model(pipe).compile(backend="eager")
        self.run(pipe, num_inference_steps=2)
        counted = torch._dynamo.utils.counters
        counted.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            pictures = self.run(pipe, **kwargs)
        assert not counted["stats"]
        torch._dynamo.reset()
        return pictures


def _repeat_prompts(pipe: Any, prompts: int, images: int) -> None:
    """Some stock pipelines leave this undone for prompts that come ready-made, as here."""
    encode = type(pipe).encode_prompt.__get__(pipe)

    def repeated(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(
            t.repeat_interleave(images, 0) if isinstance(t, Tensor) and len(t) == prompts else t
            for t in encode(*args, **kwargs)
        )

    pipe.encode_prompt = repeated


def noisy(task: TaskAdapter, seed: int, size: float = 0.1) -> TaskAdapter:
    """The task with random numbers for all it has, as if trained."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator) * size

    layers = {n: {k: numbers(t) for k, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers, extras={n: numbers(t) for n, t in task.extras.items()})


def vae(latents: int = 4) -> Any:
    return d.AutoencoderKL(
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        latent_channels=latents,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()


def sd3() -> Any:
    model = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
    ).eval()
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    return d.StableDiffusion3Pipeline(transformer=model, vae=vae(), scheduler=scheduler, **TEXTLESS)


def sd3_inputs(n: int) -> dict[str, Any]:
    context, pooled = torch.randn(n, 5, 16), torch.randn(n, 12)
    return {
        "prompt_embeds": context,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": context * 0,
        "negative_pooled_prompt_embeds": pooled * 0,
        "height": 8,
        "width": 8,
    }


def dit() -> Any:
    model = d.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        num_embeds_ada_norm=1000,
    )
    return d.DiTPipeline(model.eval(), vae(), d.DDIMScheduler())


def dit_inputs(n: int) -> dict[str, Any]:
    return {"class_labels": list(range(1, n + 1))}


def pixart() -> Any:
    model = d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        norm_num_groups=1,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    scheduler = d.DPMSolverMultistepScheduler()
    return d.PixArtSigmaPipeline(None, None, vae(), model.eval(), scheduler)


def pixart_inputs(n: int) -> dict[str, Any]:
    context, mask = torch.randn(n, 5, 12), torch.ones(n, 5)
    return {
        "prompt_embeds": context,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": context * 0,
        "negative_prompt_attention_mask": mask,
        "negative_prompt": None,
        "use_resolution_binning": False,
        "height": 8,
        "width": 8,
    }


def flux() -> Any:
    model = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=[4, 4, 8],
    )
    text = {k: v for k, v in TEXTLESS.items() if not k.endswith("3")}
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    pipe = d.FluxPipeline(transformer=model.eval(), vae=vae(), scheduler=scheduler, **text)
    pipe.vae_scale_factor = 1
    return pipe


def flux_inputs(n: int) -> dict[str, Any]:
    inputs = {k: v for k, v in sd3_inputs(n).items() if "negative" not in k}
    negative = {k: v for k, v in sd3_inputs(n).items() if "negative" in k}
    return {**inputs, **negative, "true_cfg_scale": 2.0}  # guidance by two calls


def hunyuan() -> Any:
    model = d.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    scheduler = d.DDPMScheduler()
    return d.HunyuanDiTPipeline(
        vae(), None, None, model.eval(), scheduler, None, None, False, None, None
    )


def hunyuan_inputs(n: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {"height": 16, "width": 16, "use_resolution_binning": False}
    for suffix, length in (("", 77), ("_2", 256)):
        context, mask = torch.randn(n, length, 32), torch.ones(n, length, dtype=torch.long)
        inputs[f"prompt_embeds{suffix}"] = context
        inputs[f"negative_prompt_embeds{suffix}"] = context * 0
        inputs[f"prompt_attention_mask{suffix}"] = mask
        inputs[f"negative_prompt_attention_mask{suffix}"] = mask
    return inputs


def sd15() -> Any:
    model = d.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return d.StableDiffusionPipeline(
        vae(), None, None, model.eval(), d.DDIMScheduler(), None, None, None, False
    )


def sd15_inputs(n: int) -> dict[str, Any]:
    context = torch.randn(n, 5, 12)
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": context * 0,
        "height": 8,
        "width": 8,
    }


def ddpm() -> Any:
    model = d.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
    )
    return d.DDPMPipeline(model.eval(), d.DDPMScheduler())


CASES = {
    "sd3": Case(sd3, sd3_inputs),
    "dit": Case(dit, dit_inputs, images=False),
    "pixart": Case(pixart, pixart_inputs, repeats=False),
    "flux": Case(flux, flux_inputs),
    "hunyuan": Case(hunyuan, hunyuan_inputs),
    "sd15": Case(sd15, sd15_inputs, "unet", repeats=False),
    "ddpm": Case(ddpm, lambda n: {"batch_size": n}, "unet", images=False),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors cost more to share out between threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each architecture in turn."""
    return CASES[request.param]


@pytest.fixture
def sd3_case() -> Case:
    """The one architecture where one will do."""
    return CASES["sd3"]


@pytest.fixture
def cases() -> dict[str, Case]:
    """All architectures by name."""
    return CASES


@pytest.fixture
def make_noisy() -> Callable[..., TaskAdapter]:
    """`noisy`, for test files."""
    return noisy


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    """`tiny_model` of the file beside this one."""
    file = Path(__file__).parent / "tiny_models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tiny_model
