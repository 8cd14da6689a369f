"""What a model is told: CONDITIONING as the trainer's prompts, and prompts as a model's arguments.

The trainer's names: "context" is a conditioning's tokens, "pooled" its `pooled_output`, "mask" its
`attention_mask`; other tensors keep ComfyUI's names. What is no tensor (guidance, sizes) is one and
the same for a whole run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.training.conditioning import Prompts
from ..diffscaler_core.training.denoiser import Condition

logger = logging.getLogger(__name__)

#: The trainer's name -> the argument of ComfyUI's `extra_conds`.
ARGUMENTS = {"context": "cross_attn", "pooled": "pooled_output", "mask": "attention_mask"}
_FIELDS = {argument: field for field, argument in ARGUMENTS.items()}
#: What only a sampler can follow.
_FOREIGN = (
    *("control", "hooks", "area", "mask", "gligen", "model_conds", "start_percent", "end_percent"),
    *("concat_latent_image", "reference_latents", "unclip_conditioning"),
)

Row = tuple[Tensor, dict[str, Any]]


def rows_of(conditioning: Sequence[Any]) -> list[Row]:
    """Returns a CONDITIONING's entries, each batch row by itself, as tensors of their own.

    Raises:
        DiffScalerError: It carries what training cannot follow.
    """
    rows = []
    for context, more in conditioning:
        foreign = [key for key in _FOREIGN if key in more]
        if foreign:
            raise DiffScalerError(
                f"the conditioning carries {', '.join(foreign)}, which training cannot follow; "
                f"connect plain prompts"
            )
        for i in range(len(context)):
            own = {k: _row(v, i, len(context)) for k, v in more.items() if v is not None}
            rows.append((_row(context, i, len(context)), own))
    return rows


def encoded(clip: Any, texts: Sequence[str]) -> list[Row]:
    """Returns texts as ComfyUI's text encoders tell them, one row each."""
    with torch.no_grad():
        return [
            rows_of(clip.encode_from_tokens_scheduled(clip.tokenize(text)))[0] for text in texts
        ]


def _row(value: Any, i: int, count: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    row = value[i : i + 1] if len(value) == count else value[:1]
    return row.detach().to("cpu", copy=True)


def facts_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns what is no tensor and says something, which must be the same everywhere.

    Raises:
        DiffScalerError: It differs between prompts.
    """
    facts: dict[str, Any] = {}
    for _, more in rows:
        for key, value in more.items():
            if not isinstance(value, (bool, int, float, str)):
                continue
            if facts.setdefault(key, value) != value:
                raise DiffScalerError(
                    f"the prompts differ in {key!r} ({facts[key]} and {value}); one run knows one"
                )
    return facts


def prompts_of(
    names: Sequence[str], rows: Sequence[Row], null: Row, repeat: bool = False
) -> Prompts:
    """Returns encoded prompts, made equally long.

    Args:
        names: The prompts' names.
        rows: One each.
        null: The empty prompt.
        repeat: True: the base attends to tokens only, so a short prompt may be repeated, which is
            exact; False: it is filled with zeros.
    """
    everyone = [*rows, null]
    names_of_fields = [
        key
        for key, value in null[1].items()
        if isinstance(value, Tensor) and all(isinstance(r[1].get(key), Tensor) for r in rows)
    ]
    columns = {"context": _padded([context for context, _ in everyone], repeat)}
    for key in names_of_fields:
        columns[_FIELDS.get(key, key)] = _padded([more[key] for _, more in everyone], False)
    fields = {name: column[:-1] for name, column in columns.items()}
    return Prompts(names, fields, {name: column[-1:] for name, column in columns.items()})


def _padded(parts: Sequence[Tensor], repeat: bool) -> Tensor:
    lengths = sorted({part.shape[1] for part in parts if part.ndim > 1})
    if len(lengths) <= 1 or any(part.ndim < 2 for part in parts):
        return torch.cat(list(parts))
    common = math.lcm(*lengths)
    if repeat and common <= 4 * lengths[-1]:
        return torch.cat([p.repeat(1, common // p.shape[1], *[1] * (p.ndim - 2)) for p in parts])
    if parts[0].ndim == 3:
        logger.info("prompts of %s tokens are filled up with zeros to %d", lengths, lengths[-1])
    full = lengths[-1]
    return torch.cat(
        [torch.cat([p, p.new_zeros(1, full - p.shape[1], *p.shape[2:])], dim=1) for p in parts]
    )


def empty_like(row: Row) -> Row:
    """Returns a prompt of zeros, for a model whose empty prompt is not known."""
    context, more = row
    zeros = {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in more.items()}
    return torch.zeros_like(context), zeros


def arguments_of(
    model: Any, x: Tensor, condition: Condition, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of `apply_model` for a batch, made by the model's own `extra_conds`.

    Args:
        model: ComfyUI's `BaseModel`.
        x: The batch, (B, C, h, w).
        condition: The trainer's condition, one row per sample.
        facts: What else the model is told: guidance, sizes…
    """
    told = {ARGUMENTS.get(name, name): tensor for name, tensor in condition.items()}
    sides = {"width": x.shape[-1] * 8, "height": x.shape[-2] * 8} if x.ndim >= 4 else {}
    nothing = dict.fromkeys(("latent_image", "denoise_mask", "latent_shapes"))
    made = model.extra_conds(
        **{**sides, **facts, **told},
        noise=x,
        device=x.device,
        prompt_type="positive",
        seed=0,
        **nothing,
    )
    return {
        name: cond.process_cond(batch_size=len(x), area=None).concat([])
        for name, cond in made.items()
    }


def repeats_tokens(model: Any, row: Row) -> bool:
    """Says whether a model's prompts may be repeated to make them longer, as ComfyUI does it."""
    context = row[0]
    x = torch.zeros(1, model.latent_format.latent_channels, 8, 8)
    told = {ARGUMENTS[k]: v for k, v in (("context", context),)}
    more = {key: value for key, value in row[1].items() if value is not None}
    made = model.extra_conds(
        **{"width": 64, "height": 64, **more, **told}, noise=x, device=x.device, seed=0
    )
    return type(made.get("c_crossattn")) is comfy.conds.CONDCrossAttn
