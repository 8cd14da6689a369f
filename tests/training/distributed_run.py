"""One process of a distributed run; started by `accelerate launch` in test_distributed.py.

distributed_run.py KIND OUT    KIND: one of KINDS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bases import sd3_pipe, words_of

from diffscaler_core import save_task
from diffscaler_core.training import (
    TaskRun,
    TrainingConfig,
    TrainingData,
    as_denoiser,
    train_tasks,
)

#: plain: data parallel and accumulated; several: two tasks at once, one with control pictures;
#: sharded: FSDP2; control: FSDP2 of a control task; aligned: with a projector beside the task.
KINDS = ("plain", "several", "sharded", "control", "aligned")


def data_for(seed, control=False):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 8, 4, 8, 8, generator=generator)
    controls = latents.sign() if control else None
    return TrainingData(latents, torch.arange(8) % 2, ("blue", "red"), control=controls)


def config_for(kind, processes):
    return TrainingConfig(
        steps=4,
        batch=4,
        rank=2,
        lr=1e-2,
        warmup=2,
        accumulate=2 if kind == "plain" else 1,
        validate_every=2,
        validation_share=0.25,
        save_every=2,
        sample_steps=2,
        perturb="gaussian",
        shard=kind in ("sharded", "control") and processes > 1,
        repa="own" if kind == "aligned" else "off",
    )


def seen(pixels):
    """An encoder: the mean colours of a picture's sixteenths."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


def run(kind, out, accelerator):
    names = ["one", "two"] if kind == "several" else ["one"]
    controls = ["colour" if name == "two" or kind == "control" else "" for name in names]
    runs = [
        TaskRun(name, data_for(i, bool(control)), words=words_of(), control=control)
        for i, (name, control) in enumerate(zip(names, controls, strict=True))
    ]
    tasks = train_tasks(
        as_denoiser(sd3_pipe()),
        runs,
        config_for(kind, 1 if accelerator is None else accelerator.num_processes),
        folder=out / "run",
        accelerator=accelerator,
        encoder=seen,
    )
    if accelerator is None or accelerator.is_main_process:
        for name, task in tasks.items():
            save_task(task, out / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator()
    for kind in KINDS:
        run(kind, Path(sys.argv[1]) / kind, accelerator)
