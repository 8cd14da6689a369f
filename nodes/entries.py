"""The tasks of a model: what one of them is, and how strong each is at one call of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffscaler_core import TaskAdapter
from ..diffscaler_core.windows import ranges_of
from .carrier import TaskParameters
from .control_conds import ControlRows
from .noise import log_snr_of
from .region_mask import RegionMask
from .row_conds import Route, RowsOfCall
from .sampling_time import percent_at

_NOTHING = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Entry:
    """One task on a model. Immutable: ComfyUI shares it between clones and cached outputs.

    Attributes:
        task: The task.
        parameters: Its parameters under the model's own names.
        strengths: Per part, in PARTS order.
        start_percent: Where in sampling it begins, 0 at full noise.
        end_percent: Where it ends, 1 at none.
        control: Of a control task, the key of its picture in `model_conds`.
        route: The key under which conditionings route it; it runs in no other row. None: it runs in
            every row.
        region: Where in the picture it acts; None: everywhere.
    """

    task: TaskAdapter
    parameters: TaskParameters
    strengths: tuple[float, float, float]
    start_percent: float = 0.0
    end_percent: float = 1.0
    control: str | None = None
    route: Route | None = None
    region: RegionMask | None = None

    @property
    def has_range(self) -> bool:
        """Says whether it runs in a part of sampling only."""
        return self.start_percent > 0 or self.end_percent < 1

    @property
    def is_timed(self) -> bool:
        """Says whether its strength depends on the noise level."""
        return self.has_range or self.task.schedule is not None

    @property
    def rides_on_rows(self) -> bool:
        """Says whether a call has to know of each of its rows where it comes from."""
        return self.route is not None or self.region is not None

    def strengths_at(self, model_sampling: Any, sigma: float) -> tuple[float, float, float]:
        """Returns the strengths in force at a noise level; a range's ends count, as in ComfyUI."""
        if self.has_range:
            first = float(model_sampling.percent_to_sigma(self.start_percent))
            last = float(model_sampling.percent_to_sigma(self.end_percent))
            if not last <= sigma <= first:
                return _NOTHING
        if self.task.schedule is None:
            return self.strengths
        factors = self.task.schedule.at(percent_at(model_sampling, sigma))
        scale, shift, subspace = (s * f for s, f in zip(self.strengths, factors, strict=True))
        return scale, shift, subspace


def weights_at(
    entries: Sequence[Entry], model_sampling: Any, sigma: Tensor, rows: Tensor | None
) -> Tensor:
    """Returns the strengths in force: (K, 3), or (B, K, 3) where rows differ.

    Args:
        entries: The K tasks.
        model_sampling: The model's.
        sigma: The noise level of the call, (B,).
        rows: From `factors_of`.
    """
    # do not wait for the GPU to learn sigma unless somebody asks
    now = float(sigma.flatten()[0]) if any(entry.is_timed for entry in entries) else 0.0
    weights = torch.tensor(
        [
            entry.strengths_at(model_sampling, now) if entry.is_timed else entry.strengths
            for entry in entries
        ]
    )
    if rows is None:
        return weights
    if bool((rows == rows[:1]).all()):
        return rows[0, :, None] * weights
    return rows[:, :, None] * weights


def levels_at(entries: Sequence[Entry], model_sampling: Any, sigma: Tensor) -> Tensor | None:
    """Returns the noise level of a call as log-SNR, (B,) on the CPU; None: no task goes by it."""
    if not any(entry.task.is_timed for entry in entries):
        return None
    return log_snr_of(model_sampling, sigma.flatten().cpu())


def ranges_at(entries: Sequence[Entry], levels: Tensor | None) -> list[object]:
    """Returns which range each task that goes by noise levels is in: a change is another task."""
    if levels is None:
        return []
    windows = [entry.task.windows for entry in entries]
    return [ranges_of(own.edges, levels).tolist() for own in windows if own is not None]


def factors_of(
    entries: Sequence[Entry], rows: RowsOfCall | None, controls: Mapping[str, ControlRows]
) -> Tensor | None:
    """Returns the factor of each task in each row, (B, K), or (1, K) if none differ; None: all 1.

    Args:
        entries: The K tasks.
        rows: What the call's conditionings route; None: nothing.
        controls: The call's controls by key.
    """
    columns = []
    for entry in entries:
        factors = torch.ones(1)
        if entry.route is not None:
            factors = torch.zeros(1) if rows is None else rows.strengths(entry.route)
        if entry.control is not None:
            given = controls.get(entry.control)
            is_given = given is not None and given.is_placed
            factors = factors * (given.factors if is_given else torch.zeros(1))
        columns.append(factors)
    if all(entry.route is None and entry.control is None for entry in entries):
        return None
    count = max(len(column) for column in columns)
    return torch.stack([column.expand(count) for column in columns], dim=1)
