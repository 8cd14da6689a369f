"""What a training step costs, as ratios to full fine-tuning measured in the same run.

    python benchmarks/training_step.py [--model S|B|XL] [--device cuda] [--rounds 7] [--batch 8]

DiT of diffusers' own class with random weights, float32, 256 tokens, adapters of rank 16 on the
attention's and feed-forward's six Linears of every block. Variants take turns in random order, so
that a noisy machine hurts all alike; the fastest of each counts, after one round to warm up. On a
CPU the time is the processor's, not the wall's, as other programs may take turns. "kept" is what
autograd keeps between forward and backward (each storage once, parameters not counted); it is the
same every time. Needs peft for its LoRA. Prints a Markdown table for RESULTS.md.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from dit import SIZES, base_model
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffscaler_core import attach, new_task

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@dataclass
class Variant:
    """One way to train: a model of its own and what is trained in it.

    Attributes:
        model: The model.
        parameters: What is trained; empty for the frozen model, which runs forward only.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        """Gives it the usual optimiser."""
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)


def ours(size: str, device: str, method: str, checkpointing: bool = False) -> Variant:
    """Returns a variant with one of our methods attached."""
    model = base_model(device, size)
    if checkpointing:
        model.enable_gradient_checkpointing()
    attachment = attach(model, new_task(model, method, RANK, targets=TARGETS)).to(device)
    return Variant(model, list(attachment.requires_grad_().parameters()))


def full(size: str, device: str) -> Variant:
    """Returns the variant that trains every parameter."""
    model = base_model(device, size).requires_grad_(True)
    return Variant(model, list(model.parameters()))


def peft_lora(size: str, device: str) -> Variant:
    """Returns PEFT's LoRA on the same layers."""
    model = base_model(device, size)
    layers = "|".join(name.replace(".", r"\.") for name in TARGETS)
    config = LoraConfig(r=RANK, target_modules=rf"transformer_blocks\..*({layers})")
    inject_adapter_in_model(config, model)
    model.to(device)
    return Variant(model, [p for p in model.parameters() if p.requires_grad])


VARIANTS: dict[str, Callable[[str, str], Variant]] = {
    "frozen, forward only": lambda size, device: Variant(base_model(device, size), []),
    "full fine-tuning": full,
    "bitfit": lambda size, device: ours(size, device, "bitfit"),
    "scale_shift": lambda size, device: ours(size, device, "scale_shift"),
    "PEFT LoRA, rank 16": peft_lora,
    "diffscaler, rank 16": lambda size, device: ours(size, device, "diffscaler"),
    "lora, rank 16": lambda size, device: ours(size, device, "lora"),
    "diffscaler, rank 16, checkpointing": lambda size, device: ours(
        size, device, "diffscaler", checkpointing=True
    ),
}


def seconds(call: Callable[[], object], device: str) -> float:
    """Returns the time of one call: the wall's on a GPU, the processor's on a CPU."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def gradients(variant: Variant, inputs: dict[str, Tensor]) -> None:
    """Runs forward and backward, or the frozen model's forward."""
    if not variant.parameters:
        with torch.no_grad():
            variant.model(**inputs)
        return
    for parameter in variant.parameters:
        parameter.grad = None
    variant.model(**inputs).sample.square().mean().backward()


def kept(variant: Variant, inputs: dict[str, Tensor]) -> int:
    """Returns the bytes of activations that autograd keeps for the backward."""
    if not variant.parameters:
        return 0
    own = [*variant.model.parameters(), *variant.model.buffers(), *variant.parameters]
    known = {t.untyped_storage().data_ptr() for t in own}
    held: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage
        return t.detach()  # an output that packs itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = variant.model(**inputs).sample
    del output
    return sum(storage.nbytes() for storage in held.values())


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="S", choices=SIZES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    inputs = {
        "hidden_states": torch.randn(args.batch, 4, 32, 32, device=args.device),
        "timestep": torch.full((args.batch,), 500, device=args.device),
        "class_labels": torch.arange(args.batch, device=args.device),
    }
    table = {name: build(args.model, args.device) for name, build in VARIANTS.items()}
    mebibytes = {name: kept(variant, inputs) / 2**20 for name, variant in table.items()}
    passes = dict.fromkeys(table, float("inf"))
    steps = dict.fromkeys(table, float("inf"))
    for turn in range(args.rounds + 1):
        for name in random.sample(list(table), len(table)):
            variant = table[name]
            one = seconds(lambda v=variant: gradients(v, inputs), args.device)
            step = variant.optimizer.step if variant.optimizer is not None else lambda: None
            two = one + seconds(step, args.device)
            if turn:
                passes[name] = min(passes[name], one)
                steps[name] = min(steps[name], two)
    whole, whole_step = passes["full fine-tuning"], steps["full fine-tuning"]
    print("| variant | trained | ms | ratio | with AdamW, ratio | kept, MiB |")
    print("|---|---|---|---|---|---|")
    for name, variant in table.items():
        count = sum(p.numel() for p in variant.parameters)
        ratio = f"{steps[name] / whole_step:.3f}" if variant.parameters else "–"
        print(
            f"| {name} | {count:,} | {1000 * passes[name]:.1f} | {passes[name] / whole:.3f} | "
            f"{ratio} | {mebibytes[name]:.0f} |"
        )


if __name__ == "__main__":
    main()
