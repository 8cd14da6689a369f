"""One cell of the methods benchmark: a method trained on a set from a seed, and what came of it."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from method_bases import SHIFT, WORK, load_base
from method_sets import NULL, POCKET, SETS, SHAPE, SIDE, encoded, pictures
from method_table import ROWS, Method
from safetensors.torch import load_file, save
from torch import Tensor

from diffscaler_core.atomic import write_whole
from diffscaler_core.autoencoder import vae_decode
from diffscaler_core.evaluation.distances import frechet_distance, kernel_distance
from diffscaler_core.evaluation.features import load_features
from diffscaler_core.pocket import load_vae
from diffscaler_core.training import (
    Denoiser,
    DivergedError,
    Objective,
    Prompts,
    TrainingData,
    train_task,
    validation_loss,
)
from diffscaler_core.training.baselines import train_baseline
from diffscaler_core.training.preview import sample_latents

#: Pictures trained on, validated on, compared with, and made; the first three have own seeds.
TRAINED, VALIDATED, REFERENCES, MADE = 240, 96, 960, 288
SHOWN = 8  # of the made ones that are kept for the picture
SAMPLING_STEPS = 15


def denoiser_of(base: str) -> Denoiser:
    """Returns a trained base as the trainer sees it."""
    model = load_base(base)
    return Denoiser(
        model=model,
        predict=lambda x, t, told: model(x, timestep=t, class_labels=told["label"]).sample,
        objective=Objective("flow"),
        fields=("label",),
        component="transformer" if base.startswith("dit") else "unet",
        decode=vae_decode(load_vae(POCKET)),
        factor=8,
        size=SIDE,
        null_label=NULL,
        class_count=NULL + 1,
    )


def prompts_of(name: str) -> Prompts:
    """Returns what the base is told of a set's pictures: classes, or "no class" for all."""
    own = SETS[name]
    names = own.words if own.conditional else ("",)
    labels = torch.tensor([own.label(word) for word in names])
    return Prompts(names, {"label": labels}, {"label": torch.tensor([NULL])})


@cache
def data_of(name: str, count: int, seed: int) -> TrainingData:
    """Returns pictures of a set, encoded."""
    own = SETS[name]
    per_word = math.ceil(count / len(own.words))
    path = WORK / "sets" / f"{name}_{count}_{seed}.safetensors"
    if not path.exists():
        x0 = encoded(pictures(own.words, own.style, per_word, seed))
        write_whole(path, save({"x0": x0.contiguous()}))
    x0 = load_file(path)["x0"]
    index = torch.arange(len(x0)) // per_word if own.conditional else torch.zeros(len(x0))
    return TrainingData(x0.unsqueeze(0), index.long(), prompts_of(name).names)


@cache
def reference(name: str) -> Tensor:
    """Returns the features of a set's unseen pictures, as the VAE decodes them: (N, F).

    So a perfect model of the latents has distance 0, whatever the VAE loses.
    """
    return features(data_of(name, REFERENCES, 31).latents[0])  # type: ignore[index]


@torch.no_grad()
def features(latents: Tensor) -> Tensor:
    """Returns the features of latents' pictures, (N, F)."""
    return _net()(_decoded(latents))


def _decoded(latents: Tensor) -> Tensor:
    """Returns pictures in −1..1; in bfloat16, which moves features by less than a hundredth."""
    decode = _decoder()
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([decode(part).float() for part in latents.float().split(96)])


@cache
def _decoder() -> Any:
    return vae_decode(load_vae(POCKET).to(memory_format=torch.channels_last))


@cache
def _net() -> Any:
    return load_features("pocket")


