"""One run of the training node: its inputs become the trainer's, and what comes out is shown."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor

from ..diffscaler_core import DiffScalerError, TaskAdapter, save_task
from ..diffscaler_core.auto_rank import AUTO
from ..diffscaler_core.file_names import harmless
from ..diffscaler_core.training.conditioning import NULL, Prompts, prompts_for
from ..diffscaler_core.training.config import TrainingConfig
from ..diffscaler_core.training.data.batches import TrainingData, with_one_table
from ..diffscaler_core.training.denoiser import Denoiser
from ..diffscaler_core.training.loop import train_task
from .conditions import Row, empty_like, encoded, facts_of, prompts_of, repeats_tokens, rows_of
from .noise import noise_of
from .training import denoiser_of
from .training_controls import NOTHING, ControlSource, control_of
from .training_data import NO_FOLDER, from_folder, from_images, from_latents
from .training_folder import run_folder
from .training_inputs import SAMPLE_EVERY
from .training_report import Report, losses_of, pictures_of, summary_of

logger = logging.getLogger(__name__)

_CONFIG = {field.name for field in dataclasses.fields(TrainingConfig)}

Inputs = Mapping[str, Any]
Outcome = tuple[TaskAdapter, dict[str, list[float]], Tensor, str]


@dataclass
class Source:
    """Pictures and what the model is told about them.

    Attributes:
        data: The pictures.
        prompts: Their prompts.
        validation: Pictures that are never trained on.
        has_null: False: nobody knows the empty prompt; `prompts` has zeros in its place.
    """

    data: TrainingData
    prompts: Prompts
    validation: TrainingData | None = None
    has_null: bool = True


def train(inputs: Inputs, node: str | None = None) -> Outcome:
    """Trains a task in ComfyUI; returns it, its losses, its last samples and a summary.

    Args:
        inputs: The node's, one value each, but lists for images, captions, latents, positive, their
            validation twins, and control images.
        node: The node's id.

    Raises:
        DiffScalerError: Inputs that cannot be trained on, one clear line.
        InterruptProcessingException: The user stopped the run; its state is saved.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _train(inputs, node)


def _train(inputs: Inputs, node: str | None) -> Outcome:
    model, told = inputs["model"], {}
    denoiser = denoiser_of(model, inputs.get("vae"), inputs.get("clip"), told)
    config = config_of(inputs, model)
    source = _source(inputs, denoiser, config, told)
    if not source.has_null:
        # without an empty prompt there is nothing to guide away from
        config = dataclasses.replace(config, drop=0.0, guidance=1.0)
    folder, shown = run_folder(inputs, config, source.data, source.prompts)
    report = Report(config.steps, node)
    try:
        task = train_task(
            denoiser,
            source.data,
            config,
            prompts=source.prompts,
            task=inputs.get("task"),
            validation=source.validation,
            folder=folder.path,
            resume=inputs.get("resume") or "auto",
            on_step=report,
        )
    except InterruptProcessingException:
        logger.warning(
            "DiffScaler: training stopped after step %d of %d; its state is in %s, and the same "
            "settings queued again go on from there",
            report.step,
            config.steps,
            folder.path,
        )
        raise
    save_task(task, folder.path / f"{harmless(config.name)}.safetensors")
    facts = dict(task.info.get("training") or {})
    return task, losses_of(folder), pictures_of(folder), summary_of(folder, shown, facts)


def config_of(inputs: Inputs, model: Any) -> TrainingConfig:
    """Returns a run's settings: those on the node, and those connected to it."""
    settings = dict(inputs.get("settings") or {})
    settings.setdefault("sample_every", SAMPLE_EVERY)
    rate = float(inputs["learning_rate"])
    for name in ("lr_scale_shift", "lr_control"):
        settings[name] = settings.get(name) or 3 * rate
    if settings.get("precision", "auto") == "auto":
        settings["precision"] = _precision(model)
    chosen = {key: value for key, value in settings.items() if key in _CONFIG}
    if not chosen.get("exclude"):
        chosen.pop("exclude", None)
    budget = str(chosen.pop("rank_budget", "")).strip()
    if budget:
        chosen["rank_budget"] = budget
    return TrainingConfig(
        **{
            **chosen,
            "name": str(inputs["name"]).strip() or "task",
            "method": inputs["method"],
            "rank": AUTO if budget else inputs["rank"],
            "steps": inputs["steps"],
            "batch": inputs["batch_size"],
            "lr": rate,
            "seed": inputs["seed"],
            "control": control_of(inputs)[0],
        }
    )


def _precision(model: Any) -> str:
    """On an accelerator, what is not bfloat16 already computes in it by autocast, if it can."""
    device = model.load_device
    if management.is_device_cpu(device) or model.model.get_dtype_inference() == torch.bfloat16:
        return "no"
    if management.should_use_bf16(device):
        return "bf16"
    return "fp16" if model.model.get_dtype_inference() == torch.float16 else "no"


