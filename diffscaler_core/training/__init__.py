"""Training a task: pictures in, one small task out, the base untouched.

from diffscaler_core.training import TrainingConfig, as_denoiser, encode_folder, train_task

denoiser = as_denoiser(pipe)
data = encode_folder("pictures", 512, denoiser.encode)
task = train_task(denoiser, data, TrainingConfig(name="flowers", steps=1000))
"""

from .conditioning import Prompts, prompts_for
from .config import TrainingConfig
from .data import TrainingData, encode_folder, encode_pictures, find_pictures
from .denoiser import Denoiser
from .diffusers_bases import as_denoiser
from .loop import DivergedError, Progress, train_task
from .objective import Objective
from .preview import preview, sample_latents
from .validation import validation_loss

__all__ = [
    "Denoiser",
    "DivergedError",
    "Objective",
    "Progress",
    "Prompts",
    "TrainingConfig",
    "TrainingData",
    "as_denoiser",
    "encode_folder",
    "encode_pictures",
    "find_pictures",
    "preview",
    "prompts_for",
    "sample_latents",
    "train_task",
    "validation_loss",
]
