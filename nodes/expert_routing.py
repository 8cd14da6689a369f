"""Experts on a ComfyUI MODEL: in each model call a router says which task each row runs.

The experts are tasks that are routed, as `patching.route_tasks` has it. One wrapper more, round all
others of `BaseModel.apply_model`, has the router look at the rows without any task, and tells the
carrier each row's strengths where it looks for those of conditionings. Guidance's rows are the same
latents twice, so they are looked at once, and run the same experts.

With "top1" that is one call of the model and the part of one that the router needs. Otherwise it is
a call for each expert that counts anywhere, and their results are mixed: what a call gives is the
prediction of x0, which is linear in whatever the model predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor

from ..diffscaler_core import DiffScalerError, TaskAdapter
from ..diffscaler_core.systems.posterior import weights_of
from ..diffscaler_core.systems.router import Router
from ..diffscaler_core.systems.taps import tapped
from .carrier import is_running
from .conditions import arguments_of
from .control_conds import conds_of
from .keymap import diffusers_model
from .native_layout import native_layout
from .noise import unit_scale
from .patching import Stays, is_compiled, refuse_compiled, route_tasks, tasks_on
from .row_conds import ROUTE, Route, RowCond, RowsOfCall, added, together
from .step_caches import follow_step, has_cache, leaves_calls_out

KEY = "diffscaler_experts"


def route_experts(
    model: ModelPatcher,
    tasks: Sequence[TaskAdapter],
    router: Router,
    mode: str = "top1",
    strength: float = 1.0,
    component: str | None = None,
) -> ModelPatcher:
    """Returns a clone of the model that runs in each row the experts its router chooses.

    Args:
        model: Any diffusion model; stays as it is.
        tasks: The experts, called as the router's parts are.
        router: The router.
        mode: A name in `posterior.MODES`.
        strength: Of all experts.
        component: Which of the tasks' components this model is; None: their only one.

    Raises:
        MismatchError: A task or the router is another base's.
        DiffScalerError: A part has no task, two tasks have one name, or the model is compiled, has
            experts already or is told prompts of which the router's file has no empty one.
    """
    names = [task.name for task in tasks]
    router.check_tasks(names)
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise DiffScalerError(f"two of the tasks are called {doubled!r}: connect each expert once")
    if model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        raise DiffScalerError(
            "this model has a router already: connect all experts to one Route DiffScaler Experts"
        )
    refuse_compiled(model, "a router cannot read compiled code")
    if "context" not in router.null:
        raise DiffScalerError(
            "this router's file holds no empty prompt, which the model is told while it is read: "
            "train it with one (train-router --words)"
        )
    router.check_base(diffusers_model(model.model))
    router.site.name_in(model.model)
    own = {task.name: task for task in tasks if task.name in router.parts}
    before = {entry.route for entry in tasks_on(model)}
    clone, routes = route_tasks(model, [own[part] for part in router.parts], component)
    if before & set(routes):
        raise DiffScalerError(
            "one of the experts is routed by DiffScaler Route Tasks too: route it in one of the two"
        )
    clone = clone.clone() if clone is model else clone
    chooser = _Chooser(router, routes, mode)
    for kind, wrapper in (
        (WrappersMP.APPLY_MODEL, chooser),
        (WrappersMP.PREDICT_NOISE, _Watcher(chooser)),
        (WrappersMP.OUTER_SAMPLE, _Everywhere(routes, strength)),
    ):
        others = clone.wrappers.get(kind, {})
        clone.wrappers[kind] = {KEY: [wrapper], **others}  # before the tasks' own
    return clone


class _Everywhere(Stays):
    """Routes the experts on every conditioning, so that each row of a call has them at hand."""

    def __init__(self, routes: Sequence[Route], strength: float) -> None:
        self._routes = together(routes, [strength] * len(routes))

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `outer_sample(noise, …)` of a guider."""
        guider = executor.class_obj
        guider.conds = {kind: [self._on(c) for c in own] for kind, own in guider.conds.items()}
        return executor(*args, **kwargs)

    def _on(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        known = conds_of(cond).get(ROUTE)
        routes = added(known.routes if isinstance(known, RowCond) else {}, self._routes)
        placed = {**cond.get("model_conds", {}), ROUTE: RowCond(routes)}
        return {**cond, "model_conds": placed}


class _Chooser(Stays):
    """Has the router look at a call's rows, and runs them with the experts it chooses."""

    def __init__(self, router: Router, routes: Sequence[Route], mode: str) -> None:
        self._router, self._routes, self._mode = router, tuple(routes), mode

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `apply_model(x, t, …, transformer_options, **conds)`."""
        model, rows = executor.class_obj, kwargs.get(ROUTE)
        if not isinstance(rows, RowsOfCall) or is_running(model):
            return executor(*args, **kwargs)
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        if is_compiled(model, options):
            raise DiffScalerError("a router cannot read a compiled model: compile none")
        weights = self._weights(model, args[0], args[1], options, rows)
        if bool(((weights > 0).sum(1) == 1).all()):
            return executor(*args, **{**kwargs, ROUTE: self._told(rows, (weights > 0).float())})
        if has_cache(options):
            raise DiffScalerError(
                f"a cache of earlier steps cannot follow the mode {self._mode!r}, in which a step "
                f"is several calls: choose 'top1', or take the cache away"
            )
        total: Tensor | None = None
        for part in range(weights.shape[1]):
            share = weights[:, part]
            if not bool(share.any()):
                continue
            alone = torch.zeros_like(weights)
            alone[:, part] = 1.0
            output = executor(*args, **{**kwargs, ROUTE: self._told(rows, alone)})
            weighted = output * share.to(output).view(-1, *[1] * (output.ndim - 1))
            total = weighted if total is None else total + weighted
        return total

    def chosen(self, model: Any, x: Tensor, sigma: Tensor, options: Mapping[str, Any]) -> object:
        """Returns something that differs where other experts are chosen for these rows."""
        found = self._router.posterior(*self._looked(model, x, sigma, options))
        return (weights_of(found, self._mode) > 0).tolist()

    def _told(self, rows: RowsOfCall, runs: Tensor) -> _ExpertRows:
        return _ExpertRows(rows, dict(zip(self._routes, runs.unbind(1), strict=True)))

    def _weights(
        self, model: Any, x: Tensor, sigma: Tensor, options: Mapping[str, Any], rows: RowsOfCall
    ) -> Tensor:
        """Returns each expert's share in each row, (B, K), on the CPU."""
        parts, sigmas = (own.split([part.rows for part in rows.parts]) for own in (x, sigma))
        once = all(
            part.shape == parts[0].shape and torch.equal(part, parts[0]) for part in parts[1:]
        ) and all(torch.equal(own, sigmas[0]) for own in sigmas[1:])
        if once:
            x, sigma = parts[0], sigmas[0]
        found = self._router.posterior(*self._looked(model, x, sigma, options))
        weights = weights_of(found, self._mode)
        return weights.repeat(len(parts), 1) if once else weights

    @torch.no_grad()
    def _looked(
        self, model: Any, x: Tensor, sigma: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what the router is told of rows: features (B, F), α and σ (B,)."""
        block = self._router.site.name_in(model)
        null = {
            name: own.to(x.device).expand(len(x), *own.shape[1:])
            for name, own in self._router.null.items()
        }
        told = arguments_of(model, x, null, {})
        # without anybody's wrappers and patches: the base alone, and no cache counts this call
        plain = {name: options[name] for name in ("sample_sigmas",) if name in options}
        plain |= {"sigmas": sigma, "cond_or_uncond": [0], "uuids": []}

        def call() -> object:
            return model._apply_model(x, sigma, transformer_options=plain, **told)

        layout = native_layout(model, x.shape[2:])
        seen = tapped(model, [block], call, layout, self._router.site.pool)[block]
        noise = unit_scale(model.model_sampling, sigma)
        return seen, noise.alpha, noise.sigma


class _Watcher(Stays):
    """Has the router look at each step, where a cache would leave out the call that it looks in."""

    def __init__(self, chooser: _Chooser) -> None:
        self._chooser = chooser

    def __call__(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        """Called by ComfyUI in place of `predict_noise(x, sigma, model_options, …)` of a guider."""
        model, options = executor.class_obj.inner_model, args[2]["transformer_options"]
        if leaves_calls_out(options):
            follow_step(
                options, lambda: self._chooser.chosen(model, args[0], args[1], options), KEY
            )
        return executor(*args, **kwargs)


class _ExpertRows(RowsOfCall):
    """A call's rows, whose experts a router has chosen.

    Args:
        rows: The call's rows as conditionings have them.
        runs: Expert -> how much each row runs it, (B,).
    """

    def __init__(self, rows: RowsOfCall, runs: Mapping[Route, Tensor]) -> None:
        super().__init__(rows.parts)
        self._runs = runs

    def strengths(self, route: Route) -> Tensor:
        """Returns the strengths of a routed task per row, (B,)."""
        own = super().strengths(route)
        return own * self._runs[route] if route in self._runs else own
