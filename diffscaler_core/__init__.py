"""DiffScaler: many tiny tasks on one frozen diffusion model (method: arXiv:2404.09976)."""

from .affiner import Affiner
from .attach import Attachment, attach
from .bank import TaskBank
from .combine import combine_tasks, scale_task
from .control import Control
from .errors import DiffScalerError, MismatchError, TaskFileError, UnknownNameError
from .families import FAMILIES, Family
from .files import load_task, read_info, save_task
from .lora import export_lora, import_lora
from .methods import METHODS
from .schedule import Schedule
from .stack import AffinerStack
from .targets import Target, find_targets
from .task import TaskAdapter, new_task
from .version import __version__

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
