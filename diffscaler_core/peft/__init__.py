"""DiffScaler as a method of Hugging Face PEFT: importing this registers it (extra `peft`, ≥ 0.18).

    get_peft_model(model, DiffScalerConfig(r=8, target_modules="blocks"))

The formula is the core's own (`affiner.py`); these files only tell PEFT where it goes. A task file
and a PEFT adapter hold the same numbers: `to_task`, `from_task`, `load_folder`, `save_folder`.
"""

from .config import DiffScalerConfig
from .layer import DiffScalerLayer
from .model import DiffScalerModel, mixed_batch
from .registration import register
from .tasks import config_of, from_task, load_folder, save_folder, to_task

register(DiffScalerConfig, DiffScalerModel)

__all__ = [
    "DiffScalerConfig",
    "DiffScalerLayer",
    "DiffScalerModel",
    "config_of",
    "from_task",
    "load_folder",
    "mixed_batch",
    "register",
    "save_folder",
    "to_task",
]