@torch.no_grad()
def score(
    denoiser: Denoiser, name: str, seed: int, made: int = MADE
) -> tuple[dict[str, float], Tensor]:
    """Returns the scores of a base with whatever is on it now, and a few made latents.

    Args:
        denoiser: The base, adapted.
        name: The set.
        seed: Of the noise.
        made: How many pictures are made.
    """
    own, prompts = SETS[name], prompts_of(name)
    index = torch.arange(made) % len(prompts.names)
    noise = torch.randn(made, *SHAPE, generator=torch.Generator().manual_seed(1000 + seed))
    latents = torch.cat(
        [
            sample_latents(
                denoiser,
                prompts(rows),
                prompts.null(len(rows)),
                part,
                steps=SAMPLING_STEPS,
                guidance=1.0,
                shift=SHIFT,
            )
            for rows, part in zip(index.split(96), noise.split(96), strict=True)
        ]
    )
    seen = features(latents)
    found = {
        "fd": frechet_distance(reference(name), seen),
        "kd": kernel_distance(reference(name), seen).mean,
        "validation": validation_loss(denoiser, data_of(name, VALIDATED, 32), prompts, batch=96),
    }
    if own.conditional:
        net = _net()
        answers = torch.tensor([net.classes.index(word) for word in own.words])
        right = net.logits(seen, next(iter(net.heads))).argmax(1) == answers[index]
        found["accuracy"] = float(right.float().mean())
    return found, latents[:SHOWN] if not own.conditional else latents[: len(own.words)][:SHOWN]


def train(
    denoiser: Denoiser, method: Method, base: str, name: str, rate: float, seed: int
) -> tuple[Any, float]:
    """Returns what a method's training came to, and its seconds per step."""
    config = method.training(base, rate, seed)
    began, data = time.perf_counter(), data_of(name, TRAINED, 30)
    common: dict[str, Any] = {"prompts": prompts_of(name)}
    if method.baseline:
        done: Any = train_baseline(
            denoiser, data, config, baseline=method.baseline, settings=method.settings, **common
        )
    else:
        start = method.start(denoiser.model, config)
        done = train_task(denoiser, data, config, task=start, **common)
    return done, (time.perf_counter() - began) / config.steps


@contextlib.contextmanager
def worn(denoiser: Denoiser, done: Any) -> Iterator[None]:
    """Puts a trained task or baseline on its base for as long as the context lasts."""
    on: AbstractContextManager[Any]
    on = done.on(denoiser) if hasattr(done, "on") else denoiser.attached({done.name: done})
    with denoiser.held(), on:
        yield


def cell(
    base: str, key: str, name: str, rate: float, seed: int, scored: bool = True
) -> dict[str, Any]:
    """Returns one cell of the table, from disk if it is there already.

    Args:
        base: A name in BASES.
        key: A name in ROWS, or "base": the base as it is.
        name: A name in SETS.
        rate: The learning rate.
        seed: Of the run.
        scored: False: the validation loss alone, for tuning.
    """
    kind = "cells" if scored else "tuning"
    path = WORK / kind / base / name / f"{key}_{rate:g}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    denoiser = denoiser_of(base)
    facts: dict[str, Any] = {"base": base, "method": key, "set": name, "rate": rate, "seed": seed}
    facts["parameters"] = 0
    latents = None
    done: Any = None
    if key != "base":
        try:
            done, seconds = train(denoiser, ROWS[key], base, name, rate, seed)
        except DivergedError as error:
            return kept(path, facts | {"diverged": str(error), "validation": 9.0})
        facts |= {"parameters": done.num_parameters, "seconds": seconds}
    with denoiser.held() if done is None else worn(denoiser, done):
        if scored:
            scores, latents = score(denoiser, name, seed)
        else:
            own = data_of(name, VALIDATED, 32)
            loss = validation_loss(denoiser, own, prompts_of(name), batch=96, held=True)
            scores = {"validation": loss}
    facts |= scores
    if latents is not None and seed == 0:
        write_whole(
            path.with_suffix(".safetensors"), save({"latents": latents.half().contiguous()})
        )
    return kept(path, facts)


def kept(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes a cell, whole or not at all; returns it."""
    write_whole(path, json.dumps(facts).encode())
    return facts
