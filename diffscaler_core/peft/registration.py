"""Makes PEFT know the method. PEFT's own call refuses names that its enumeration lacks.

So the enumeration grows by one first. That reaches into how CPython keeps an Enum's members, which
is nobody's promise: it is checked afterwards, and undone with a clear error if it did not take.
"""

from __future__ import annotations

import platform
from typing import Any

import peft
from packaging.version import Version
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method

from ..errors import DiffScalerError

NAME = "DIFFSCALER"
PREFIX = "diffscaler_"
OLDEST = "0.18.0"


def register(config: type[Any], model: type[Any]) -> None:
    """Makes PEFT know the method "DIFFSCALER"; idempotent, the last registration counts.

    Args:
        config: The method's PeftConfig.
        model: Its BaseTuner.

    Raises:
        DiffScalerError: A PEFT that is too old, or whose enumeration cannot be made to grow.
    """
    if Version(peft.__version__).release < Version(OLDEST).release:
        raise DiffScalerError(
            f"the PEFT bridge needs peft {OLDEST} or newer, and this is {peft.__version__}: "
            f"pip install -U peft"
        )
    if NAME not in PeftType.__members__:
        _grow(PeftType, NAME)
    member = PeftType(NAME)
    if member in PEFT_TYPE_TO_TUNER_MAPPING:  # by this module before it was reloaded, say
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model
        PEFT_TYPE_TO_PREFIX_MAPPING[member] = PREFIX
        return
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix=PREFIX)


def _grow(kind: Any, name: str) -> None:
    """Adds a member to an enumeration of strings, or leaves it as it was and raises."""
    try:
        member = str.__new__(kind, name)
        member._name_, member._value_, member.__objclass__ = name, name, kind
        member._sort_order_ = len(kind.__members__)
        kind._member_map_[name] = member
        kind._value2member_map_[name] = member
        kind._member_names_.append(name)
        type.__setattr__(kind, name, member)  # where Python ≥ 3.12 looks for it
        took = kind(name) is kind[name] is getattr(kind, name) is list(kind)[-1] is member
    except (AttributeError, TypeError, KeyError, ValueError):
        took = False
    if took:
        return
    for table in ("_member_map_", "_value2member_map_"):
        getattr(kind, table, {}).pop(name, None)
    names = getattr(kind, "_member_names_", [])
    if name in names:
        names.remove(name)
    if name in vars(kind):
        type.__delattr__(kind, name)
    raise DiffScalerError(
        f"PEFT {peft.__version__} takes no new method on Python {platform.python_version()}: its "
        f"list of methods cannot be made to grow; use diffscaler_core.attach, which needs no PEFT"
    )
