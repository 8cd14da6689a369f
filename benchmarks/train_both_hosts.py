"""One training run in ComfyUI and in plain Python with diffusers: the same settings and pictures.

    OMP_NUM_THREADS=1 python benchmarks/train_both_hosts.py [--steps 200]

Trains the example pictures on the pocket base in both hosts, keeps some pictures back, and prints
each task's loss on those in each host: the rows say where a task was trained, the columns where its
file was loaded. ComfyUI runs in this process, through the training node.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "assets" / "pocket"
PICTURES = ROOT / "assets" / "examples" / "ink"
SIZE, BATCH, RATE, SHARE = 128, 8, 5e-3, 0.25


def script(name: str) -> ModuleType:
    """Returns a module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def booted(base: Path) -> ModuleType:
    """Starts ComfyUI in this process; returns the pack."""
    script("comfy_http")
    host, launch = script("comfy_host"), script("comfy_launch")
    launch.boot(host.comfyui(), ["--cpu", *host.base_directory(base)])
    return launch.load_pack(base / "custom_nodes" / "diffscaler")  # type: ignore[no-any-return]


def comfyui_base() -> tuple[Any, Any]:
    """Returns ComfyUI's MODEL and VAE, loaded as its nodes load them."""
    import comfy.sd
    import comfy.utils

    model = POCKET / "diffusion_models" / "diffscaler_pocket.safetensors"
    vae = POCKET / "vae" / "diffscaler_pocket_vae.safetensors"
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(model)), comfy.sd.VAE(
            sd=comfy.utils.load_torch_file(str(vae))
        )


def main() -> None:
    """Trains twice, loads each file in both hosts, prints the losses."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="diffscaler-"))
    pack = booted(base)

    def part(name: str) -> Any:
        return importlib.import_module(f"{pack.__name__}.{name}")

    core, training = part("diffscaler_core"), part("diffscaler_core.training")
    words = core.load_task(POCKET / "diffscaler" / "words.safetensors")
    settings: dict[str, Any] = dict(validation_share=SHARE, precision=args.precision, drop=0.1)
    settings |= dict(sample_every=0, sample_steps=1, save_every=0, keep_latents=False)
    model, vae = comfyui_base()
    inputs = dict(model=model, vae=vae, words=words, settings=settings, name="both", seed=0)
    inputs |= dict(folder="example: ink drawings", resolution=SIZE, method="diffscaler", rank=8)
    inputs |= dict(steps=args.steps, batch_size=BATCH, learning_rate=RATE, resume="never")
    start = time.perf_counter()
    trained = {"ComfyUI": part("nodes.training_job").train(inputs)[0]}
    seconds = {"ComfyUI": time.perf_counter() - start}

    theirs = training.as_denoiser(part("diffscaler_core.pocket").load_pipeline(POCKET))
    config = part("nodes.training_job").config_of(inputs, model)
    start = time.perf_counter()
    data = training.encode_folder(PICTURES, SIZE, theirs.encode)
    with tempfile.TemporaryDirectory() as folder:
        trained["diffusers"] = training.train_task(theirs, data, config, words=words, folder=folder)
    seconds["diffusers"] = time.perf_counter() - start

    hosts = {"ComfyUI": part("nodes.training").denoiser_of(model, vae), "diffusers": theirs}
    print(f"\n{args.steps} steps of {BATCH}, {args.precision}; loss on the pictures kept back\n")
    print(f"| trained in | seconds | {' | '.join(f'loss in {host}' for host in hosts)} |")
    print("|---|---|---|---|")
    losses: dict[str, list[float]] = {}
    for name in ("no task", *trained):
        task = None
        if name in trained:  # through a file, as a user would
            core.save_task(trained[name], base / f"{name}.safetensors")
            task = core.load_task(base / f"{name}.safetensors")
        losses[name] = []
        for denoiser in hosts.values():
            pictures = training.encode_folder(PICTURES, SIZE, denoiser.encode)
            kept = pictures.split(SHARE, config.seed)[1]
            prompts = training.prompts_for(denoiser, kept.prompts, words=words)
            losses[name].append(training.validation_loss(denoiser, kept, prompts, task))
        cells = " | ".join(f"{loss:.5f}" for loss in losses[name])
        print(f"| {name} | {seconds.get(name, 0):.0f} | {cells} |")
    ours, other = losses["ComfyUI"][0], losses["diffusers"][1]
    print(f"\ndifference of the two runs: {100 * abs(ours - other) / other:.3f} %")


if __name__ == "__main__":
    main()
