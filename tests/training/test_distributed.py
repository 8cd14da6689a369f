"""Real processes, started as users start them, give the numbers of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from diffscaler_core import load_task

from . import distributed_run
from .runs import farthest


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What two processes made, of every kind, in one launch."""
    out = tmp_path_factory.mktemp("two")
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu",
        "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        "--main_process_port=0", distributed_run.__file__, str(out),
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed_run.KINDS)
def test_two_processes_equal_one(launched, tmp_path, kind):
    distributed_run.run(kind, tmp_path, None)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == (["one.safetensors", "two.safetensors"] if kind == "several" else files[:1])
    for file in files:
        together, alone = load_task(launched / kind / file), load_task(tmp_path / file)
        assert farthest(together, alone) < 1e-5
        for fact in ("loss", "validation_loss", "best_step"):
            told = together.info["training"][fact]
            assert told == pytest.approx(alone.info["training"][fact], abs=1e-4)
    saved = sorted(p.name for p in (launched / kind / "run" / "checkpoints").iterdir())
    assert saved == ["step-000000002.safetensors", "step-000000004.safetensors"]
