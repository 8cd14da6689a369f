"""What in-context control costs beside DiffScaler's: steps, parameters, memory.

    python benchmarks/in_context_cost.py [--shapes pocket sd3 flux] [--rounds 5] [--threads 1]

Steps, as ratios to the base: real widths and token counts with random weights and few blocks,
float32; variants take turns in random order, medians. Parameters, and what is kept from step to
step: full size, on the meta device. Prints Markdown tables for RESULTS.md.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from in_context import FORMS, InContext, targets_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffscaler_core import attach, new_task
from diffscaler_core.control import Control
from diffscaler_core.pocket import load_pipeline

POCKET = Path(__file__).resolve().parent.parent / "assets" / "pocket"
RANK, BLOCK_RANK, STEPS = 16, 8, 28
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
FLUX = {"guidance_embeds": True}

Inputs = dict[str, Tensor]


def sd3_inputs(model: Any, side: int, text: int, batch: int) -> Inputs:
    """Random arguments of a call for latents of side × side."""
    c = model.config
    return {
        "hidden_states": torch.randn(batch, c.in_channels, side, side),
        "encoder_hidden_states": torch.randn(batch, text, c.joint_attention_dim),
        "pooled_projections": torch.randn(batch, c.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0),
    }


def flux_inputs(model: Any, side: int, text: int, batch: int) -> Inputs:
    """The same for Flux: packed latents, and where each token stands."""
    c, half = model.config, side // 2
    ids = torch.zeros(half, half, 3)
    ids[..., 1], ids[..., 2] = torch.arange(half)[:, None], torch.arange(half)
    return {
        "hidden_states": torch.randn(batch, half * half, c.in_channels),
        "encoder_hidden_states": torch.randn(batch, text, c.joint_attention_dim),
        "pooled_projections": torch.randn(batch, c.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def pocket() -> tuple[str, nn.Module, Inputs, Tensor]:
    """The pocket base, with a batch of two as guidance makes it."""
    model = load_pipeline(POCKET).transformer
    inputs = sd3_inputs(model, 16, 4, 2)
    return "pocket base, 64 + 4 tokens, batch 2", model, inputs, torch.randn(1, 16, 16, 16)


def sd3() -> tuple[str, nn.Module, Inputs, Tensor]:
    """SD3-medium's width at 512 px, with 3 of its 24 blocks."""
    model = SD3Transformer2DModel(**{**SD3, "num_layers": 3})
    inputs = sd3_inputs(model, 64, 154, 1)
    return "SD3-medium, 3 blocks, 1024 + 154 tokens", model, inputs, torch.randn(1, 16, 64, 64)


def flux() -> tuple[str, nn.Module, Inputs, Tensor]:
    """Flux's width at 512 px, with one block of each kind."""
    model = FluxTransformer2DModel(**FLUX, num_layers=1, num_single_layers=1)
    inputs = flux_inputs(model, 64, 512, 1)
    return "Flux, 1 + 1 blocks, 1024 + 512 tokens", model, inputs, torch.randn(1, 16, 64, 64)


SHAPES = {"pocket": pocket, "sd3": sd3, "flux": flux}


def fill(parameters: list[nn.Parameter]) -> None:
    """Gives parameters values, as if trained: nothing that is 0 may save work."""
    for parameter in parameters:
        parameter.requires_grad_(False).normal_(0, 0.02)


class Variant(NamedTuple):
    """One way to run the model.

    Attributes:
        on: Puts it on the model; what it returns takes it off again.
        fresh: Whether the first call counts, with nothing kept from one before.
    """

    on: Callable[[], Callable[[], None]]
    fresh: bool = False


def variants(model: nn.Module, control: Tensor) -> dict[str, Variant]:
    """Returns what is measured, by name."""

    def ours() -> Callable[[], None]:
        attached = attach(model, new_task(model, rank=BLOCK_RANK, control="edges"))
        fill(list(attached.parameters()))
        attached.set_controls({"task": Control(control)})
        return attached.remove

    def in_context(**settings: Any) -> Callable[[], Callable[[], None]]:
        def on() -> Callable[[], None]:
            worn = InContext(model, RANK, **settings)
            fill(worn.parameters())
            worn.set_control(control)
            return worn.remove

        return on

    both = {"block_rank": BLOCK_RANK}
    return {
        "base": Variant(lambda: lambda: None),
        f"ours, rank {BLOCK_RANK}": Variant(ours),
        "in-context, first step": Variant(in_context(), fresh=True),
        "in-context, next steps": Variant(in_context()),
        "in-context, joint, next steps": Variant(in_context(combine="joint")),
        f"in-context + blocks of rank {BLOCK_RANK}, next steps": Variant(in_context(**both)),
    }


@torch.no_grad()
def measure(model: nn.Module, inputs: Inputs, variant: Variant) -> list[float]:
    """Returns the seconds of one call; of two, where a call before them does not count."""
    remove = variant.on()
    try:
        if not variant.fresh:  # what is kept from step to step is there already
            model(**inputs)
        return [timed(model, inputs) for _ in range(1 if variant.fresh else 2)]
    finally:
        remove()


