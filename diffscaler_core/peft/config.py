"""What a DiffScaler adapter of PEFT is: PEFT's own words, and ours where PEFT has none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from ..affiner import ACTIVATIONS, PARTS
from ..errors import DiffScalerError, unknown
from ..methods import METHODS
from ..targets import PRESETS
from .registration import NAME


@dataclass
class DiffScalerConfig(PeftConfig):
    """The configuration of one adapter.

    Attributes:
        r: R of every subspace, taken as it is.
        target_modules: As everywhere in PEFT (a regular expression for whole names, or a list of
            names and name endings), or one of our presets: "blocks", "attention", "mlp", "all".
        exclude_modules: What is left out; a regular expression or a list.
        method: A name in METHODS; says parts, activation and how the scale treats the bias.
        parts: Which of "scale", "shift" and "subspace" every layer gets; None: the method's.
        activation: "relu" or "identity"; None: the method's.
        gain: s, the subspace's stored constant.
        scale_includes_bias: True: the scale multiplies the frozen bias too; None: the method's.
        rank_pattern: {name ending or regular expression: r}; 0 leaves the subspace out.
        parts_pattern: The same for parts: {pattern: [parts]}; without any, a layer stays as it is.
        layers_to_transform: Only blocks of these numbers; needs a list in `target_modules`.
        layers_pattern: The name of the list of blocks, where there are several.
        modules_to_save: Modules that are trained and saved whole.
        info: Facts of the task file it came from, or goes to (base, trigger, licence, …).
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = "blocks"
    exclude_modules: list[str] | set[str] | str | None = None
    method: str = "diffscaler"
    parts: list[str] | None = None
    activation: str | None = None
    gain: float = 1.0
    scale_includes_bias: bool | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    parts_pattern: dict[str, list[str]] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the words, and completes what is left to the method.

        Raises:
            UnknownNameError: No such method, part or activation.
            DiffScalerError: A rank or a combination that means nothing.
        """
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        chosen = METHODS[self.method]
        if not chosen.parts and self.parts is None:
            raise DiffScalerError(f"method {self.method!r} adapts no layer; PEFT has none to train")
        self.activation = chosen.activation if self.activation is None else self.activation
        if self.scale_includes_bias is None:
            self.scale_includes_bias = chosen.scale_includes_bias
        if self.target_modules is None:
            self.target_modules = "blocks"
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check()

    def _check(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        for part in chain(self.parts or (), *self.parts_pattern.values()):
            if part not in PARTS:
                raise unknown("part", part, PARTS)
        if self.r < 0 or min(self.rank_pattern.values(), default=0) < 0:
            raise DiffScalerError(f"ranks must not be negative: r={self.r}, {self.rank_pattern}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise DiffScalerError("layers_pattern needs layers_to_transform, the blocks' numbers")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise DiffScalerError(
                f"layers_to_transform needs target_modules as a list of name endings, not the "
                f"{'preset' if self.target_modules in PRESETS else 'regular expression'} "
                f"{self.target_modules!r}; or write the blocks' numbers into a regular expression"
            )

    def rank_of(self, name: str) -> int:
        """Returns R of the subspace on the layer of that name, by PEFT's matching of patterns."""
        return int(_matched(self.rank_pattern, name, self.r))

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Returns the parts on the layer of that name, without a subspace of rank 0."""
        common = METHODS[self.method].parts if self.parts is None else self.parts
        parts = _matched(self.parts_pattern, name, common)
        rank = self.rank_of(name)
        return tuple(part for part in PARTS if part in parts and (part != "subspace" or rank))

    def names_parts(self, name: str) -> bool:
        """Says whether `parts_pattern` speaks of the layer of that name."""
        return _matched(self.parts_pattern, name, None) is not None

    @property
    def facts(self) -> dict[str, Any]:
        """How an affiner computes, in the words of `TaskAdapter.info`."""
        return {
            "activation": self.activation,
            "gain": float(self.gain),
            "scale_includes_bias": bool(self.scale_includes_bias),
        }


def _matched(table: Mapping[str, Any], name: str, default: Any) -> Any:
    exact = re.escape(name)  # as our own tables have them; hundreds of patterns are slow to try
    return (
        table[exact] if exact in table else table.get(get_pattern_key(list(table), name), default)
    )


def _as_set(names: list[str] | set[str] | str | None) -> set[str] | str | None:
    """Returns a list of names as PEFT wants it."""
    return set(names) if isinstance(names, list) else names
