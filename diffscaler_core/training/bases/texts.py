"""TEXTS: how each family's pipeline turns texts into conditions, by its own `encode_prompt`.

Each takes (pipeline, texts) and returns one row per text. The empty text gives what the pipeline
itself takes for no prompt at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Texts = Callable[[Any, list[str]], dict[str, Tensor]]


def _one_by_one(encode: Callable[[Any, str, bool], tuple[Tensor, ...]], *names: str) -> Texts:
    """Returns `Texts` for pipelines that treat no prompt otherwise than a prompt.

    `encode` takes (pipeline, text, whether it is the empty text).
    """

    def texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
        rows = [encode(pipe, word, not word) for word in words]
        return {name: torch.cat([row[i] for row in rows]) for i, name in enumerate(names)}

    return texts


def _clip_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    return {"context": pipe.encode_prompt(words, pipe.device, 1, False)[0]}


def _sdxl_text(pipe: Any, word: str, null: bool) -> tuple[Tensor, ...]:
    context, no_context, pooled, no_pooled = pipe.encode_prompt(
        word, device=pipe.device, do_classifier_free_guidance=null
    )
    return (no_context, no_pooled) if null else (context, pooled)


def _sd3_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, _, pooled, _ = pipe.encode_prompt(
        words, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
    )
    return {"context": context, "pooled": pooled}


def _flux_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, pooled, _ = pipe.encode_prompt(words, prompt_2=None)
    return {"context": context, "pooled": pooled}


def _masked_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, mask, _, _ = pipe.encode_prompt(words, do_classifier_free_guidance=False)
    return {"context": context, "mask": mask}


def _auraflow_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    return {"context": _masked_texts(pipe, words)["context"]}  # padding is zeroed there already


def _chroma_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, _, mask, *_ = pipe.encode_prompt(words, do_classifier_free_guidance=False)
    return {"context": context, "mask": mask.long()}


def _hunyuan_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, end in enumerate(("", "_2")):
        context, _, mask, _ = pipe.encode_prompt(
            words, do_classifier_free_guidance=False, text_encoder_index=i
        )
        found |= {f"context{end}": context, f"mask{end}": mask}
    return found


def _sana_text(pipe: Any, word: str, null: bool) -> tuple[Tensor, ...]:
    from inspect import signature

    # The pipeline puts its instruction to the text encoder before prompts, not before no prompt.
    said = signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    context, mask, no_context, no_mask = pipe.encode_prompt(
        word, do_classifier_free_guidance=null, complex_human_instruction=said
    )
    return (no_context, no_mask) if null else (context, mask)


def _lumina2_text(pipe: Any, word: str, null: bool) -> tuple[Tensor, ...]:
    # The pipeline puts its system prompt before prompts, not before no prompt.
    context, mask, no_context, no_mask = pipe.encode_prompt(word, do_classifier_free_guidance=null)
    return (no_context, no_mask) if null else (context, mask)


def _qwen_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    context, mask = pipe.encode_prompt(words)
    ones = context.new_ones(context.shape[:2], dtype=torch.long)
    return {"context": context, "mask": ones if mask is None else mask.long()}


def _z_image_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    rows = pipe.encode_prompt(list(words), do_classifier_free_guidance=False)[0]
    masks = [row.new_ones(len(row), dtype=torch.long) for row in rows]
    context = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"context": context, "mask": torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)}


def _cogview4_texts(pipe: Any, words: list[str]) -> dict[str, Tensor]:
    # Texts are padded to the longest, and the padding is seen. A text that is longer than any is
    # encoded with them, so that the same text looks the same beside all others.
    longest, length = "a " * 1024, 224
    context = pipe.encode_prompt(
        [*words, longest], do_classifier_free_guidance=False, max_sequence_length=length
    )[0]
    return {"context": context[:-1]}


#: Family -> (pipeline, texts) -> their condition, one row each.
TEXTS: dict[str, Texts] = {
    "sd3": _sd3_texts,
    "flux": _flux_texts,
    "chroma": _chroma_texts,
    "qwen_image": _qwen_texts,
    "z_image": _z_image_texts,
    "lumina2": _one_by_one(_lumina2_text, "context", "mask"),
    "sana": _one_by_one(_sana_text, "context", "mask"),
    "auraflow": _auraflow_texts,
    "cogview4": _cogview4_texts,
    "pixart": _masked_texts,
    "hunyuan_dit": _hunyuan_texts,
    "sdxl": _one_by_one(_sdxl_text, "context", "pooled"),
    "unet2d_condition": _clip_texts,
}
