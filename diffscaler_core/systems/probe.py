"""A linear probe: how well a straight line tells classes apart on features. Arithmetic; no model.

Multinomial logistic regression on standardised features with an L2 penalty, fitted by L-BFGS: the
"Linear" head of arXiv:2307.08702, which trains it by SGD. The grid over blocks and times, and that
a validation split picks among it, is theirs too.

Shapes: N pictures, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DiffScalerError
from ..training.randomness import generator_for

PENALTY = 1e-2
#: Shares of the pictures that the probe is fitted on, chosen by and judged by.
SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe.

    Attributes:
        mean: Of the features it was fitted on, (F,).
        std: Their spread, (F,), 1 where there is none.
        weight: (K, F).
        bias: (K,).
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Returns (N, K) of features (N, F)."""
        return F.linear((features.double() - self.mean) / self.std, self.weight, self.bias)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Returns the share of pictures whose class it names."""
        return float((self.logits(features).argmax(1) == labels).double().mean())


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, penalty: float = PENALTY, steps: int = 200
) -> Probe:
    """Returns the probe with the least mean cross entropy + penalty · ‖weight‖² / 2.

    Args:
        features: (N, F).
        labels: (N,), 0 to classes − 1.
        classes: K.
        penalty: Keeps weights small where there are more features than pictures.
        steps: Most iterations of L-BFGS; the problem is convex.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.ones_like(std))
    x = (x - mean) / std
    weight = x.new_zeros(classes, x.shape[1]).requires_grad_(True)
    bias = x.new_zeros(classes).requires_grad_(True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels)
        value = value + penalty * weight.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return Probe(mean, std, weight.detach(), bias.detach())


def split(
    labels: Tensor, shares: Sequence[float] = SHARES, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pictures to fit on, to choose by and to judge by, each class in these shares.

    Raises:
        DiffScalerError: A class has fewer than three pictures.
    """
    sides: list[list[Tensor]] = [[], [], []]
    for label in labels.unique().tolist():
        own = (labels == label).nonzero().flatten()
        if len(own) < len(sides):
            raise DiffScalerError(
                f"a probe needs at least {len(sides)} pictures of each class, to fit, to choose "
                f"and to judge; one class has {len(own)}"
            )
        own = own[torch.randperm(len(own), generator=generator_for(seed, "probe", label))]
        counts = [max(1, round(share * len(own))) for share in shares[1:]]
        first = len(own) - sum(counts)
        for side, part in zip(sides, own.split([first, *counts]), strict=True):
            side.append(part)
    fit, choose, judge = (torch.cat(side) for side in sides)
    return fit, choose, judge


@dataclass(frozen=True)
class Cell:
    """One block at one time.

    Attributes:
        block: Its name.
        time: t.
        chosen_by: Accuracy on the pictures that are chosen by.
        accuracy: On those that are judged by, which nothing was chosen by.
    """

    block: str
    time: float
    chosen_by: float
    accuracy: float


@dataclass(frozen=True)
class ProbeGrid:
    """Probes on a grid of blocks and times.

    Attributes:
        cells: All of them.
        classes: The classes' names.
        pictures: How many pictures (fitted on, chosen by, judged by).
        pixels: Accuracy of a probe on the pictures' mean values alone, or None.
    """

    cells: tuple[Cell, ...]
    classes: tuple[str, ...]
    pictures: tuple[int, int, int]
    pixels: float | None = None

    @property
    def best(self) -> Cell:
        """The cell that the validation pictures choose; of equals that with the least noise."""
        return max(self.cells, key=lambda cell: (cell.chosen_by, -cell.time))

    @property
    def chance(self) -> float:
        """Accuracy of guessing, if all classes are equally frequent."""
        return 1 / len(self.classes)

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON can hold it."""
        return {**asdict(self), "best": asdict(self.best), "chance": self.chance}


def probe_grid(
    features: Mapping[tuple[str, float], Tensor],
    labels: Tensor,
    classes: Sequence[str],
    pixels: Tensor | None = None,
    *,
    seed: int = 0,
    penalty: float = PENALTY,
) -> ProbeGrid:
    """Returns a probe's accuracies on each block and time.

    Args:
        features: (block, time) -> (N, F).
        labels: (N,).
        classes: Their names.
        pixels: (N, C), features that need no model, for comparison.
        seed: Of the split.
        penalty: As in `fit_probe`.
    """
    fit, choose, judge = split(labels, seed=seed)

    def measured(x: Tensor) -> tuple[float, float]:
        probe = fit_probe(x[fit], labels[fit], len(classes), penalty)
        chosen = probe.accuracy(x[choose], labels[choose])
        return chosen, probe.accuracy(x[judge], labels[judge])

    cells = [Cell(block, t, *measured(x)) for (block, t), x in features.items()]
    counts = (len(fit), len(choose), len(judge))
    known = None if pixels is None else measured(pixels)[1]
    return ProbeGrid(tuple(cells), tuple(classes), counts, known)
