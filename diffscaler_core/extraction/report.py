"""What an extraction kept of a fine-tune, layer by layer, and what it could not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer of the task.

    Attributes:
        name: The layer.
        change: ‖Δ‖ / ‖W‖: how far fine-tuning moved its weight.
        error: ‖Δ − Δ'‖ / ‖Δ‖: what of that the task does not do; 0 if only the bias moved.
        rank: R of its subspace.
        has_scale: Whether it has a scale.
        bias_change: ‖b' − b̂‖, held exactly by the shift.
        squared: ‖Δ‖².
        parameters: How many the task has here.
    """

    name: str
    change: float
    error: float
    rank: int
    has_scale: bool
    bias_change: float
    squared: float
    parameters: int

    @property
    def kept(self) -> float:
        """Share of the change's energy (its squared norm) that the task holds."""
        return 1 - self.error**2


@dataclass(frozen=True)
class LeftOut:
    """A tensor that changed and is in no layer of the task.

    Attributes:
        name: The tensor.
        change: ‖Δ‖ / ‖W‖.
        squared: ‖Δ‖².
        why: Why it is left out.
    """

    name: str
    change: float
    squared: float
    why: str


@dataclass(frozen=True)
class ExtractionReport:
    """What an extraction kept and lost.

    Attributes:
        tuned: The fine-tuned model.
        base: Its base.
        layers: Every layer of the task.
        left_out: Everything else that changed.
        unchanged: How many tensors did not change.
        kept_at: Rank -> share of the energy of the task's layers that is kept if all of them have
            that rank, by the singular values looked at.
        parameters_at: Rank -> the task's parameters then.
    """

    tuned: str
    base: str
    layers: tuple[LayerReport, ...]
    left_out: tuple[LeftOut, ...]
    unchanged: int
    kept_at: Mapping[int, float]
    parameters_at: Mapping[int, int]

    @property
    def kept(self) -> float:
        """Share of the energy of the models' whole difference that the task holds."""
        exact = sum(layer.bias_change**2 for layer in self.layers)
        held = exact + sum(layer.squared * layer.kept for layer in self.layers)
        return held / self.whole

    @property
    def whole(self) -> float:
        """The squared norm of the models' difference."""
        exact = sum(layer.bias_change**2 for layer in self.layers)
        held = sum(layer.squared for layer in self.layers)
        return exact + held + sum(one.squared for one in self.left_out)

    @property
    def error(self) -> float:
        """‖Δ − Δ'‖ / ‖Δ‖ over all tensors."""
        return math.sqrt(max(0.0, 1 - self.kept))

    def advice(self) -> list[str]:
        """Returns what another rank would do, and what looks wrong, one sentence each."""
        said = []
        if self.kept_at:
            steps = [
                f"rank {rank} {share:.1%} ({self.parameters_at[rank]:,} parameters)"
                for rank, share in self.kept_at.items()
            ]
            said.append(f"of these layers' change is kept by {', '.join(steps)}")
        far = [layer.name for layer in self.layers if layer.change > 1]
        if len(far) > len(self.layers) / 2:
            said.append(
                f"{len(far)} of {len(self.layers)} layers changed by more than their own size: "
                f"these are hardly a model and its fine-tune"
            )
        return said

    def text(self, most: int = 8) -> str:
        """Returns the report as a few lines.

        Args:
            most: How many layers to name, those with the largest error; and as many left out.
        """
        lines = [
            f"{self.tuned} − {self.base}: {self.kept:.2%} of the change kept "
            f"(relative error {self.error:.4f}) in {len(self.layers)} layers"
        ]
        lines += [f"  {sentence}" for sentence in self.advice()]
        worst = sorted(self.layers, key=lambda one: one.squared * one.error**2, reverse=True)
        lines += ["layers that lose most:"] if worst and self.error > 1e-4 else []
        lines += [
            f"  {one.name}: changed by {one.change:.2%}, kept {one.kept:.2%} at rank {one.rank}"
            for one in worst[:most]
            if self.error > 1e-4
        ]
        left = sorted(self.left_out, key=lambda one: one.squared, reverse=True)
        if left:
            share = sum(one.squared for one in left) / self.whole
            lines.append(
                f"not in the task: {len(left)} tensors that changed, {share:.2%} of the change:"
            )
            lines += [
                f"  {one.name}: changed by {one.change:.2%} ({one.why})" for one in left[:most]
            ]
            lines += [f"  and {len(left) - most} more"] if len(left) > most else []
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {
            "tuned": self.tuned,
            "base": self.base,
            "kept": self.kept,
            "error": self.error,
            "advice": self.advice(),
            "kept_at": {str(rank): share for rank, share in self.kept_at.items()},
            "parameters_at": {str(rank): count for rank, count in self.parameters_at.items()},
            "layers": [{**asdict(layer), "kept": layer.kept} for layer in self.layers],
            "left_out": [asdict(one) for one in self.left_out],
            "unchanged": self.unchanged,
        }
