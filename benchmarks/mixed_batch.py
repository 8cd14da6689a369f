"""A batch in which every row runs a task of its own, beside what else serves many tasks.

    python benchmarks/mixed_batch.py [--tasks 8] [--model S|B|XL] [--blocks 6] [--device cuda]
        [--dtype bfloat16] [--rank 8] [--compile] [--mode default] [--rounds 9]

diffusers' DiT class with random weights, 256 tokens, as many rows as tasks; rank 8 on attention's
and feed-forward's six Linears and the modulation's one of every block (DiT-S/2: 84). "One by one"
is a call with a batch of 1 per task; with `--compile` what is not one call is left out. Before
anything is timed, every row of ours must equal its own task's run. Variants take turns in random
order; peft is needed. Prints Markdown tables for RESULTS.md: all variants, and ours mixed against
its goals.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dit import SIZES, base_model, inputs_of
from torch import Tensor, nn
from turns import take_turns
from variants import Call, compiled, peft_lora, random_task, shared_copy

from diffscaler_core import Attachment, attach

#: The timestep's own layers, which every block of this class has and the published model has once.
EXCLUDE = r".*\.norm1\.emb\..*"
BASE, ONE, MIXED = "frozen base", "ours, one task for all rows", "ours, a task per row"
LORA_ONE, LORA_MIXED = "ours (method lora), one task", "ours (method lora), a task per row"
PEFT_ONE, PEFT_MIXED = "PEFT LoRA, one adapter", "PEFT LoRA, `adapter_names`, one per row"


class Bench:
    """Every variant, made ready.

    Args:
        model: The base.
        inputs: Arguments of a call of as many rows as tasks.
        rank: Of every task.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], rank: int) -> None:
        self.inputs = inputs
        self.names = [f"task{i}" for i in range(len(inputs["class_labels"]))]
        self.models: dict[str, nn.Module] = {}
        self.calls: dict[str, Call] = {}
        self.attached: dict[str, Attachment] = {}
        self._add(BASE, shared_copy(model))
        for method, one, mixed in (("diffscaler", ONE, MIXED), ("lora", LORA_ONE, LORA_MIXED)):
            tasks = {
                name: random_task(model, method, rank, seed=i, exclude=EXCLUDE)
                for i, name in enumerate(self.names)
            }
            for variant in (one, mixed):
                copied = shared_copy(model)
                self.attached[variant] = attach(copied, tasks).to(copied.device)
                self._add(variant, copied)
            self.attached[one].set_weights({self.names[0]: 1.0})
            self.attached[mixed].set_rows(self.names)
        self.layers = [layer.removeprefix("transformer.") for layer in tasks[self.names[0]].layers]
        self.peft = peft_lora(model, self.layers, rank, len(self.names))
        self._add(PEFT_ONE, self.peft)

    def _add(self, name: str, model: nn.Module) -> None:
        self.models[name] = model
        self.calls[name] = partial(_output, model, self.inputs)

    def many_calls(self) -> None:
        """Adds what is more than one call of one model, or a call of PEFT's that hangs up hooks."""
        rows = [{k: v[i : i + 1] for k, v in self.inputs.items()} for i in range(len(self.names))]
        model = self.models[ONE]

        def ours() -> Tensor:
            for name, row in zip(self.names, rows, strict=True):
                self.attached[ONE].set_weights({name: 1.0})
                answer = _output(model, row)
            self.attached[ONE].set_weights({self.names[0]: 1.0})
            return answer

        def theirs() -> Tensor:
            for name, row in zip(self.names, rows, strict=True):
                self.peft.set_adapter(name)
                answer = _output(self.peft, row)
            self.peft.set_adapter(self.names[0])
            return answer

        self.calls[PEFT_MIXED] = partial(
            _output, self.peft, self.inputs, adapter_names=list(self.names)
        )
        self.calls["ours, one by one, `set_weights`"] = ours
        self.calls["PEFT LoRA, one by one, `set_adapter`"] = theirs

    def check(self) -> None:
        """Compares every row of ours with a run of its own task alone.

        Raises:
            SystemExit: A row is another's.
        """
        for one, mixed in ((ONE, MIXED), (LORA_ONE, LORA_MIXED)):
            together = self.calls[mixed]()
            effect = float((together - self.calls[BASE]()).abs().max())
            for i, name in enumerate(self.names):
                self.attached[one].set_weights({name: 1.0})
                error = float((self.calls[one]()[i] - together[i]).abs().max())
                if error > 0.02 * effect:
                    raise SystemExit(f"row {i} differs from {name!r} alone by {error:.2g}")
            self.attached[one].set_weights({self.names[0]: 1.0})


def _output(model: Callable[..., Any], inputs: dict[str, Tensor], **options: Any) -> Tensor:
    return model(**inputs, **options, return_dict=False)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--model", default="S", choices=SIZES)
    parser.add_argument("--blocks", type=int, help="fewer than published, for a CPU")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true", help="the variants that are one call")
    parser.add_argument("--mode", default="default", help="torch.compile's")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = base_model(args.device, args.model, args.blocks)
    if dtype != torch.float32:
        model.to(dtype)
    bench = Bench(model, inputs_of(args.tasks, args.device, dtype), args.rank)
    bench.check()
    if args.compile:
        compiled(bench.models, bench.calls, args.mode)
    else:
        bench.many_calls()
    turns = take_turns(bench.calls, args.device, args.rounds)
    print(turns.table(BASE), end="\n\n")
    print(
        turns.goals(
            (MIXED, BASE, "≤ 1.15"),
            (MIXED, ONE, "≤ 1.11: 0.9 of the throughput"),
            (PEFT_MIXED, BASE, ""),
        )
    )
    print(
        f"\nDiT-{args.model}/2, {len(model.transformer_blocks)} blocks, batch {args.tasks}, "
        f"{args.dtype}{', compiled' if args.compile else ''}; {len(bench.layers)} layers, "
        f"rank {args.rank}, {args.tasks} tasks"
    )


if __name__ == "__main__":
    main()
