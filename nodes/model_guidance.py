"""Losses that lead a MODEL's sampling, through ComfyUI's hook after guidance: any sampler works.

The mathematics is in `systems/guidance.py`. Gradients need tensors that autograd may keep, and
ComfyUI's are made in inference mode: while a gradient is taken, they are used through normal
tensors over the same memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.errors import unknown
from ..diffscaler_core.evaluation.small_net import POCKET, load_small_net
from ..diffscaler_core.systems.guidance import gradient_at, gradient_through, push
from ..diffscaler_core.systems.guidance_losses import GuidanceLoss, make_loss, total
from ..diffscaler_core.training.objective import spread
from .held_model import differentiably, is_offloaded, normal_tensor
from .noise import starts_from_noise, unit_scale
from .pictures import as_masks, check_image, preview_colours

KEY = "diffscaler_guidance"
_HOOKS = "sampler_post_cfg_function"
CHEAP, EXACT = "at the prediction", "through the model"
#: What the loss node offers; the losses themselves are the core's.
KINDS = ("colour", "edges", "features")


def loss_of(
    kind: str, weight: float, colour: str, image: Tensor | None, mask: Tensor | None
) -> GuidanceLoss:
    """Returns a loss of the core's table, of ComfyUI's IMAGE and MASK.

    Raises:
        UnknownNameError: No such kind.
        DiffScalerError: No picture for a kind that compares with one.
    """
    if kind not in KINDS:
        raise unknown("guidance loss", kind, KINDS)
    where = None if mask is None else as_masks(mask, "the mask of a guidance loss")
    if kind == "colour":
        return make_loss(kind, colour, where=where, weight=weight)
    if image is None:
        raise DiffScalerError(f"guidance by {kind} compares with a picture: connect 'image'")
    check_image(image)
    reference = image[..., :3].movedim(-1, 1).float() * 2 - 1
    reference = reference.expand(-1, 3, -1, -1)
    if kind == "edges":
        return make_loss(kind, reference, where=where, weight=weight)
    device = management.get_torch_device()
    net = load_small_net(POCKET)[0].to(device)
    return make_loss(kind, lambda images: net(images.to(device)), reference, weight=weight)


def guide_model(
    model: ModelPatcher,
    losses: Sequence[GuidanceLoss],
    vae: Any,
    rho: float,
    start_percent: float,
    end_percent: float,
    gradient: str,
) -> ModelPatcher:
    """Returns a clone of the model that losses lead; the model itself if nothing would.

    Args:
        model: Any model of pictures.
        losses: From `loss_of`.
        vae: Decodes what the losses look at; None: ComfyUI's preview colours stand for it.
        rho: ρ of `systems/guidance.py`.
        start_percent: Where in sampling it begins.
        end_percent: Where it ends.
        gradient: CHEAP or EXACT.

    Raises:
        DiffScalerError: The model or its VAE is none of pictures.
    """
    sampling = model.get_model_object("model_sampling")
    if not starts_from_noise(sampling):
        raise DiffScalerError("a model that makes no pictures from noise cannot be led")
    if getattr(vae, "latent_dim", 2) != 2:
        raise DiffScalerError("guidance looks at pictures; this VAE is one of videos or sound")
    if not losses or not rho:
        return model
    clone = model.clone()
    if vae is not None:  # loaded and counted along with the model
        others = clone.get_additional_models_with_key(KEY)
        clone.set_additional_models(KEY, [*others, vae.patcher])
    high, low = (float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
    clone.set_model_sampler_post_cfg_function(
        Led(tuple(losses), vae, rho, high, low, gradient == EXACT)
    )
    return clone


@dataclass(frozen=True, eq=False)
class Led:
    """What ComfyUI calls with each prediction.

    Attributes:
        losses: What pictures are led to.
        vae: Their decoder, or None.
        rho: ρ.
        high: The largest sigma at which it acts.
        low: The smallest.
        exact: Whether the gradient goes through the model.
    """

    losses: tuple[GuidanceLoss, ...]
    vae: Any
    rho: float
    high: float
    low: float
    exact: bool

    def __call__(self, args: dict[str, Any]) -> Tensor:
        """Returns the prediction, moved down the losses' gradient."""
        model, x0, x, sigma = (args[k] for k in ("model", "denoised", "input", "sigma"))
        if not self.low <= float(sigma.max()) <= self.high:
            return x0  # type: ignore[no-any-return]
        decode = decoder(model, self.vae)

        def criterion(latents: Tensor) -> Tensor:
            return total(self.losses, latents, decode)

        with _differentiable():
            if self.exact:
                again = self._again(args)
                gradient = gradient_through(criterion, again, x.clone())[0]
            else:
                gradient = gradient_at(criterion, x0.float().clone())
            return led(model.model_sampling, x0, x, sigma, gradient, self.rho)

    def _again(self, args: dict[str, Any]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Returns the prediction once more, differentiable: all of it that comes before us."""
        model, options = args["model"], dict(args["model_options"])
        if is_offloaded(model.current_patcher):
            raise DiffScalerError(
                f"this model does not lie on the device whole, and a gradient through it would "
                f"bring it there; set gradient to {CHEAP!r}"
            )
        hooks = options[_HOOKS]
        options[_HOOKS] = hooks[: hooks.index(self)]

        def predict(x: Tensor) -> tuple[Tensor, Tensor]:
            found = differentiably(
                comfy.samplers.sampling_function,
                model, x, args["sigma"], args["uncond"], args["cond"], args["cond_scale"], options,
            )  # fmt: skip
            return found, x

        return predict


def led(
    sampling: Any, x0: Tensor, x: Tensor, sigma: Tensor, gradient: Tensor, rho: float
) -> Tensor:
    """Returns x0 moved by `guidance.push`, on the scale of ComfyUI's samplers."""
    unit = unit_scale(sampling, sigma)
    clean, scaled = x0.float() / unit.data, x.float() * spread(unit.grown, x)
    eps = (scaled - spread(unit.alpha, x) * clean) / spread(unit.sigma, x)
    moved, _ = push(clean, eps, unit.alpha, unit.sigma, gradient, rho, unit.kind)
    return (moved * unit.data).to(x0)


def decoder(model: Any, vae: Any) -> Callable[[Tensor], Tensor]:
    """Returns what turns a model's latents into pictures (B, 3, H, W) in −1..1, differentiably."""

    def by_vae(latents: Tensor) -> Tensor:
        raw = model.process_latent_out(latents).to(vae.device, vae.vae_dtype)
        # ComfyUI's own `decode` keeps no gradient; its last step works in place.
        image = vae.process_output(vae.first_stage_model.decode(raw).float().clone())
        return image[:, :3].to(latents) * 2 - 1  # type: ignore[no-any-return]

    if vae is not None:
        return by_vae
    colours = preview_colours(model.latent_format)
    if colours is None:
        raise DiffScalerError("ComfyUI knows no colours of this model's latents: connect 'vae'")
    return colours


class _NormalTensors(TorchFunctionMode):
    """Hands every tensor that was made in inference mode on as a normal one over its memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*_normals(args), **_normals(kwargs or {}))


def _normals(value: Any) -> Any:
    if isinstance(value, Tensor):
        return normal_tensor(value) if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(_normals(one) for one in value)
    if type(value) is dict:
        return {key: _normals(one) for key, one in value.items()}
    return value


@contextlib.contextmanager
def _differentiable() -> Iterator[None]:
    """Lets autograd work inside a sampling run, without kernels that have no gradient."""
    before = management.in_training
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.no_grad(), _NormalTensors():
            yield
    finally:
        management.in_training = before
