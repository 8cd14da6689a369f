"""The Triton kernel against its eager twin, in Triton's own interpreter: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from diffscaler_core import DiffScalerError, kernels

SCRIPT = """
import itertools, torch
from torch import nn
from diffscaler_core import attach, kernels, new_task
from diffscaler_core.forms import Form, apply_form, product_of
from diffscaler_core.kernels import finish, serves, use_kernels

def random(*shape, dtype):
    return torch.randn(*shape).to(dtype)

torch.manual_seed(0)
use_kernels()
for dtype, rows, places, rank, linear, gain, offset in itertools.product(
    (torch.float32, torch.bfloat16), (0, 3), (1, 2), (3, 8), *[(True, False)] * 3
):
    if not rows and places > 1:
        continue
    tokens, c_in, c_out, tasks = 70, 24, 100, 4
    batch = rows or 2
    lead = (rows,) if rows else ()
    form = Form(
        gain=random(*lead, c_out, dtype=dtype) * 0.1 + (dtype == torch.float32) if gain else None,
        offset=random(*lead, c_out, dtype=dtype) if offset else None,
        down=random(tasks, rank, c_in, dtype=dtype) if rows else random(rank, c_in, dtype=dtype),
        up=random(tasks, rank, c_out, dtype=dtype) if rows else random(c_out, rank, dtype=dtype),
        mask=random(rows, places * rank, dtype=dtype) if rows else random(rank, dtype=dtype),
        floor=None, linear=linear,
        chosen=torch.randint(0, tasks, (rows * places,)) if rows else None, rows=rows,
    )
    x, y = random(batch, tokens, c_in, dtype=dtype), random(batch, tokens, c_out, dtype=dtype)
    for masked in (True, False):
        assert serves(x, y, form)
        got = finish(product_of(x, form), y, form, masked)
        is_float = [isinstance(t, torch.Tensor) and t.is_floating_point() for t in form]
        wide = Form(*(t.float() if own else t for t, own in zip(form, is_float)))
        if gain and dtype != torch.float32:
            wide = wide._replace(gain=wide.gain + 1)
        want = apply_form(x.float(), y.float(), wide, masked=masked)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert got.dtype == dtype and got.shape == y.shape
        assert (got.float() - want).abs().max() <= tolerance * want.abs().max()

model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))
tasks = {}
for i, name in enumerate("ab"):
    task = new_task(model, rank=4, targets="all", name=name)
    filled = {n: {k: torch.randn_like(t) for k, t in o.items()} for n, o in task.layers.items()}
    tasks[name] = task.replace(layers=filled)
x = torch.randn(3, 5, 24)
with torch.no_grad(), attach(model, tasks) as a:
    for rows in (None, ["a", None, "b"]):
        a.set_weights({"a": 0.5, "b": 1.0})
        a.set_rows(rows)
        got = model(x)
        use_kernels(False)
        want = model(x)
        use_kernels()
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    base_row = model(x)[1]
a.remove()
assert torch.equal(base_row, model(x)[1])
print("all alike")
"""


def test_the_kernel_equals_its_twin():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "all alike" in run.stdout


def test_asking_for_kernels_without_triton_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(DiffScalerError, match="Triton"):
        kernels.use_kernels()
