"""The tuner: which layers of a model get an adapter, and what concerns all of them at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..combine import combine_tasks
from ..errors import DiffScalerError, first_names, unknown
from ..matching import QKV, has_fused_qkv
from ..methods import METHODS
from ..targets import (
    PRESETS,
    all_targets,
    as_target,
    base_layer,
    component_of,
    find_targets,
)
from ..task import base_facts, new_task, parts_of
from .config import DiffScalerConfig
from .layer import BASE, DiffScalerLayer
from .registration import PREFIX


class DiffScalerModel(BaseTuner):
    """A model with DiffScaler adapters; made by `get_peft_model`."""

    prefix = PREFIX
    tuner_layer_cls = DiffScalerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT reads it off the class)

    def _prepare_model(self, peft_config: DiffScalerConfig, model: nn.Module) -> None:
        """Writes into the configuration what presets and methods mean on this model."""
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets in PRESETS:
            peft_config.target_modules = {target.name for target in find_targets(model, targets)}
        found = [
            target
            for target in all_targets(model)
            if self._check_target_module_exists(peft_config, target.name)
        ]
        peft_config.info.setdefault("base", base_facts(model, found))
        if peft_config.parts is None and found:
            self._write_parts(peft_config, model, [target.name for target in found])

    @staticmethod
    def _write_parts(config: DiffScalerConfig, model: nn.Module, names: list[str]) -> None:
        """Writes out where the method puts its parts, so that a saved adapter need not ask it."""
        component = component_of(model)
        layers = new_task(model, config.method, 1, names, component=component).layers
        for name in names:
            layer = f"{component}.{name}"
            parts = parts_of({layer: layers.get(layer, {})})
            if set(parts) != set(METHODS[config.method].parts) and not config.names_parts(name):
                config.parts_pattern[re.escape(name)] = parts

    def _create_and_replace(
        self,
        peft_config: DiffScalerConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Puts an adapter on one layer.

        Raises:
            DiffScalerError: The layer can carry none, or is never called.
        """
        found = as_target(current_key, base_layer(target))
        if found is None:
            raise DiffScalerError(
                f"{current_key!r} is a {type(base_layer(target)).__name__}, which can carry no "
                f"adapter; take Linear layers and convolutions, or exclude it (exclude_modules)"
            )
        if hasattr(parent, "in_proj_weight") or (target_name in QKV and has_fused_qkv(parent)):
            raise DiffScalerError(
                f"{current_key!r} is never called: its {type(parent).__name__} computes with the "
                f"weights of several layers at once; exclude it, or unfuse the projections first"
            )
        parts = peft_config.parts_of(current_key)
        if not parts:
            return
        layer = target
        if not isinstance(target, DiffScalerLayer):
            layer = DiffScalerLayer(target, found)
            BaseTunerLayer.set_adapter(layer, self.active_adapters)
        rank, facts = peft_config.rank_of(current_key), peft_config.facts
        layer.update_layer(adapter_name, parts, rank, facts, peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Adds an adapter that does what several do together at these strengths; exact.

        Scales and shifts add, subspaces concatenate their ranks.

        Raises:
            UnknownNameError: No such adapter.
            DiffScalerError: The name is in use, or the adapters cannot be one (see
                `combine_tasks`).
        """
        from .tasks import config_of, fill, to_task  # which need this class

        for name in adapters:
            if name not in self.peft_config:
                raise unknown("adapter", name, self.peft_config)
        if adapter_name in self.peft_config:
            raise DiffScalerError(f"an adapter {adapter_name!r} is there already; delete it first")
        tasks = [to_task(self, name) for name in adapters]
        combined = combine_tasks(tasks, weights, adapter_name)
        self.peft_config[adapter_name] = config_of(combined)
        self.inject_adapter(self.model, adapter_name)
        fill(self, combined, adapter_name)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Folds what folds into the weights; relu subspaces go on running beside them.

        Raises:
            DiffScalerError: Weights that cannot be rewritten; no layer is then changed.
        """
        self._check_weights()
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_weights()
            self._check_folds(adapter_names)
        return super()._unload_and_optionally_merge(  # type: ignore[no-any-return]
            merge, progressbar, safe_merge, adapter_names
        )

    def _check_weights(self) -> None:
        found = ((layer.target.name, layer.obstacle()) for layer in layers_of(self.model))
        refused = {name: why for name, why in found if why}
        if refused:
            layer, why = next(iter(refused.items()))
            raise DiffScalerError(
                f"cannot merge into {len(refused)} layers of {type(self.model).__name__}: "
                f"{layer!r} is {why}; the adapters work as they are, unmerged"
            )

    def _check_folds(self, adapter_names: list[str] | None) -> None:
        left = {
            layer.target.name: layer.leftovers(adapter_names) for layer in layers_of(self.model)
        }
        left = {name: own for name, own in left.items() if own}
        if left:
            reasons = dict.fromkeys(
                f"{a!r} ({why})" for own in left.values() for a, why in own.items()
            )
            raise DiffScalerError(
                f"cannot fold {', '.join(reasons)} into the weights of {len(left)} layers, first "
                f"{first_names(left, 1)}; merge_adapter() folds the rest and lets these run, and "
                f"to_task() makes a task file that needs no PEFT"
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with ExitStack() as scope:
            if names is not None:
                scope.enter_context(mixed_batch(self, names))
            yield


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Makes each row of the batch run its own adapter, in one forward, while the context is open.

    A PEFT model does the same for `model(…, adapter_names=[…])`; this is for models that carry the
    layers only (`inject_adapter_in_model`, diffusers' `add_adapter`).

    Args:
        model: A model with DiffScaler adapters.
        adapter_names: One per row of the batch, guidance's rows too; "__base__" for the base.

    Raises:
        UnknownNameError: No layer has such an adapter.
        DiffScalerError: Training, as PEFT forbids it, or merged adapters.
    """
    layers = list(layers_of(model))
    known = dict.fromkeys(name for layer in layers for name in layer.r)
    for name in adapter_names:
        if name != BASE and name not in known:
            raise unknown("adapter", name, known)
    if model.training and torch.is_grad_enabled():
        raise DiffScalerError(
            "adapter_names are for inference: gradient checkpointing would forget them; call "
            "eval(), or train each adapter by itself"
        )
    if any(layer.merged for layer in layers):
        raise DiffScalerError("adapters are merged, so rows cannot differ; unmerge_adapter() first")
    names = tuple(adapter_names)
    with ExitStack() as scope:
        for layer in layers:
            scope.callback(layer.set_rows, layer.set_rows(names))
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
                hook = module.register_forward_pre_hook(_Names(names), with_kwargs=True)
                scope.callback(hook.remove)
        yield


class _Names:
    """Tells a module that PEFT saves whole which of its copies each row runs."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = list(names)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Called by torch before the module."""
        return args, {**kwargs, "adapter_names": self.names}


def layers_of(model: nn.Module) -> Iterator[DiffScalerLayer]:
    """Yields the layers that carry DiffScaler adapters."""
    return (module for module in model.modules() if isinstance(module, DiffScalerLayer))


def bare(model: nn.Module) -> nn.Module:
    """Returns the model that PEFT's classes, or torch.compile's, are around."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, BaseTuner):
        return model.model  # type: ignore[no-any-return]
    inner = getattr(model, "base_model", None)
    return inner.model if isinstance(inner, BaseTuner) else model
