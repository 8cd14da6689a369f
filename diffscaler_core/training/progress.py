"""What a run tells on the way, and remembers of itself. Knows no host, no file, no picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: Edges of the noise bands a loss is reported in: times 0..1, 1 is pure noise.
BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Progress:
    """Where a run is, given to `on_step` after each step.

    Attributes:
        step: Steps done, from 1.
        steps: Steps in all.
        loss: This step's loss; on an accelerator that of the last step looked at (reading it
            every step would make the device wait).
        mean_loss: Running mean over about 50 steps.
        task: The task's name, where a run trains several: then there is one `Progress` per task.
        rate: Steps per second, lately; 0 if not known yet.
        seconds_left: To the end at this rate; NaN if not known yet.
        memory: Peak bytes held on the device, of the process on a CPU.
        learning_rate: Of the first group of parameters, now.
        bands: Running mean loss per noise band (see BANDS); NaN where nothing was drawn yet.
        validation: Validation loss, if one was taken at this step.
        validation_other: Of a control task: the same loss with each picture given the control of
            another one; where it is no higher, the task does not go by its control.
        alignment: With `repa`: mean cosine between the block's tokens and the encoder's.
        samples: Pictures (3, H, W) in −1..1, prompt by prompt, if some were drawn at this step.
        saved: True: a checkpoint was written at this step.
        advice: New advice, one line each.
    """

    step: int
    steps: int
    loss: float
    mean_loss: float
    task: str = ""
    rate: float = 0.0
    seconds_left: float = math.nan
    memory: int = 0
    learning_rate: float = 0.0
    bands: tuple[float, ...] = (math.nan,) * (len(BANDS) - 1)
    validation: float | None = None
    validation_other: float | None = None
    alignment: float | None = None
    samples: Sequence[Tensor] | None = None
    saved: bool = False
    advice: tuple[str, ...] = ()


def by_noise(bands: Sequence[float | None]) -> str:
    """Returns a loss per noise band as one line: "0–25 % 0.31, 25–50 % 0.18, …"."""
    return ", ".join(
        f"{100 * low:.0f}–{100 * high:.0f} % {band:.3f}"
        for low, high, band in zip(BANDS, BANDS[1:], bands, strict=False)
        if band is not None and math.isfinite(band)
    )


#: Called after each step; returning True ends the run there, with the state so far.
OnStep = Callable[[Progress], bool | None]


@dataclass
class History:
    """The numbers of one task's run so far; travels in checkpoints.

    Attributes:
        losses: (step, loss), every step that was looked at.
        validations: (step, validation loss).
        others: (step, validation loss with other pictures' controls), of a control task.
        bands: Running mean loss per noise band.
        mean_loss: Running mean loss.
        best_step: Step of the lowest validation loss, 0 if none was taken.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    others: list[tuple[int, float]] = field(default_factory=list)
    bands: list[float] = field(default_factory=lambda: [math.nan] * (len(BANDS) - 1))
    mean_loss: float = math.nan
    best_step: int = 0

    def add(self, step: int, loss: float, bands: Sequence[float]) -> None:
        """Notes a step's loss, and per band the mean loss of what was drawn there, or NaN."""
        self.losses.append((step, loss))
        share = max(1 / len(self.losses), 1 / 50)
        before = loss if math.isnan(self.mean_loss) else self.mean_loss
        self.mean_loss = before + share * (loss - before)
        for i, value in enumerate(bands):
            if math.isfinite(value):
                old = value if math.isnan(self.bands[i]) else self.bands[i]
                self.bands[i] = old + (value - old) / 20

    def validated(self, step: int, loss: float) -> bool:
        """Notes a validation loss; says whether it is the lowest so far."""
        best = all(loss < other for _, other in self.validations)
        self.validations.append((step, loss))
        if best:
            self.best_step = step
        return best

    def state(self) -> dict[str, Any]:
        """Returns the history as JSON can hold it (NaN as None)."""
        return {
            "losses": self.losses,
            "validations": self.validations,
            "others": self.others,
            "bands": [None if math.isnan(b) else b for b in self.bands],
            "mean_loss": None if math.isnan(self.mean_loss) else self.mean_loss,
            "best_step": self.best_step,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """Returns the history that `state` described."""
        mean = state["mean_loss"]
        return cls(
            losses=[(int(s), float(v)) for s, v in state["losses"]],
            validations=[(int(s), float(v)) for s, v in state["validations"]],
            others=[(int(s), float(v)) for s, v in state.get("others", ())],
            bands=[math.nan if b is None else float(b) for b in state["bands"]],
            mean_loss=math.nan if mean is None else float(mean),
            best_step=int(state["best_step"]),
        )
