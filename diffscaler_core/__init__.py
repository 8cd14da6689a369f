"""DiffScaler: many tiny tasks on one frozen diffusion model (method: arXiv:2404.09976).

A name is imported on its first use, so that what needs no torch (the command line's help, its
completion) does not wait for it.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import DiffScalerError, MismatchError, TaskFileError, UnknownNameError
from .version import __version__

if TYPE_CHECKING:
    from .affiner import Affiner
    from .attach import Attachment, attach
    from .bank import TaskBank
    from .combine import combine_tasks, scale_task
    from .control import Control
    from .families import FAMILIES, Family
    from .files import load_task, read_info, save_task
    from .lora import export_lora, import_lora
    from .methods import METHODS
    from .schedule import Schedule
    from .stack import AffinerStack
    from .targets import Target, find_targets
    from .task import TaskAdapter, new_task

#: Module -> its public names, as above.
_NAMES = {
    "affiner": ("Affiner",),
    "attach": ("Attachment", "attach"),
    "bank": ("TaskBank",),
    "combine": ("combine_tasks", "scale_task"),
    "control": ("Control",),
    "families": ("FAMILIES", "Family"),
    "files": ("load_task", "read_info", "save_task"),
    "lora": ("export_lora", "import_lora"),
    "methods": ("METHODS",),
    "schedule": ("Schedule",),
    "stack": ("AffinerStack",),
    "targets": ("Target", "find_targets"),
    "task": ("TaskAdapter", "new_task"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "FAMILIES",
    "METHODS",
    "Affiner",
    "AffinerStack",
    "Attachment",
    "Control",
    "DiffScalerError",
    "Family",
    "MismatchError",
    "Schedule",
    "Target",
    "TaskAdapter",
    "TaskBank",
    "TaskFileError",
    "UnknownNameError",
    "__version__",
    "attach",
    "combine_tasks",
    "export_lora",
    "find_targets",
    "import_lora",
    "load_task",
    "new_task",
    "read_info",
    "save_task",
    "scale_task",
]


class _Package(ModuleType):
    """This package, in which `attach` is the function, whoever imports the file of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
