"""Tasks on conditionings: which of a call's rows run which task, and what part of the picture.

A conditioning carries its routes as one lazy object in `model_conds`, as it carries control
pictures: ComfyUI itself then repeats it with the batch, tells it its area, and joins it with the
others'. Objects of any routes can share a call, so that prompts with different tasks cost one
forward. At the start of sampling `placed_rows` gives every conditioning one, and the latents' size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from comfy.conds import CONDRegular
from torch import Tensor

from ..diffscaler_core import DiffScalerError, TaskAdapter
from .control_conds import PREFIX, conds_of, place_for

logger = logging.getLogger(__name__)

#: The name of a conditioning's routes in `model_conds`.
ROUTE = "ds_route"

#: A task and the component of it that a model is: what routes and a model's entries meet by.
Route = tuple[TaskAdapter, str | None]
#: Strengths of a task: one for all rows of a conditioning, or one per row.
Strengths = tuple[float, ...]
#: ComfyUI's area: the sizes and then the starts per dimension.
Window = tuple[int, ...]


class RowCond(CONDRegular):  # type: ignore[misc]
    """One conditioning's routes, as ComfyUI's batching sees it.

    Args:
        routes: The strengths of the tasks that its rows run; other routed tasks do not run there.
        size: Height and width of the latents that are sampled; None: nobody has said.
        window: The area.
        rows: How many rows the conditioning has.
    """

    def __init__(
        self,
        routes: Mapping[Route, Strengths],
        size: tuple[int, int] | None = None,
        window: Window | None = None,
        rows: int = 1,
    ) -> None:
        super().__init__(None)
        self.routes, self.size_sampled, self.window, self.rows = dict(routes), size, window, rows
        self._warned = False

    def _copy_with(self, cond: object) -> RowCond:
        return self

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> RowCond:
        """Returns the same for a batch and an area.

        Raises:
            DiffScalerError: It has another number of rows.
        """
        if self.size_sampled is None and not self._warned:
            self._warned = True
            _warn_without_tasks(self.routes)
        check_rows(self.routes, batch_size)
        window = None if area is None else tuple(area)
        return RowCond(self.routes, self.size_sampled, window, batch_size)

    def can_concat(self, other: object) -> bool:
        """Says whether both can share a call: always, as rows may differ."""
        return isinstance(other, RowCond)

    def concat(self, others: Iterable[RowCond]) -> RowsOfCall:
        """Returns what the model call is given for all of them."""
        return RowsOfCall((self, *others))

    def size(self) -> list[int]:
        """Returns what ComfyUI counts it as; it is no input of the model's own."""
        return [1]


class RowsOfCall:
    """Where the rows of one model call come from.

    Attributes:
        parts: A conditioning each, in the order of the rows.
    """

    def __init__(self, parts: Sequence[RowCond]) -> None:
        self.parts = tuple(parts)

    def strengths(self, route: Route) -> Tensor:
        """Returns the strengths of a routed task per row, (B,)."""
        found: list[float] = []
        for part in self.parts:
            own = part.routes.get(route, (0.0,))
            found += own if len(own) == part.rows else own * part.rows
        return torch.tensor(found)

    @property
    def windows(self) -> tuple[tuple[Window | None, int], ...]:
        """Each part's area and number of rows."""
        return tuple((part.window, part.rows) for part in self.parts)

    @property
    def size_sampled(self) -> tuple[int, int] | None:
        """Height and width of the latents that are sampled, of which a part may be an area."""
        return self.parts[0].size_sampled


def together(keys: Sequence[Route], strengths: Sequence[float]) -> dict[Route, Strengths]:
    """Returns the routes of rows that all run all these tasks; one may come several times."""
    routes: dict[Route, Strengths] = {}
    for key, strength in zip(keys, strengths, strict=True):
        routes = added(routes, {key: (strength,)})
    return routes


def by_row(
    keys: Sequence[Route], strengths: Sequence[float], first: int = 0
) -> dict[Route, Strengths]:
    """Returns the routes of rows that each run one of these tasks; one may come several times.

    Args:
        keys: A task per row.
        strengths: Of each.
        first: How many rows come before them, which run none.
    """
    routes: dict[Route, Strengths] = {}
    for row, (key, strength) in enumerate(zip(keys, strengths, strict=True), start=first):
        own = [0.0] * (first + len(keys))
        own[row] = strength
        routes = added(routes, {key: tuple(own)})
    return routes


def routed(conditioning: Sequence[Any], routes: Mapping[Route, Strengths], model: Any) -> list[Any]:
    """Returns a conditioning whose rows run these tasks too; the given one stays as it is.

    Args:
        conditioning: ComfyUI's list of [context, more].
        routes: What to add to what it may route already.
        model: The `BaseModel` that is to run it.

    Raises:
        DiffScalerError: Its rows were routed for another number of latents.
    """
    place = place_for(model)
    result = []
    for context, more in conditioning:
        known = conds_of(more).get(ROUTE)
        own = added(known.routes if isinstance(known, RowCond) else {}, routes)
        cond = RowCond(own)
        result.append([context, {**more, place: {**more.get(place, {}), ROUTE: cond}}])
    return result


