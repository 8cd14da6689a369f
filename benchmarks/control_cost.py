"""What a control costs: parameters at full size, and time of a model call, against a ControlNet.

    python benchmarks/control_cost.py [--device cuda] [--rounds 7] [--bases dit sd3 flux]

Parameters are counted on the meta device at the published sizes. Times are of the same widths and
tokens at reduced depth (random weights), of one call with a control in force, after the first,
which embeds the picture. Every Linear of every block is adapted; the rank is the largest that keeps
parameters below 1.1 % of the base. Variants take turns in random order; the fastest call of each
counts. Prints a Markdown table for RESULTS.md.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from turns import measure

from diffscaler_core import TaskAdapter, attach, new_task
from diffscaler_core.control import Control

LARGEST = 0.011


@dataclass(frozen=True)
class Base:
    """One base.

    Attributes:
        title: Its name.
        make: Depth (None: the published one) -> the model.
        depth: The depth that is timed.
        inputs: (batch, device) -> arguments of a call.
        latents: (C, h, w) of a picture.
        batch: Pictures in a call.
    """

    title: str
    make: Callable[[int | None], nn.Module]
    depth: int
    inputs: Callable[[int, str], dict[str, Any]]
    latents: tuple[int, int, int]
    batch: int


def _dit(depth: int | None) -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
        num_layers=28 if depth is None else depth, sample_size=32, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip


def _sd3(depth: int | None) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24 if depth is None else depth,
        attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=192,
    )  # fmt: skip


def _flux(depth: int | None) -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=19 if depth is None else depth, num_single_layers=38 if depth is None else depth,
        guidance_embeds=True,
    )  # fmt: skip


def _dit_inputs(batch: int, device: str) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 32, 32, device=device),
        "timestep": torch.full((batch,), 500, device=device),
        "class_labels": torch.arange(batch, device=device),
    }


def _sd3_inputs(batch: int, device: str) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 64, 64, device=device),
        "timestep": torch.full((batch,), 500.0, device=device),
        "encoder_hidden_states": torch.randn(batch, 154, 4096, device=device),
        "pooled_projections": torch.randn(batch, 2048, device=device),
    }


def _flux_inputs(batch: int, device: str) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
    return {
        "hidden_states": torch.randn(batch, 1024, 64, device=device),
        "timestep": torch.full((batch,), 0.5, device=device),
        "guidance": torch.full((batch,), 3.5, device=device),
        "pooled_projections": torch.randn(batch, 768, device=device),
        "encoder_hidden_states": torch.randn(batch, 256, 4096, device=device),
        "img_ids": ids.to(device),
        "txt_ids": torch.zeros(256, 3, device=device),
    }


BASES = {
    "dit": Base("DiT-XL/2, 256 tokens", _dit, 6, _dit_inputs, (4, 32, 32), 4),
    "sd3": Base("SD3-medium, 1024 + 154 tokens", _sd3, 3, _sd3_inputs, (16, 64, 64), 1),
    "flux": Base("FLUX.1-dev, 1024 + 256 tokens", _flux, 1, _flux_inputs, (16, 64, 64), 1),
}


def count(model: nn.Module) -> int:
    """Returns how many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def largest_rank(base: Base) -> tuple[int, TaskAdapter, int, int]:
    """Returns (rank, task, the base's parameters, the control affiner's) at full size."""
    with torch.device("meta"):
        model = base.make(None)
    size = count(model)
    for rank in (16, 12, 8, 6, 4, 3, 2):
        task = new_task(model, rank=rank, control="edges")
        if task.num_parameters <= LARGEST * size:
            own = sum(t.numel() for t in task.extras.values())
            return rank, task, size, own
    raise SystemExit(f"no rank keeps {base.title} below {LARGEST:.1%}")


def filled(task: TaskAdapter) -> TaskAdapter:
    """Returns the task with numbers in all its parts."""
    generator = torch.Generator().manual_seed(0)

    def random_(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator) * 0.02

    layers = {n: {p: random_(t) for p, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers, extras={n: random_(t) for n, t in task.extras.items()})


def controlnet(base: Base) -> int | None:
    """Returns the parameters at full size of the base's usual ControlNet; None if it has none."""
    from diffusers import FluxControlNetModel, SD3ControlNetModel

    with torch.device("meta"):
        full = base.make(None)
        if isinstance(full, SD3Transformer2DModel):
            config = {**dict(full.config), "num_layers": full.config.num_layers // 2}
            config = {k: v for k, v in config.items() if not k.startswith("_")}
            return count(SD3ControlNetModel(**config, extra_conditioning_channels=0))
        if isinstance(full, FluxTransformer2DModel):
            return count(FluxControlNetModel(num_layers=5, num_single_layers=10))
    return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    args = parser.parse_args()
    print(
        "| base | rank | added | of the base | control affiner alone | a ControlNet | "
        "call: block affiners | call: with control |\n|---|---|---|---|---|---|---|---|"
    )
    for name in args.bases:
        print(row(BASES[name], args.device, args.rounds), flush=True)


@torch.no_grad()
def row(base: Base, device: str, rounds: int) -> str:
    """Returns one base's line of the table."""
    rank, task, size, own = largest_rank(base)
    torch.manual_seed(0)
    model = base.make(base.depth).to(device).eval().requires_grad_(False)
    short = filled(new_task(model, rank=rank, control="edges"))
    plain = short.replace(extras={}).with_info(control=None)
    inputs = base.inputs(base.batch, device)
    control = Control(torch.randn(1, *base.latents, device=device))

    def controlled() -> AbstractContextManager[object]:
        attachment = attach(model, short)
        attachment.set_controls({short.name: control})
        return attachment

    table: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "base": nullcontext,
        "blocks": lambda: attach(model, plain),
        "control": controlled,
    }
    best = dict.fromkeys(table, float("inf"))
    for _ in range(rounds):
        for variant in random.sample(list(table), len(table)):
            with table[variant]():
                model(**inputs)  # folds the affiners, embeds the control
                for _ in range(2):
                    best[variant] = min(best[variant], measure(lambda: model(**inputs), device))
    net = controlnet(base)
    return (
        f"| {base.title} | {rank} | {task.num_parameters / 1e6:.2f} M | "
        f"{task.num_parameters / size:.2%} of {size / 1e9:.2f} B | {own / 1e6:.3f} M | "
        f"{'–' if net is None else f'{net / 1e6:,.0f} M'} | "
        f"×{best['blocks'] / best['base']:.3f} | ×{best['control'] / best['base']:.3f} |"
    )


if __name__ == "__main__":
    main()
