"""How an evaluation is done: plain numbers, saved with its results. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DiffScalerError


@dataclass(frozen=True)
class EvaluationSettings:
    """What all rows of a table share, so that they are comparable.

    Attributes:
        pictures: Drawn per task and reference. Fréchet distances of other numbers are not
            comparable: it falls as the number grows.
        steps: Of the sampler.
        guidance: Classifier-free guidance; 1: none.
        shift: Moves a flow's times towards noise.
        batch: Pictures sampled together.
        size: Side of the pictures in pixels; None: the base's own.
        seed: Of the noise; picture i starts from the same noise in every row, at any batch size.
        neighbours: k of precision, recall, density and coverage.
        validation: At most so many reference pictures are used for the validation loss; 0: none.
        drift: Pictures the drift is measured on; 0: it is not measured.
        columns: Pictures per row of the grid.
        prompts: What is drawn; empty: what the reference pictures show, in their proportions.
        drift_prompts: What drift is measured under; empty: the base's words that are none of the
            task's prompts, and if there are no such words the null prompt.
    """

    pictures: int = 256
    steps: int = 20
    guidance: float = 3.5
    shift: float = 3.0
    batch: int = 16
    size: int | None = None
    seed: int = 0
    neighbours: int = 5
    validation: int = 128
    drift: int = 16
    columns: int = 8
    prompts: tuple[str, ...] = ()
    drift_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses numbers that make no sense."""
        least = {
            "pictures": self.neighbours + 1,
            "steps": 1,
            "batch": 1,
            "neighbours": 1,
            "validation": 0,
            "drift": 0,
            "columns": 1,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            if value < lowest:
                raise DiffScalerError(f"{name} must be at least {lowest}, got {value}")
        if self.drift == 1:
            raise DiffScalerError("drift needs at least 2 pictures (or 0: not measured), got 1")
        if not self.shift > 0:
            raise DiffScalerError(f"shift must be above 0, got {self.shift:g}")
