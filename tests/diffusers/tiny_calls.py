"""How every family's tiny denoiser (`tiny_models.py`) is called, on latents of any size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers as d
import torch
from torch import Tensor, nn

from diffscaler_core.families import FAMILIES
from diffscaler_core.training.bases.calls import CALLS, Site


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONTEXT, POOLED = rand(2, 5, 12), rand(2, 10, seed=4)
ONES = torch.ones(2, 5, dtype=torch.long)
STEP = torch.tensor([0.4, 0.4])


def by_trainer(family: str, **condition: Tensor) -> Callable[[Any, Tensor], Tensor]:
    """The call that the trainer makes, which is compared with each stock pipeline's own."""

    def run(model: Any, x: Tensor) -> Tensor:
        scale = FAMILIES.get(family, FAMILIES["unet2d_condition"]).timestep_scale
        told = {name: t[: len(x)] for name, t in condition.items()}
        return CALLS[family].predict(model, x, STEP[: len(x)] * scale, told, Site())

    return run


def flux2(model: Any, x: Tensor) -> Tensor:
    rows, columns = x.shape[2:]
    axes = [torch.arange(n) for n in (1, rows, columns, 1)]
    ids = torch.cartesian_prod(*axes).float()
    return model(
        hidden_states=x.flatten(2).transpose(1, 2),
        encoder_hidden_states=CONTEXT[: len(x)],
        timestep=STEP[: len(x)],
        img_ids=ids.expand(len(x), -1, -1),
        txt_ids=torch.zeros(len(x), 5, 4),
        guidance=STEP[: len(x)],
        return_dict=False,
    )[0]


def cogvideox(model: Any, x: Tensor) -> Tensor:
    context = rand(2, 7, 12)[: len(x)]
    return model(x.transpose(1, 2), context, STEP[: len(x)] * 1000, return_dict=False)[0]


def wan(model: Any, x: Tensor) -> Tensor:
    return model(x, STEP[: len(x)] * 1000, CONTEXT[: len(x)], return_dict=False)[0]


def ltx(model: Any, x: Tensor) -> Tensor:
    frames, height, width = x.shape[2:]
    tokens = d.LTXPipeline._pack_latents(x, 1, 1)
    return model(
        tokens,
        CONTEXT[: len(x)],
        STEP[: len(x)] * 1000,
        ONES[: len(x)],
        num_frames=frames,
        height=height,
        width=width,
        return_dict=False,
    )[0]


def hunyuan_video(model: Any, x: Tensor) -> Tensor:
    return model(
        x,
        STEP[: len(x)] * 1000,
        CONTEXT[: len(x)],
        ONES[: len(x)],
        POOLED[: len(x)],
        guidance=STEP[: len(x)] * 1000,
        return_dict=False,
    )[0]


def hidream(model: Any, x: Tensor) -> Tensor:
    return model(
        x,
        STEP[: len(x)] * 1000,
        encoder_hidden_states_t5=CONTEXT[: len(x)],
        encoder_hidden_states_llama3=rand(2, 2, 5, 12)[:, : len(x)],
        pooled_embeds=POOLED[: len(x)],
        return_dict=False,
    )[0]


@dataclass
class Base:
    """How a tiny model of a family is called.

    Attributes:
        name: In the table of tiny models.
        call: (model, latents (B, C, …)) -> output.
        latents: Shape of two rows of latents, not square where the model allows it.
        component: What pipelines call the model.
    """

    name: str
    call: Callable[[Any, Tensor], Tensor]
    latents: tuple[int, ...] = (2, 4, 8, 12)
    component: str = "transformer"

    @torch.no_grad()
    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.call(model, x)


MASKED = {"context": CONTEXT, "mask": ONES}
TWO = {"context": CONTEXT, "pooled": POOLED}

BASES = {
    "sd3": Base("sd3", by_trainer("sd3", **TWO)),
    "flux": Base("flux", by_trainer("flux", **TWO)),
    "flux2": Base("flux2", flux2, (2, 16, 4, 6)),
    "pixart": Base("pixart", by_trainer("pixart", **MASKED)),
    "dit": Base("dit", by_trainer("dit", label=torch.tensor([3, 7])), (2, 4, 8, 8)),
    "sana": Base("sana", by_trainer("sana", **MASKED)),
    "lumina2": Base("lumina2", by_trainer("lumina2", **MASKED)),
    "z_image": Base("z_image", by_trainer("z_image", **MASKED)),
    "qwen_image": Base("qwen_image", by_trainer("qwen_image", **MASKED)),
    "hunyuan_dit": Base(
        "hunyuan_dit", by_trainer("hunyuan_dit", **MASKED, context_2=rand(2, 5, 16), mask_2=ONES)
    ),
    "auraflow": Base("auraflow", by_trainer("auraflow", context=CONTEXT)),
    "cogview4": Base("cogview4", by_trainer("cogview4", context=CONTEXT)),
    "cogvideox": Base("cogvideox", cogvideox, (2, 4, 3, 8, 12)),
    "wan": Base("wan", wan, (2, 4, 3, 8, 12)),
    "ltx_video": Base("ltx_video", ltx, (2, 6, 3, 4, 6)),
    "hunyuan_video": Base("hunyuan_video", hunyuan_video, (2, 4, 3, 8, 12)),
    "chroma": Base("chroma", by_trainer("chroma", **MASKED)),
    "hidream": Base("hidream", hidream),
    "sd15": Base("sd15", by_trainer("unet2d_condition", context=CONTEXT), component="unet"),
    "sdxl": Base("sdxl", by_trainer("sdxl", **TWO), component="unet"),
    "unet2d": Base("unet2d", by_trainer("unet2d"), component="unet"),
}
