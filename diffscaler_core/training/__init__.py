"""Training a task: pictures in, one small task out, the base untouched.

from diffscaler_core.training import TrainingConfig, as_denoiser, encode_folder, train_task

denoiser = as_denoiser(pipe)
data = encode_folder("pictures", 512, denoiser.encode)
task = train_task(denoiser, data, TrainingConfig(name="flowers", steps=1000))
"""

from .bases.pipelines import as_denoiser
from .conditioning import Prompts, prompts_for
from .config import TrainingConfig
from .data.prepare import TrainingData, encode_folder, encode_pictures, find_pictures
from .denoiser import Denoiser
from .engine import DivergedError
from .learner import TaskRun
from .loop import choose_ranks, train_task, train_tasks
from .objective import Objective
from .preview import preview, sample_latents, sample_prompts
from .progress import History, Progress
from .run_folder import RunFolder
from .validation import validation_loss

__all__ = [
    "Denoiser",
    "DivergedError",
    "History",
    "Objective",
    "Progress",
    "Prompts",
    "RunFolder",
    "TaskRun",
    "TrainingConfig",
    "TrainingData",
    "as_denoiser",
    "choose_ranks",
    "encode_folder",
    "encode_pictures",
    "find_pictures",
    "preview",
    "prompts_for",
    "sample_latents",
    "sample_prompts",
    "train_task",
    "train_tasks",
    "validation_loss",
]
