"""The sockets of the two training nodes, read off the trainer's own table of settings."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..diffscaler_core.methods import METHODS
from ..diffscaler_core.training.config import LIMITS, TrainingConfig
from ..diffscaler_core.training.settings import SETTINGS
from .edge_types import Task, Training
from .training_controls import NO_CONTROL, control_choices
from .training_data import NO_FOLDER, folder_choices

#: What the settings node shows, in this order; the ids are frozen.
_SHOWN = (
    *("targets", "exclude"),
    *("lr_scale_shift", "lr_prompts", "optimizer", "schedule", "warmup", "restarts"),
    *("weight_decay", "beta1", "beta2", "clip", "ema", "accumulate"),
    *("flip", "crops", "buckets", "skip_bad"),
    *("prompts", "drop", "prompt_noise", "perturb", "perturb_gamma"),
    *("timesteps", "timestep_mean", "timestep_std", "timestep_shift", "timestep_uniform"),
    *("weighting", "snr_gamma", "chain_tau"),
    *("validation_share", "validate_every", "validation_times"),
    *("sample_every", "sample_steps", "guidance"),
    *("save_every", "keep", "precision", "checkpointing"),
)
#: What it shows after those; workflows know a node's inputs by their places.
_SHOWN_LATER = (
    *("control_drop", "lr_control", "control_rank", "control_activation", "control_embedding"),
    *("gamma_blocks", "rank_budget", "activation"),
    *("experts", "time_route", "route_alpha", "route_beta"),
)
_MOST = 1_000_000
#: Steps between samples, if no settings are connected.
SAMPLE_EVERY = 250
#: What the settings node says of each; ranges and names are the trainer's own.
_TIPS: dict[str, str] = {
    "exclude": "Layers to leave out: a regular expression; empty leaves none out.",
    "lr_prompts": "Learning rate of prompts that are learned with the task.",
    "optimizer": "adamw always works; adamw8bit needs bitsandbytes; prodigy needs prodigyopt and "
    "finds the step size itself.",
    "schedule": "How the learning rates fall after the warm-up: cosine ends at a hundredth.",
    "warmup": "Steps over which the learning rates rise to full at the start.",
    "restarts": "Arcs of the schedule cosine_restarts.",
    "weight_decay": "Pulls the subspaces towards 0; 0: none.",
    "beta1": "How long AdamW remembers gradients, 0 to 1.",
    "beta2": "How long AdamW remembers their squares, 0 to 1.",
    "clip": "Largest norm of the gradient; 0 does not clip.",
    "ema": "Save a running mean of the parameters, such as 0.99; 0: the parameters themselves.",
    "accumulate": "Compute each batch in so many parts, one after the other: less memory, the same "
    "result.",
    "flip": "Train on the mirrored pictures too; not for text or faces that must stay as they are.",
    "crops": "Random crops of each picture, beside its middle; each is encoded once.",
    "buckets": "Keep wide and tall pictures wide and tall, in place of cutting squares.",
    "skip_bad": "Leave out pictures that cannot be read; otherwise they are named and nothing is "
    "trained.",
    "prompts": "Where prompts come from; auto: looked up in words, else encoded by clip, else "
    "learned.",
    "drop": "Share of prompts replaced by the empty one, so that guidance (cfg) works with the "
    "task.",
    "prompt_noise": "How different learned prompts are at the start.",
    "perturb": "Noise on the prompts' embeddings, against learning pictures by heart.",
    "perturb_gamma": "Size of that noise.",
    "timesteps": "How noise levels are drawn; auto: logit_normal for flows, else uniform.",
    "timestep_mean": "Of logit_normal: above 0 more noisy times, below 0 fewer.",
    "timestep_std": "Of logit_normal: its width.",
    "timestep_shift": "Above 1 moves all times towards noise, for large pictures.",
    "timestep_uniform": "Share of times drawn uniformly all the same, so that none is left out.",
    "weighting": "Weight of the loss by noise level; min_snr is for noise and v models.",
    "snr_gamma": "The cap of min_snr.",
    "chain_tau": "How fast the weight of chain grows with noise.",
    "validation_share": "Share of the pictures that is not trained on but looked at.",
    "validate_every": "Steps between validations; 0: at the end only.",
    "validation_times": "Noise levels at which each validation picture is looked at.",
    "sample_steps": "Sampler steps of the samples.",
    "guidance": "Guidance (cfg) of the samples; 1: none.",
    "save_every": "Steps between checkpoints; 0: only when the run ends or is stopped.",
    "keep": "How many checkpoints are kept.",
    "control_drop": "Share of control pictures left out, so that the task also does well without.",
    "control_rank": "Width of the control's own subspace; 0: as many as a patch has numbers, where "
    "it can express any linear map of it.",
    "control_activation": "Of the control's subspace.",
    "control_embedding": "affiner sees the picture through the model's own frozen embedding; copy "
    "trains a copy of that embedding, from zero.",
    "activation": "Of the subspaces; method: its own (diffscaler: relu, lora: identity). With "
    "identity the task can become a LoRA file.",
    "experts": "Share the new subspace's units out among so many ranges of noise, each with its "
    "own; 1: all act at every noise level.",
    "time_route": "Let a window slide over the new subspace's units, from clean to noise, so that "
    "each noise level has units of its own.",
    "route_alpha": "Of time_route: above 1 the window slides late, at high noise.",
    "route_beta": "Of time_route: the share of the units in the window.",
    "gamma_blocks": "Of method difffit: its scale on the outputs of the first half of the blocks, "
    "as in the paper, or of all.",
}
#: Better words, ranges or defaults than the table's.
_OWN: dict[str, dict[str, Any]] = {
    "lr_scale_shift": {
        "default": 0.0,
        "tooltip": "Learning rate of scales and shifts; 0: three times the learning rate.",
    },
    "lr_control": {
        "default": 0.0,
        "tooltip": "Learning rate of the control's affiner; 0: three times the learning rate.",
    },
    "rank_budget": {
        "default": "",
        "tooltip": "Let the trainer choose each layer's rank, for as many numbers as this rank "
        "everywhere (8), a share of the model (0.4%) or a count (20k); empty: the same rank "
        "everywhere.",
    },
    "targets": {
        "tooltip": "Which layers are adapted: blocks, attention, mlp, all, or a regular expression."
    },
    "exclude": {"default": ""},
    "precision": {
        "default": "auto",
        "options": ["auto", "no", "bf16", "fp16"],
        "tooltip": "What the model computes in while it is trained on; auto: bf16 on a GPU, on a "
        "CPU what the model is.",
    },
    "checkpointing": {
        "tooltip": "Recompute activations in the backward pass: much less memory, about a third "
        "slower. Switch it on if the GPU runs out of memory."
    },
    "sample_every": {
        "default": SAMPLE_EVERY,
        "tooltip": "Steps between samples, shown on the node while it runs; 0: at the end only.",
    },
}


def training_inputs() -> list[io.Input]:
    """Returns the training node's inputs."""
    return [
        io.Model.Input("model", tooltip="The frozen model to train a task for; it never changes."),
        io.String.Input(
            "name", default="my_task", tooltip="The task's name; its run folder begins with it."
        ),
        io.Combo.Input(
            "folder",
            options=folder_choices(),
            default=NO_FOLDER,
            tooltip="A folder of pictures in ComfyUI's input folder. A picture's prompt is the "
            "text file beside it (cat.png, cat.txt), else its sub-folder's name, else the task's.",
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=16,
            max=8192,
            step=8,
            tooltip="Side in pixels that pictures are cut to; latents keep their own size.",
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default="diffscaler",
            tooltip="Which parts are trained: diffscaler is scale, shift and a small new subspace.",
        ),
        io.Int.Input(
            "rank", default=8, min=1, max=1024, tooltip="Width of the new subspace in each layer."
        ),
        io.Int.Input("steps", default=1000, min=1, max=_MOST, tooltip="Optimiser steps."),
        io.Int.Input("batch_size", default=4, min=1, max=4096, tooltip="Pictures per step."),
        io.Float.Input(
            "learning_rate",
            default=1e-3,
            min=1e-7,
            max=1.0,
            step=1e-7,
            round=False,
            tooltip="Learning rate of the subspaces: about 0.001 for models of full size, up to "
            "0.01 for small ones.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="The same seed, settings and pictures give the same task.",
        ),
        io.Combo.Input(
            "resume",
            options=["auto", "never"],
            default="auto",
            tooltip="auto: a run that was stopped goes on when the same settings are queued again; "
            "never: it starts anew.",
        ),
        *_sources(),
    ]