def added(
    routes: Mapping[Route, Strengths], more: Mapping[Route, Strengths]
) -> dict[Route, Strengths]:
    """Returns the sum of two conditionings' routes.

    Raises:
        DiffScalerError: Both have one task per latent, for different numbers of latents.
    """
    counts = sorted({len(s) for own in (routes, more) for s in own.values()} - {1})
    if len(counts) > 1:
        raise DiffScalerError(
            f"the conditioning routes one task per latent for {counts[0]} latents and for "
            f"{counts[1]}: route the same number in every DiffScaler Route Tasks node"
        )
    total = dict(routes)
    for key, strengths in more.items():
        before = total.get(key, (0.0,))
        rows = max(len(before), len(strengths))
        before, strengths = (s * rows if len(s) == 1 else s for s in (before, strengths))
        total[key] = tuple(a + b for a, b in zip(before, strengths, strict=True))
    return total


def check_rows(routes: Mapping[Route, Strengths], batch: int) -> None:
    """Says whether routes fit a batch of latents.

    Raises:
        DiffScalerError: They are for another number of latents.
    """
    for strengths in routes.values():
        if len(strengths) not in (1, batch):
            raise DiffScalerError(
                f"the conditioning routes one task per latent for {len(strengths)} latents, but "
                f"the latent batch has {batch}: make a batch of {len(strengths)} (Repeat Latent "
                f"Batch), or connect {batch} tasks"
            )


def placed_rows(
    conds: Mapping[str, Sequence[Any]], routes: Sequence[Route], shape: Sequence[int]
) -> dict[str, list[Any]]:
    """Returns a guider's conditionings, each with its routes, those without any with none.

    All then have the same entries, which ComfyUI asks of conditionings that share a call. The given
    ones stay as they are: ComfyUI keeps them.

    Args:
        conds: Kind ("positive", …) -> conditionings, as a guider holds them.
        routes: What the model can run.
        shape: Of the latents, (B, C, …, h, w).

    Raises:
        DiffScalerError: A conditioning routes tasks for another number of latents.
    """
    size = (shape[-2], shape[-1])
    asked: dict[Route, None] = {}
    result: dict[str, list[Any]] = {}
    for kind, own in conds.items():
        result[kind] = []
        for cond in own:
            known = conds_of(cond).get(ROUTE)
            found = known.routes if isinstance(known, RowCond) else {}
            check_rows(found, shape[0])
            asked.update(dict.fromkeys(found))
            rows = RowCond(found, size)
            result[kind].append({**cond, "model_conds": {**cond["model_conds"], ROUTE: rows}})
    _warn_unmet(list(asked), routes)
    return result


def _warn_unmet(asked: Sequence[Route], there: Sequence[Route]) -> None:
    tasks = {task for task, _ in there}  # a pipeline's other model has the other component
    missing = [route for route in asked if route[0] not in tasks]
    if missing:
        _warn_without_tasks(missing)
    if there and not tasks & {task for task, _ in asked}:
        logger.warning(
            "the model runs %s where a conditioning routes it, but none does, so it has no effect: "
            "connect the positive that comes out of the same DiffScaler Route Tasks node",
            _named(there),
        )


def _warn_without_tasks(routes: Iterable[Route]) -> None:
    logger.warning(
        "a conditioning routes %s, but the model that is sampled does not run it: connect the "
        "model that comes out of the last DiffScaler Route Tasks node, each node's model into the "
        "next",
        _named(routes),
    )


def _named(routes: Iterable[Route]) -> str:
    names = dict.fromkeys(repr(task.name) for task, _ in routes)
    return f"the task{'s' if len(names) > 1 else ''} {', '.join(names)}"


def tasks_at(conds: Mapping[str, Sequence[Any]], sigma: Tensor) -> tuple[bool, ...]:
    """Returns which conditionings act at a noise level, of those with a range that carry tasks.

    Args:
        conds: Kind ("positive", …) -> conditionings, as a guider holds them while it samples.
        sigma: The noise level, (B,).
    """
    found = []
    for cond in (cond for own in conds.values() for cond in own or ()):
        first, last = cond.get("timestep_start"), cond.get("timestep_end")
        is_ours = any(name == ROUTE or name.startswith(PREFIX) for name in conds_of(cond))
        if is_ours and (first is not None or last is not None):
            now = float(sigma.flatten()[0])
            found.append((first is None or now <= first) and (last is None or now >= last))
    return tuple(bool(acts) for acts in found)