def timed(model: nn.Module, inputs: Inputs) -> float:
    """Returns the seconds of one call."""
    started = time.perf_counter()
    model(**inputs)
    return time.perf_counter() - started


def steps_table(names: list[str], rounds: int) -> None:
    """Measures and prints."""
    for name in names:
        torch.manual_seed(0)
        title, model, inputs, control = SHAPES[name]()
        model.eval().requires_grad_(False)
        table = variants(model, control)
        taken: dict[str, list[float]] = {name: [] for name in table}
        for _ in range(rounds):
            for key in random.sample(list(table), len(table)):
                taken[key].extend(measure(model, inputs, table[key]))
        middle = {key: statistics.median(seconds) for key, seconds in taken.items()}
        print(f"\n{title}\n\n| variant | ms | ratio |\n|---|---|---|")
        for key, seconds in middle.items():
            print(f"| {key} | {1000 * seconds:.1f} | {seconds / middle['base']:.3f} |")
        first, later = middle["in-context, first step"], middle["in-context, next steps"]
        mean = (first + (STEPS - 1) * later) / STEPS / middle["base"]
        print(f"| in-context, mean of {STEPS} steps | | {mean:.3f} |", flush=True)


def parameters_table() -> None:
    """Counts and prints."""
    with torch.device("meta"):
        models = {name: full_size(name) for name in ("SD3-medium", "Flux-dev")}
    print("\n| base | method | parameters | of the base | kept at 512 px | at 1024 px |")
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        whole = sum(p.numel() for p in model.parameters())
        ours = new_task(model, rank=BLOCK_RANK, control="edges")
        blocks = new_task(model, rank=BLOCK_RANK).num_parameters
        lists = FORMS[type(model).__name__].lists
        count = sum(len(getattr(model, name)) for name in lists)
        gates = count * model.config.num_attention_heads
        counts = {f"ours, rank {BLOCK_RANK}": ours.num_parameters}
        for rank in (16, 64):
            own = new_task(model, rank=rank, targets=targets_of(model)).num_parameters
            counts[f"in-context, rank {rank}"] = own + gates
        counts[f"in-context, rank {RANK} + blocks of rank {BLOCK_RANK}"] = (
            counts[f"in-context, rank {RANK}"] + blocks
        )
        width = model.inner_dim
        for title, own in counts.items():
            # bf16: the embedded control, or K and V of every block
            layers = 2 * count if title.startswith("in-context") else 1
            kept = [layers * tokens * width * 2 / 2**20 for tokens in (1024, 4096)]
            sizes = " | ".join(f"{size:,.0f} MiB" for size in kept)
            print(f"| {name} | {title} | {own:,} | {100 * own / whole:.2f} % | {sizes} |")


def work_table() -> None:
    """Counts multiplications and additions of a step at full size, without time or noise.

    With LoRA's affiners in place of DiffScaler's: the same products, and no bias is read, which a
    model on the meta device has not. Ours is its block affiners: what its embedding adds is kept.
    """
    print("\n| base | tokens | variant | of the base's work |\n|---|---|---|---|")
    shapes = (("SD3-medium", 154, sd3_inputs), ("Flux-dev", 512, flux_inputs))
    for name, text, inputs_of in shapes:
        for side in (64, 128):
            with torch.device("meta"):
                model = full_size(name)
                inputs = inputs_of(model, side, text, 1)
                control = torch.randn(1, 16, side, side)
            base = work(model, inputs)
            lora = new_task(model, "lora", BLOCK_RANK)
            with attach(model, lora):
                counts = {f"ours, rank {BLOCK_RANK}": work(model, inputs)}
            worn = InContext(model, RANK, method="lora")
            fill(worn.parameters())
            worn.set_control(control)
            counts["in-context, first step"] = work(model, inputs)
            counts["in-context, next steps"] = work(model, inputs)
            worn.remove()
            worn = InContext(model, RANK, method="lora", combine="joint")
            fill(worn.parameters())
            worn.set_control(control)
            work(model, inputs)
            counts["in-context, joint, next steps"] = work(model, inputs)
            worn.remove()
            for title, count in counts.items():
                tokens = f"{side * side // 4} + {text}"
                print(f"| {name} | {tokens} | {title} | {count / base:.3f} |", flush=True)


@torch.no_grad()
def work(model: nn.Module, inputs: Inputs) -> int:
    """Returns the floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def full_size(name: str) -> Any:
    """Returns a base at its published size."""
    if name == "SD3-medium":
        return SD3Transformer2DModel(**SD3)
    return FluxTransformer2DModel(**FLUX)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["pocket", "sd3"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parameters_table()
    work_table()
    steps_table(args.shapes, args.rounds)
    print(f"\nwith: {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