def _sources() -> list[io.Input]:
    """Returns what may be connected."""
    return [
        io.Vae.Input("vae", optional=True, tooltip="The model's VAE: for pictures, and samples."),
        io.Clip.Input("clip", optional=True, tooltip="The model's text encoders, for captions."),
        Task.Input(
            "words",
            optional=True,
            tooltip="A task that stores prompts: captions that it knows are looked up there.",
        ),
        io.Image.Input(
            "images", optional=True, tooltip="Pictures, in place of a folder; one or a list."
        ),
        io.String.Input(
            "captions",
            optional=True,
            force_input=True,
            tooltip="The images' prompts: a text for each, or one for all.",
        ),
        io.Latent.Input(
            "latents", optional=True, tooltip="Encoded pictures, in place of a folder; or a list."
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="The latents' or images' prompts, encoded: one for each, or one for all.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="The empty prompt, encoded, so that guidance works with the task.",
        ),
        Task.Input(
            "task", optional=True, tooltip="A task to go on from; without it, a new one begins."
        ),
        io.Combo.Input(
            "validation_folder",
            options=folder_choices(),
            default=NO_FOLDER,
            optional=True,
            advanced=True,
            tooltip="Pictures that are never trained on, to see how well the task does on others.",
        ),
        io.Latent.Input(
            "validation_latents", optional=True, tooltip="The same as latents, or a list of them."
        ),
        io.Conditioning.Input(
            "validation_positive", optional=True, tooltip="The validation latents' prompts."
        ),
        Training.Input(
            "settings", optional=True, tooltip="All further settings, from their own node."
        ),
        *_controls(),
    ]


