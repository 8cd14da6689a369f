"""METHODS: which parts a method puts on which targets. Data only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: The last Linear of each attention and of each MLP, in diffusers' names: where DiffFit puts its γ.
BLOCK_OUTPUTS = r".*(to_out\.0|to_add_out|ff(_context|n)?\.net\.2|single_.*\.proj_out|linear_out)"


@dataclass(frozen=True)
class Method:
    """Which parts go on which targets.

    Attributes:
        parts: Parts put on every target (names among `affiner.PARTS`).
        only: Parts put only on targets whose whole name matches the regular expression.
        activation: Activation of the subspace.
        scale_includes_bias: True: the scale multiplies the frozen bias as well.
        source: Where the method is from.
    """

    parts: tuple[str, ...]
    only: dict[str, str] = field(default_factory=dict)
    activation: str = "relu"
    scale_includes_bias: bool = False
    source: str = ""

    def parts_for(self, target: str) -> tuple[str, ...]:
        """Returns the parts this method puts on the target of that name."""
        special = tuple(part for part, only in self.only.items() if re.fullmatch(only, target))
        return special + self.parts


METHODS: dict[str, Method] = {
    "diffscaler": Method(("scale", "shift", "subspace"), source="arXiv:2404.09976"),
    "scale_shift": Method(("scale", "shift"), source="arXiv:2210.08823 (SSF)"),
    "bitfit": Method(("shift",), source="arXiv:2106.10199"),
    "difffit": Method(
        ("shift",),
        only={"scale": BLOCK_OUTPUTS},
        scale_includes_bias=True,
        source="arXiv:2304.06648",
    ),
    "lora": Method(("subspace",), activation="identity", source="arXiv:2106.09685"),
    "prompts": Method((), source="arXiv:2208.01618 (textual inversion: stored prompts, no layers)"),
}
