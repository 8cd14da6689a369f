"""Two forms of "every row its own task" on one Linear: dense, and gathered by row.

    python benchmarks/row_forms.py [--device cuda] [--dtype bfloat16] [--rounds 15]

Dense: the hidden units of all K tasks for every row, masked; one wide product down, one up, which
adds into the sum. Gathered, as `diffscaler_core.forms` does it: each row's own D and U, a batched
product down, one up; K does not enter. Both with the frozen layer, and checked to be equal first.
One number varies at a time around a layer of DiT-S/2. Prints a Markdown table for RESULTS.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Turns, take_turns

from diffscaler_core.affiner import Affiner
from diffscaler_core.forms import Factors, Form, apply_form, joined, stacked

BASE, ONE, DENSE, GATHERED = "layer", "one task", "dense", "gathered"


class Case(NamedTuple):
    """A layer and its batch.

    Attributes:
        batch: B rows.
        tasks: K tasks; row i runs task i % K.
        tokens: Of one row.
        width: C_in.
        out: C_out.
        rank: Of each task.
    """

    batch: int = 8
    tasks: int = 8
    tokens: int = 256
    width: int = 384
    out: int = 384
    rank: int = 8


#: What varies, one at a time.
SERIES = {
    "tasks": [Case(tasks=k) for k in (1, 2, 4, 8, 16, 64)],
    "rows": [Case(batch=b, tasks=b) for b in (2, 4, 16)],
    "tokens": [Case(tokens=n) for n in (1, 16, 64, 1024)],
    "width": [Case(width=w, out=o) for w, o in ((192, 192), (384, 1536), (1536, 384))],
    "width, larger": [Case(4, 4, width=w, out=o) for w, o in ((1152, 1152), (1536, 6144))],
    "rank": [Case(rank=r) for r in (2, 4, 16, 32)],
}


def forms(case: Case, device: str, dtype: torch.dtype) -> dict[str, Form]:
    """Returns the same tasks in both forms, and the first task alone for all rows."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    affiners = [
        Affiner(noise(out), noise(out), noise(case.rank, case.width), noise(out, case.rank))
        for out in [case.out] * case.tasks
    ]
    chosen = torch.arange(case.batch) % case.tasks
    wide = dtype in (torch.float32, torch.float64)
    scales = torch.stack([a.scale.detach() for a in affiners if a.scale is not None]) + float(wide)
    shifts = torch.stack([a.shift.detach() for a in affiners if a.shift is not None])
    mask = F.one_hot(chosen, case.tasks).repeat_interleave(case.rank, dim=1)

    def form(
        factors: Factors | None, rows: Tensor | int, mask: Tensor | None, chosen: Tensor | None
    ) -> Form:
        assert factors is not None
        factors = factors.to(torch.device(device), dtype)

        def put(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, dtype if t.is_floating_point() else None)

        return Form(
            gain=put(scales[rows]),
            offset=put(shifts[rows]),
            down=factors.down,
            up=factors.up,
            mask=put(mask),
            floor=None,
            linear=False,
            chosen=put(chosen),
            rows=case.batch if isinstance(rows, Tensor) else 0,
        )

    return {
        ONE: form(joined(affiners[:1]), 0, None, None),
        DENSE: form(joined(affiners), chosen, mask.float(), None)._replace(
            gain=(scales[chosen] + float(not wide)).to(device, dtype)
        ),
        GATHERED: form(stacked(affiners), chosen, None, chosen),
    }


def dense(x: Tensor, y: Tensor, form: Form) -> Tensor:
    """Returns y corrected by all tasks' hidden units, each row's own left over by the mask."""
    assert form.down is not None
    assert form.up is not None
    assert form.mask is not None
    assert form.gain is not None
    assert form.offset is not None
    hidden = F.linear(x, form.down).relu_().mul_(form.mask.unsqueeze(1))
    total = torch.addcmul(form.offset.unsqueeze(1), y, form.gain.unsqueeze(1))
    total.flatten(0, 1).addmm_(hidden.flatten(0, 1), form.up.T)
    return total


def time_case(case: Case, device: str, dtype: torch.dtype, rounds: int) -> Turns:
    """Returns the times of the layer alone and of the layer with each form.

    Raises:
        SystemExit: The forms do not say the same.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = ((case.batch, case.tokens, case.width), (case.out, case.width), (case.out,))
    x, weight, bias = (
        (torch.randn(shape, generator=generator) * 0.1).to(device, dtype) for shape in shapes
    )

    def layer() -> Tensor:
        return F.linear(x, weight, bias)

    def adapted(form: Form) -> Tensor:
        return apply_form(x, layer(), form, masked=False)

    known = forms(case, device, dtype)
    calls: dict[str, Callable[[], Tensor]] = {BASE: layer}
    calls |= {name: partial(adapted, form) for name, form in known.items()}
    calls[DENSE] = lambda: dense(x, layer(), known[DENSE])
    error = float((calls[DENSE]() - calls[GATHERED]()).abs().max())
    if error > (1e-4 if dtype == torch.float32 else 3e-2):
        raise SystemExit(f"{case}: dense and gathered differ by {error:.2g}")
    return take_turns(calls, device, rounds, calls=3)


@torch.no_grad()
def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"{args.device}, {args.dtype}; ratios to the layer, median of {args.rounds} rounds\n")
    print(
        "| varies | B | K | tokens | C_in → C_out | rank | layer, ms | one task for all rows | "
        "dense | gathered | gathered / dense |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for varies, cases in SERIES.items():
        for case in cases:
            turns = time_case(case, args.device, dtype, args.rounds)
            medians = {n: turns.ratio(n, BASE).median for n in (ONE, DENSE, GATHERED)}
            better = turns.ratio(GATHERED, DENSE).median
            print(
                f"| {varies} | {case.batch} | {case.tasks} | {case.tokens} | "
                f"{case.width} → {case.out} | {case.rank} | {1000 * turns.fastest(BASE):.3f} | "
                f"{medians[ONE]:.3f} | {medians[DENSE]:.3f} | {medians[GATHERED]:.3f} | "
                f"{better:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
