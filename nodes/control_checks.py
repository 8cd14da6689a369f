"""Whether a control task, a model and a VAE belong together; one clear error if not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..diffscaler_core import DiffScalerError, MismatchError, TaskAdapter
from ..diffscaler_core.matching import embedding_at
from ..diffscaler_core.targets import resolve
from ..diffscaler_core.tokens import patch_of
from .control_conds import ControlPicture
from .keymap import native_token_form


def check_vae(model: ModelPatcher, picture: ControlPicture) -> None:
    """Says whether the VAE can belong to the model.

    Raises:
        DiffScalerError: There is none, or it makes other latents than the model draws.
    """
    vae = picture.vae
    if vae is None or getattr(vae, "first_stage_model", None) is None:
        raise DiffScalerError(
            f"no VAE to encode the control image of {picture.name!r} with: the checkpoint holds "
            f"none, connect Load VAE with the base's own"
        )
    made, drawn = vae.latent_channels, model.model.latent_format.latent_channels
    if made != drawn:
        raise DiffScalerError(
            f"the VAE makes latents of {made} channels, but this {type(model.model).__name__} "
            f"draws {drawn}: connect the base's own VAE"
        )


def check_embedding(
    task: TaskAdapter, model: Any, controls: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Says whether a model can be given a control.

    Args:
        task: The control task.
        model: A `BaseModel`.
        controls: The task's control affiner, by the model's own names.

    Raises:
        MismatchError: The task has none for this component, or the model embeds more than what it
            draws.
    """
    if not controls:
        raise MismatchError(
            f"the control task {task.name!r} has no control for this component; choose another "
            f"of {', '.join(task.components)}"
        )
    channels = model.latent_format.latent_channels
    for name in controls:
        embedding = embedding_at(name, resolve(model, name), native_token_form(model))
        try:
            patch_of(embedding, channels)
        except DiffScalerError:
            raise MismatchError(
                f"this {type(model).__name__} embeds {embedding.in_features} numbers where its "
                f"{channels} latent channels do not fill them alone (an inpainting, edit or "
                f"image-to-video base?): a control needs a base that embeds only what it draws"
            ) from None


def control_kind(task: TaskAdapter) -> str:
    """Returns what a control task's pictures show, as its maker said."""
    return str((task.info.get("control") or {}).get("kind", "of a kind its file does not say"))
