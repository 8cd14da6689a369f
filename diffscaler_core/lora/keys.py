"""What the tensors of a LoRA file are, by the endings of their keys. Data, and one function."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import TaskFileError, first_names
from .names import TEXT_ENCODERS

#: Ending -> what the tensor is: D, U, alpha, a shift, or a shift that is scaled like U. The endings
#: of one line belong together; a layer has one set.
ENDINGS: dict[str, str] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.default.bias": "up_bias",
    ".lora_A": "down",
    ".lora_B": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".diff_b": "shift",
    ".diff": "diff",
}
#: Pattern of endings -> why what they belong to is no plain LoRA.
REFUSED: dict[str, str] = {
    r"\.hada_\w+": "LoHa (a product of two low-rank matrices, element by element)",
    r"\.lokr_\w+": "LoKr (a Kronecker product)",
    r"\.(oft_\w+|rescale)(\.weight)?": "OFT or BOFT (it rotates the weight)",
    r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)": "DoRA (it divides by the weight's norms)",
    r"\.[ab][12]\.weight": "GLoRA (it multiplies the weight by a matrix)",
    r"\.lora_mid\.weight": "a CP/Tucker convolution (lora_mid: a matrix between down and up)",
    r"\.(set_weight|reshape_weight)": "a replaced or reshaped weight",
    r"\.(w_norm|b_norm)": "a changed norm, which carries no affiner",
    r"\.(on_input|scale_weight|vera_\w+|ia3_\w+)": "another kind of adapter",
    r"\.lora_embedding_[AB](\.\w+)*": "a LoRA on an embedding table",
    r"(\.modules_to_save)?\.(weight|bias)": "a whole weight instead of a difference",
}
_LONGEST_FIRST = sorted(ENDINGS, key=len, reverse=True)


def sort_keys(
    file: str, keys: Iterable[str]
) -> tuple[dict[str, dict[str, str]], dict[str, int], list[str]]:
    """Returns what a LoRA file's keys are.

    Args:
        file: Its name, for messages.
        keys: All of its keys.

    Returns:
        Layer's name in the file -> what -> key; what is left out and how many tensors of it; and
        the endings of the first layer.

    Raises:
        TaskFileError: Something that is no plain LoRA, or a key nobody knows; the message counts
            each kind and gives the reason.
    """
    layers: dict[str, dict[str, str]] = {}
    left_out: dict[str, int] = {}
    refused: dict[str, list[str]] = {}
    endings: dict[str, None] = {}
    for key in keys:
        if TEXT_ENCODERS.match(key):
            left_out["text encoder"] = left_out.get("text encoder", 0) + 1
            continue
        ending = next((e for e in _LONGEST_FIRST if key.endswith(e)), None)
        if ending is None:
            refused.setdefault(_reason(key), []).append(key)
            continue
        own = layers.setdefault(key[: -len(ending)], {})
        what = ENDINGS[ending]
        if what in own:
            refused.setdefault("a second LoRA on the same layer", []).append(key)
        own[what] = key
        endings[ending] = None
    _raise_refused(file, refused)
    return layers, left_out, list(endings)


def _reason(key: str) -> str:
    for pattern, reason in REFUSED.items():
        if re.search(f"{pattern}$", key):
            return reason
    return "no known kind of tensor"


def _raise_refused(file: str, refused: Mapping[str, list[str]]) -> None:
    if not refused:
        return
    said = [
        f"{len(keys)} tensors: {why}, first {first_names(keys, 1)}" for why, keys in refused.items()
    ]
    raise TaskFileError(
        f"{file!r} is no plain LoRA, so no task can do exactly what it does: {'; '.join(said)}"
    )
