"""Sets that arrive one after another: what a base still knows of the earlier ones.

Tasks leave the base and each other alone, so nothing can be forgotten; that is checked bit by bit.
Full fine-tuning goes on from the weights it has, as somebody with one model must.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from method_runs import WORK, denoiser_of, kept, score, train, worn
from method_sets import NULL, SHAPE, UNCONDITIONAL
from method_table import METHODS
from torch import Tensor

from diffscaler_core import TaskAdapter
from diffscaler_core.training import Denoiser


@torch.no_grad()
def _output(denoiser: Denoiser, rows: int = 8) -> Tensor:
    """Returns what the base says of fixed noise, with whatever is on it."""
    x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(5))
    label = torch.full((rows,), NULL)
    return denoiser(x, torch.linspace(100, 900, rows), {"label": label})


def incremental(base: str, rate: float, full_rate: float) -> dict[str, Any]:
    """Returns the distances of every set after each arrival, from disk if they are there.

    Args:
        base: A name in BASES.
        rate: The tasks' learning rate.
        full_rate: That of full fine-tuning.
    """
    path = WORK / "incremental" / f"{base}.json"
    denoiser = denoiser_of(base)
    with denoiser.held():
        untouched = _output(denoiser)
    tasks: dict[str, TaskAdapter] = {}
    outputs: dict[str, Tensor] = {}
    found: dict[str, Any] = {"base": base, "tasks": {}, "full": {}}
    for name in UNCONDITIONAL:
        tasks[name], _ = train(denoiser, METHODS["ours_wide"], base, name, rate, 0)
        found["tasks"][name] = {}
        for seen, task in tasks.items():
            with worn(denoiser, task):
                output = _output(denoiser)
                if seen in outputs and not torch.equal(outputs[seen], output):
                    raise SystemExit(f"task {seen!r} changed when {name!r} was trained")
                outputs[seen] = output
                found["tasks"][name][seen] = score(denoiser, seen, 0)[0]["fd"]
        with denoiser.held():
            if not torch.equal(_output(denoiser), untouched):
                raise SystemExit(f"the base changed when {name!r} was trained")
        print(base, "tasks", name, found["tasks"][name], flush=True)
    found["one batch"] = _in_one_batch(denoiser, tasks, outputs)
    with contextlib.ExitStack() as tuned:
        for i, name in enumerate(UNCONDITIONAL):
            done, _ = train(denoiser, METHODS["full"], base, name, full_rate, 0)
            tuned.enter_context(done.on(denoiser))
            found["full"][name] = {
                seen: score(denoiser, seen, 0)[0]["fd"] for seen in UNCONDITIONAL[: i + 1]
            }
            print(base, "full", name, found["full"][name], flush=True)
    return kept(path, found)


def _in_one_batch(
    denoiser: Denoiser, tasks: dict[str, TaskAdapter], outputs: dict[str, Tensor]
) -> float:
    """Returns how far rows of all tasks in one batch are from each task's own batch, at most."""
    names = list(tasks)
    with denoiser.held(), denoiser.attached(tasks) as worn_tasks:
        rows = [names[i % len(names)] for i in range(8)]
        worn_tasks.set_rows(rows)  # type: ignore[attr-defined]
        mixed = _output(denoiser)
    gaps = [mixed[i] - outputs[name][i] for i, name in enumerate(rows)]
    return max(float(gap.abs().max()) for gap in gaps)
