"""Where the picture's places are in the tokens of a ComfyUI model, for masks of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..diffscaler_core.families import FAMILIES
from ..diffscaler_core.token_layout import UNKNOWN_ROLES, TokenLayout
from ..diffscaler_core.tokens import OPEN_ENDED
from .keymap import architecture_of, component_of


def native_layout(
    model: Any, size: Sequence[int], references: int = 0, text: int = 0
) -> TokenLayout:
    """Returns where the picture's places are in the tokens of one call.

    Args:
        model: A `BaseModel`; of an unknown architecture, only layers with exactly as many tokens as
            the picture has are taken for seeing the picture.
        size: (h, w) of the call's latents, or (f, h, w) of a video's.
        references: How many reference pictures the call embeds.
        text: How many text tokens it is given, as far as that is known.
    """
    row = architecture_of(model)
    family = next((f for f in FAMILIES.values() if row.diffusers in f.classes), None)
    frames, height, width = (1, *size)[-3:]
    known = row.token_roles if family is None else family.token_roles
    known = known if row.token_roles is None else row.token_roles
    roles = UNKNOWN_ROLES if known is None else tuple(known.items())
    if component_of(model) == "unet":
        return TokenLayout(frames, height, width, kind="unet", roles=roles)
    temporal, patch = _patch(model.diffusion_model)
    beside = row.references
    if beside is None:
        kind = row.tokens or ("" if family is None else family.tokens)
        beside = "last" if references or kind in OPEN_ENDED else ""
    after_text = "" if family is None else family.text
    return TokenLayout(
        -(-frames // temporal),
        height,
        width,
        patch,
        text=after_text if row.text is None else row.text,
        roles=roles,
        references=beside,
        multiple=getattr(model.diffusion_model, "pad_tokens_multiple", None) or 1,
        text_lengths=(text,) if references and beside == "last" else (),
    )


def _patch(core: Any) -> tuple[int, int]:
    """Returns how many frames, and how many latents to a side, one token stands for."""
    patch = getattr(core, "patch_size", getattr(core, "patch", 1))
    if isinstance(patch, int):
        return getattr(core, "patch_size_t", None) or 1, patch
    return (patch[0] if len(patch) == 3 else 1), patch[-1]
