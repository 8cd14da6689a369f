"""Nodes that take a MODEL for its weights alone: merging reads them, saving writes them.

A task is no part of the weights, so both would leave it out without a word: they are refused here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

from ..diffscaler_core import DiffScalerError


def refuse_weights_alone(
    patcher: ModelPatcher, key: str, names: Callable[[ModelPatcher], list[str]]
) -> None:
    """Makes a model and its clones refuse to be merged into another one, and to be saved.

    Args:
        patcher: The model.
        key: Of the callback that tells the clones; the second time does nothing.
        names: Gives the names of the tasks on a model.
    """
    if key in patcher.callbacks.get(CallbacksMP.ON_CLONE, {}):
        return
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, key, lambda _, new: _guard(new, names))
    _guard(patcher, names)


def _guard(patcher: ModelPatcher, names: Callable[[ModelPatcher], list[str]]) -> None:
    known = weakref.ref(patcher)

    def refuse(what: str) -> None:
        tasks = ", ".join(repr(name) for name in names(known()))
        raise DiffScalerError(
            f"{what} takes a model's weights alone and would leave out {tasks}: connect the model "
            f"from before the tasks, and put them on what comes out"
        )

    def get_key_patches(filter_prefix: str | None = None) -> Any:
        if filter_prefix:  # hooks ask for all, to restore them
            refuse("merging")
        return type(known()).get_key_patches(known(), filter_prefix)

    def state_dict_for_saving(*args: Any, **kwargs: Any) -> None:
        refuse("saving")

    patcher.get_key_patches = get_key_patches
    patcher.state_dict_for_saving = state_dict_for_saving
