"""Trains the two bases of the methods benchmark: a transformer and a U-Net of equal size.

    python benchmarks/method_bases.py dit      # about half an hour on one core each
    python benchmarks/method_bases.py unet

Both are diffusers' own classes, class-conditional over the pocket base's words, trained on the same
latents by the same loop with the same seed: flow matching, x_t = (1 − t) x0 + t noise. What is kept
are the running means of the weights. Interrupted, a run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DModel
from method_sets import NULL, POCKET, ROOT, SHAPE, encoded, pictures
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from words import BASE_WORDS

from diffscaler_core.atomic import write_whole
from diffscaler_core.autoencoder import vae_decode
from diffscaler_core.pocket import load_vae
from diffscaler_core.training.checkpoints import optimizer_state, restore_optimizer
from diffscaler_core.training.objective import shifted
from diffscaler_core.training.preview import grid

WORK = ROOT / ".cache" / "methods"
PER_WORD, SEED, GUIDANCE, SHIFT = 192, 1, 2.0, 3.0


def dit(width: int = 192, layers: int = 6) -> DiTTransformer2DModel:
    """Returns an untrained transformer: patches of 2, 16 tokens."""
    return DiTTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        num_layers=layers,
        sample_size=SHAPE[1],
        patch_size=2,
        num_embeds_ada_norm=NULL,
    )


def unet(first: int = 64, second: int = 144) -> UNet2DModel:
    """Returns an untrained U-Net: residual blocks at 8×8 and 4×4, attention at 4×4."""
    return UNet2DModel(
        sample_size=SHAPE[1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        block_out_channels=(first, second),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL + 1,
        norm_num_groups=16,
        attention_head_dim=36,
    )


#: Name -> what makes it. "dit" and "unet" are the table's; the other is for the ablation of size.
BASES: dict[str, Callable[[], nn.Module]] = {
    "dit": dit,
    "unet": unet,
    "dit_small": lambda: dit(128, 4),
}


def load_base(name: str) -> nn.Module:
    """Returns a trained base, frozen; says which command trains it if it is not there."""
    path = WORK / f"{name}.safetensors"
    if not path.exists():
        sys.exit(f"no trained base {name!r}: run python benchmarks/method_bases.py {name}")
    model = BASES[name]()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sampled(model: nn.Module, labels: Tensor, seed: int, steps: int = 20) -> Tensor:
    """Returns latents (B, *SHAPE) of labels (B,), by Euler with guidance."""
    x = torch.randn(len(labels), *SHAPE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL)])
    for now, after in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1), SHIFT)):
        t = now.expand(len(both)) * 1000
        v, free = model(x.repeat(2, 1, 1, 1), timestep=t, class_labels=both).sample.chunk(2)
        x = x + (after - now) * (free + GUIDANCE * (v - free))
    return x


def _initialise(model: nn.Module) -> None:
    """Zero modulations and output, so that every block of the transformer starts as identity."""
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "proj_out_1", "proj_out_2", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _rate(step: int, steps: int, full: float) -> float:
    """Warm-up, flat, then a cosine over the last 60 %."""
    fall = max(0.0, step / steps - 0.4) / 0.6
    return full * min(1.0, (step + 1) / 200) * (0.01 + 0.495 * (1 + math.cos(math.pi * fall)))


def train(name: str, steps: int, batch: int, rate: float) -> None:
    """The loop."""
    torch.manual_seed(SEED)
    model, mean = BASES[name](), BASES[name]().requires_grad_(False)
    _initialise(model)
    mean.load_state_dict(model.state_dict())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    WORK.mkdir(parents=True, exist_ok=True)
    start = _resume(name, model, mean, optimizer)
    x0, began, seen = _latents(), time.monotonic(), []
    pairs = list(zip(mean.parameters(), model.parameters(), strict=True))
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        chosen = torch.randint(len(x0), (batch,), generator=generator)
        labels = chosen // PER_WORD
        labels = torch.where(torch.rand(batch, generator=generator) < 0.15, NULL, labels)
        t = torch.sigmoid(torch.randn(batch, generator=generator) + 0.3)
        noise = torch.randn(batch, *SHAPE, generator=generator)
        at, clean = t.view(-1, 1, 1, 1), x0[chosen].float()
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, rate)
        with torch.autocast("cpu", torch.bfloat16):
            noisy = (1 - at) * clean + at * noise
            velocity = model(noisy, timestep=t * 1000, class_labels=labels).sample
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_([m for m, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)
        seen.append(loss.item())
        if (step + 1) % 200 == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"{name} step {step + 1} loss {sum(seen[-200:]) / 200:.4f} {minutes:.1f} min")
            sys.stdout.flush()
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            _save(name, step + 1, model, mean, optimizer)
            show(mean, range(40), WORK / f"{name}.png")


def _save(
    name: str, step: int, model: nn.Module, mean: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Writes the base, and what training needs to go on."""
    write_whole(WORK / f"{name}.safetensors", save(mean.state_dict()))
    moments, facts = optimizer_state(optimizer)
    state = {f"model/{n}": t for n, t in model.state_dict().items()}
    state |= {f"optimizer/{n}": t for n, t in moments.items()}
    metadata = {"step": str(step), "optimizer": json.dumps(facts)}
    write_whole(WORK / f"{name}_training.safetensors", save(state, metadata))


def _resume(name: str, model: nn.Module, mean: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Puts back what `_save` wrote; returns the step to go on from, 0 if there is nothing."""
    path = WORK / f"{name}_training.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for key, tensor in state.items():
        kind, _, rest = key.partition("/")
        parts[kind][rest] = tensor
    model.load_state_dict(parts["model"])
    mean.load_state_dict(load_file(WORK / f"{name}.safetensors"))
    restore_optimizer(optimizer, parts["optimizer"], json.loads(facts["optimizer"]))
    return int(facts["step"])


def show(model: nn.Module, labels: Sequence[int], path: Path) -> None:
    """Draws one sample of each class."""
    model.eval()
    latents = sampled(model, torch.tensor(list(labels)), seed=0)
    grid(list(vae_decode(load_vae(POCKET))(latents)), 10).save(path)


def _latents() -> Tensor:
    """The base set's latents, word by word, float16, kept on disk."""
    path = WORK / "base_latents.safetensors"
    if not path.exists():
        x0 = encoded(pictures(BASE_WORDS, "plain", PER_WORD, SEED)).half().contiguous()
        write_whole(path, save({"x0": x0}))
    return load_file(path)["x0"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.base, args.steps, args.batch, args.lr)


if __name__ == "__main__":
    main()