def _controls() -> list[io.Input]:
    """Returns what makes a task one that takes control pictures."""
    return [
        io.Image.Input(
            "control_images",
            optional=True,
            tooltip="Control pictures: one for each of the images (or latents), in their order.",
        ),
        io.String.Input(
            "control",
            default="",
            optional=True,
            tooltip="For a task that takes control pictures: what they show, in your own words "
            "(edges, depth, sketch); empty: as control_from says, or no control.",
        ),
        io.Combo.Input(
            "control_from",
            options=control_choices(),
            default=NO_CONTROL,
            optional=True,
            tooltip="Make the control pictures of the pictures themselves; edges are those of "
            "Detect Edges (Canny) with thresholds 0.1 and 0.2.",
        ),
        io.Combo.Input(
            "control_folder",
            options=folder_choices(),
            default=NO_FOLDER,
            optional=True,
            tooltip="A folder of control pictures, by the same names as the pictures in folder.",
        ),
    ]


def settings_inputs() -> list[io.Input]:
    """Returns the settings node's inputs."""
    keep = io.Boolean.Input(
        "keep_latents",
        default=True,
        optional=True,
        tooltip="Keep encoded pictures in ComfyUI's user folder: the next run starts sooner.",
    )
    later = (_input(name, advanced=True) for name in _SHOWN_LATER)
    return [*(_input(name) for name in _SHOWN), keep, *later]


def _input(name: str, **more: Any) -> io.Input:
    setting = SETTINGS[name]
    facts: dict[str, Any] = {
        "tooltip": _TIPS.get(name, setting.help),
        "default": getattr(TrainingConfig(), name, None),
        "optional": True,
        **_OWN.get(name, {}),
        **more,
    }
    if setting.choices or "options" in facts:
        facts.setdefault("options", list(setting.choices))
        return io.Combo.Input(name, **facts)
    if setting.kind is bool:
        return io.Boolean.Input(name, **{**facts, "default": bool(facts["default"])})
    if setting.kind is str or setting.text:
        return io.String.Input(name, **{**facts, "default": facts["default"] or ""})
    low, high = LIMITS.get(name, (0, float("inf")))
    if setting.kind is int:
        facts |= {"default": int(facts["default"] or 0), "min": low, "max": min(high, _MOST)}
        return io.Int.Input(name, **facts)
    facts |= {
        "min": -100.0 if name == "timestep_mean" else float(low),
        "max": float(min(high, 100)),
    }
    facts |= {"step": 1e-7, "round": False} if name.startswith("lr") else {"step": 0.001}
    return io.Float.Input(name, **{**facts, "default": float(facts["default"] or 0)})