def _source(
    inputs: Inputs, denoiser: Denoiser, config: TrainingConfig, told: dict[str, Any]
) -> Source:
    folder = inputs.get("folder") or NO_FOLDER
    given = {
        "folder": folder != NO_FOLDER,
        "images": bool(inputs.get("images")),
        "latents": bool(inputs.get("latents")),
    }
    if sum(given.values()) != 1:
        which = " and ".join(key for key, there in given.items() if there)
        raise DiffScalerError(
            f"training needs one source of pictures, got {which or 'none'}: choose a folder, or "
            f"connect images, or connect latents with their conditioning"
        )
    rows = rows_of([entry for one in inputs.get("positive") or () for entry in one])
    names, unique = _named(rows, config.name)
    options = dict(inputs.get("settings") or {})
    size = int(inputs["resolution"])
    control = control_of(inputs)[1]
    if given["latents"]:
        if not rows:
            raise DiffScalerError("latents need their prompts: connect conditioning to 'positive'")
        data = _latents(inputs, inputs["latents"], names, control, denoiser)
    elif given["images"]:
        captions = names or list(inputs.get("captions") or ()) or [config.name]
        data = from_images(denoiser, inputs["images"], captions, size, options, control)
    else:
        data = from_folder(denoiser, folder, size, config.name, options, control)
    validation = _validation(inputs, denoiser, config, data, size, options)
    if validation is not None:
        data, validation = with_one_table(data, validation)
    if not rows or given["folder"]:
        prompts = _texts(inputs, denoiser, config, data.prompts, told)
        return Source(data, prompts, validation)
    null = rows_of([entry for one in inputs.get("negative") or () for entry in one])
    if not null and inputs.get("clip") is not None:
        null = encoded(inputs["clip"], [NULL])
    shown = [unique[name] for name in data.prompts]
    told.update(facts_of(shown))
    empty = null[0] if null else empty_like(shown[0])
    repeat = repeats_tokens(denoiser.model, shown[0])
    prompts = prompts_of(data.prompts, shown, empty, repeat)
    return Source(data, prompts, validation, has_null=bool(null))


def _named(rows: Sequence[Row], name: str) -> tuple[list[str], dict[str, Row]]:
    """Returns a name per prompt, the same for equal ones, and each name's prompt."""
    known: dict[str, str] = {}
    names, unique = [], {}
    for row in rows:
        tensors = [row[0], *(v for v in row[1].values() if isinstance(v, Tensor))]
        key = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in tensors)).hexdigest()
        known.setdefault(key, f"{name} {len(known) + 1}")
        names.append(known[key])
        unique[known[key]] = row
    return names, unique


def _latents(
    inputs: Inputs,
    latents: Sequence[Any],
    names: Sequence[str],
    control: ControlSource = NOTHING,
    denoiser: Denoiser | None = None,
) -> TrainingData:
    model = inputs["model"]
    scale = noise_of(model.get_model_object("model_sampling")).scale
    return from_latents(model.model, scale, latents, names, control, inputs.get("vae"), denoiser)


def _validation(
    inputs: Inputs,
    denoiser: Denoiser,
    config: TrainingConfig,
    data: TrainingData,
    size: int,
    options: Mapping[str, Any],
) -> TrainingData | None:
    folder = inputs.get("validation_folder") or NO_FOLDER
    if folder != NO_FOLDER:
        plainly = {**options, "flip": False, "crops": 0}
        control = control_of(inputs)[1]
        if control.images:
            raise DiffScalerError(
                "control_images belong to the images that are trained on, so the validation_folder "
                "has none; use validation_share in the settings"
            )
        return from_folder(denoiser, folder, size, config.name, plainly, control)
    if not inputs.get("validation_latents"):
        return None
    if config.control:
        raise DiffScalerError(
            "validation latents come without control pictures; use a validation_folder, or "
            "validation_share in the settings"
        )
    rows = rows_of([entry for one in inputs.get("positive") or () for entry in one])
    own = rows_of([entry for one in inputs.get("validation_positive") or () for entry in one])
    names, _ = _named([*rows, *own], config.name)
    names = names[len(rows) :] or names[:1]
    missing = [name for name in names if name not in data.prompts]
    if missing or (len(data.prompts) > 1 and not own):
        raise DiffScalerError(
            "the validation latents need the prompts they show, each one that is trained on as "
            "well: connect them to 'validation_positive'"
        )
    return _latents(inputs, inputs["validation_latents"], names)


def _texts(
    inputs: Inputs,
    denoiser: Denoiser,
    config: TrainingConfig,
    names: Sequence[str],
    told: dict[str, Any],
) -> Prompts:
    """Returns what the model is told about captions: looked up, encoded, or learned."""
    words, clip = inputs.get("words"), inputs.get("clip")
    source = config.prompts
    known = words is not None and all(name in words.prompts for name in names)
    if source == "auto" and not known and clip is None and words is None:
        raise DiffScalerError(
            f"nothing says what the captions ({', '.join(map(repr, names[:3]))}…) mean: connect "
            f"'clip' to encode them, or 'words' with stored prompts"
        )
    if clip is None or source not in ("auto", "encoded") or (source == "auto" and known):
        return prompts_for(
            denoiser, names, source, words=words, noise=config.prompt_noise, seed=config.seed
        )
    rows = encoded(clip, [NULL, *names])
    told.update(facts_of(rows[1:]))
    return prompts_of(names, rows[1:], rows[0], repeats_tokens(denoiser.model, rows[0]))
