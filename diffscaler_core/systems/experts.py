"""Experts: tasks trained apart, on parts of the data, that act as one model with a router.

    u(x_t, t) = Σ_k w_k v(x_t, t; A_k),   w from p(k | x_t, t)      (arXiv:2501.05450; `posterior`)

Predictions are mixed, each row by itself; not the tasks' parameters, which is another thing. With
"top1" each row runs one expert, and rows of all experts share one forward. Otherwise each row comes
once for every expert that counts there, in one larger batch of mixed rows, or a few. The router
reads the base without any task, up to its own block, before each forward.

Ours, beside the router: the experts are tasks on one frozen base, so that K of them take little
more memory than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..attach import Attachment, attach
from ..errors import DiffScalerError, unknown
from ..task import TaskAdapter
from ..training.denoiser import Condition, Denoiser
from ..training.objective import spread
from .features import Untold, noisy_features
from .posterior import MODES, weights_of
from .router import Router


class Experts:
    """Tasks and a router on one base. Made by `experts`.

    Attributes:
        denoiser: The base that predicts as they do together: to sample from, and to measure.
        chosen: Which weights were in force at the last call, (B, K); None before the first.
        switches: How many calls ran other experts, in whichever row, than the call before.
        rows_run: How many rows the base has predicted with an expert on.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        attachment: Attachment,
        router: Router,
        told: Untold,
        mode: str,
        most_rows: int | None,
    ) -> None:
        self._base, self._attachment, self._router = denoiser, attachment, router
        self._told, self._mode, self._most = told, mode, most_rows
        self._block = router.site.name_in(denoiser.model)
        self.denoiser = replace(denoiser, predict=self.predict)
        self.chosen: Tensor | None = None
        self.switches = self.rows_run = 0

    @torch.no_grad()
    def posterior(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Returns p(k | x_t, t), (B, K), on the CPU; rows that repeat are looked at once.

        Args:
            x_t: (B, C, h, w).
            timestep: The model's own, (B,).
        """
        half = len(x_t) // 2
        if len(x_t) == 2 * half and torch.equal(x_t[:half], x_t[half:]):  # guidance's two halves
            if torch.equal(timestep[:half], timestep[half:]):
                return self.posterior(x_t[:half], timestep[:half]).repeat(2, 1)
        self._attachment.set_weights(0.0)
        pool, router = self._router.site.pool, self._router
        seen = noisy_features(self._base, x_t, timestep, self._told, [self._block], pool)
        alpha, sigma = self._base.objective.levels_of(timestep)
        return router.posterior(seen[self._block], alpha, sigma)

    def predict(self, x_t: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Returns the experts' predictions, mixed, as `Denoiser.predict` does."""
        weights = weights_of(self.posterior(x_t, timestep), self._mode)
        if self.chosen is None or not torch.equal(weights > 0, self.chosen > 0):
            self.switches += 1
        self.chosen = weights
        rows, parts = (weights > 0).nonzero().unbind(1)
        share = weights[rows, parts].to(x_t.device)
        runs = torch.nn.functional.one_hot(parts, weights.shape[1]).float()
        self.rows_run += len(rows)
        alone = len(rows) == len(weights)
        if alone and (self._most is None or len(rows) <= self._most):
            self._attachment.set_rows(runs)
            return self._base.predict(x_t, timestep, condition)
        total: Tensor | None = None
        for own in torch.arange(len(rows)).split(self._most or len(rows)):
            index = rows[own].to(x_t.device)
            told = {name: tensor[index.to(tensor.device)] for name, tensor in condition.items()}
            self._attachment.set_rows(runs[own])
            output = self._base.predict(x_t[index], timestep[index], told)
            weighted = spread(share[own.to(share.device)].to(output), output) * output
            if total is None:
                total = output.new_zeros(len(x_t), *output.shape[1:])
            total = total.index_add(0, index, weighted)
        assert total is not None  # rows of weights sum to 1
        return total


@contextmanager
def experts(
    denoiser: Denoiser,
    tasks: Mapping[str, TaskAdapter],
    router: Router,
    told: Untold,
    mode: str = "top1",
    *,
    most_rows: int | None = None,
) -> Iterator[Experts]:
    """Puts a router's experts on a base for as long as the context lasts.

    Args:
        denoiser: The base, from `as_denoiser`, no task on it.
        tasks: Name of a part -> its task; others are left out.
        router: The router.
        told: From `features.untold`.
        mode: "top1", "top2", "full" or "nucleus"; see `posterior.MODES`.
        most_rows: Largest batch of mixed rows; None: all at once.

    Raises:
        DiffScalerError: A part without a task, another base than the router's, a control task, a
            cache that is on, or a base of another host.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if denoiser.attach_tasks is not None:
        raise DiffScalerError(
            "in ComfyUI experts are routed by the node DiffScaler Route Experts, not here"
        )
    if getattr(denoiser.model, "is_cache_enabled", False):
        raise DiffScalerError(
            "a cache of earlier steps is on, and the router reads the base without tasks between "
            "two steps: call disable_cache() first"
        )
    router.check_tasks(list(tasks))
    router.check_base(denoiser.shape_model or denoiser.model)
    chosen = {part: tasks[part] for part in router.parts}
    for task in chosen.values():
        if task.is_control or task.new_classes:
            what = "takes a control picture" if task.is_control else "brings new classes"
            raise DiffScalerError(f"task {task.name!r} {what}, and cannot be an expert")
    with (
        denoiser.held(),
        attach(denoiser.model, chosen, component=denoiser.component) as attachment,
    ):
        yield Experts(denoiser, attachment, router, told, mode, most_rows)
