"""METHODS: which parts a method puts on which targets. Data, and how its table is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import unknown

#: The last layer of each attention and of each MLP, in diffusers' names: where DiffFit puts its γ.
#: (A U-Net's `attentions.0.proj_out` ends a whole transformer, not a branch of a block; only blocks
#: that compute attention and MLP side by side end in a `proj_out`.)
BLOCK_OUTPUTS = (
    r"(?!(?!single_).*\.proj_out$)(?P<block>.+?\.\d+)\.(block\.)?"
    r"((attn\w*\.|attention\.)?(to_out(\.0|_t)?|to_add_out)"
    r"|(ff\w*|feed_forward|\w+_mlp)\.(.+\.)?(net\.2|linear_out|out_projection|conv_point|w2)"
    r"|feed_forward\.linear_2"
    r"|proj_out)"
)
#: Which blocks have DiffFit's γ: the paper's first half, or every one.
GAMMA_BLOCKS = ("first_half", "all")
#: Where a U-Net's parts lie in its forward pass; other models list their blocks in order.
_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True)
class Method:
    """Which parts go on which targets.

    Attributes:
        parts: Parts put on every target (names among `affiner.PARTS`).
        only: Parts put only on targets whose whole name matches the regular expression.
        trains_biases: True: its shift is the layer's own bias, trained; layers without get none.
        activation: Activation of the subspace.
        scale_includes_bias: True: the scale multiplies the frozen bias as well.
        source: Where the method is from.
    """

    parts: tuple[str, ...]
    only: dict[str, str] = field(default_factory=dict)
    trains_biases: bool = False
    activation: str = "relu"
    scale_includes_bias: bool = False
    source: str = ""

    def parts_for(self, target: str, has_bias: bool = True) -> tuple[str, ...]:
        """Returns the parts this method puts on the target of that name."""
        special = tuple(part for part, only in self.only.items() if re.fullmatch(only, target))
        biases = has_bias or not self.trains_biases
        return special + tuple(part for part in self.parts if part != "shift" or biases)


METHODS: dict[str, Method] = {
    "diffscaler": Method(("scale", "shift", "subspace"), source="arXiv:2404.09976"),
    "scale_shift": Method(("scale", "shift"), source="arXiv:2210.08823 (SSF)"),
    "bitfit": Method(("shift",), trains_biases=True, source="arXiv:2106.10199"),
    "difffit": Method(
        ("shift",),
        only={"scale": BLOCK_OUTPUTS},
        trains_biases=True,
        scale_includes_bias=True,
        source="arXiv:2304.06648",
    ),
    "lora": Method(("subspace",), activation="identity", source="arXiv:2106.09685"),
    "prompts": Method((), source="arXiv:2208.01618 (textual inversion: stored prompts, no layers)"),
}


def blocks_without_gamma(names: Iterable[str], gamma_blocks: str) -> set[str]:
    """Returns the blocks whose outputs DiffFit leaves without γ.

    Args:
        names: Every target of the model, in the model's order.
        gamma_blocks: A name in GAMMA_BLOCKS. Of an odd number of blocks the first half is the
            larger one.

    Raises:
        UnknownNameError: No such choice.
    """
    if gamma_blocks not in GAMMA_BLOCKS:
        raise unknown("gamma_blocks", gamma_blocks, GAMMA_BLOCKS)
    if gamma_blocks == "all":
        return set()
    found = dict.fromkeys(block for name in names if (block := block_of(name)) is not None)
    ordered = sorted(found, key=lambda block: _ORDER.get(block.partition(".")[0], 0))
    return set(ordered[-(-len(ordered) // 2) :])


def block_of(target: str) -> str | None:
    """Returns the block whose attention or MLP the target is the output of, None if of none."""
    match = re.fullmatch(BLOCK_OUTPUTS, target)
    return None if match is None else match["block"]
