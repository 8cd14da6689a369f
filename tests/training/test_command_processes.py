"""`diffscaler train` in processes of its own: ended by a signal, and launched twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

from diffscaler_core import load_task
from diffscaler_core.training.checkpoints import newest_checkpoint
from diffscaler_core.training.run_folder import read_log

pytestmark = pytest.mark.slow
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"


def test_sigterm_leaves_a_checkpoint_and_exit_code_143(pictures, tmp_path):
    """A real process, on the base in `assets`: what a cluster does to a run it moves elsewhere."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "diffscaler_core.cli", "train", "--base", POCKET]
    command += ["--data", pictures, "--folder", folder, "--name", "x", "--batch", 1, "--rank", 1]
    command += ["--steps", 100000, "--save-every", 0, "--size", 32, "--prompts", "learned"]
    with subprocess.Popen(list(map(str, command)), env=ENV, stderr=subprocess.PIPE) as process:
        while not (folder / "config.toml").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 143, error
    assert "the same command goes on" in error
    assert "Traceback" not in error
    kept = newest_checkpoint(folder / "checkpoints")
    assert kept.step > 0
    assert not list(folder.glob("*.safetensors"))


def test_only_the_main_process_of_a_launch_writes(pictures, words_file, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys\n"
        "print('process', os.environ.get('RANK'), 'of', os.environ.get('WORLD_SIZE'))\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from bases import sd3_pipe\n"
        "from diffscaler_core.training import as_denoiser\n"
        "from diffscaler_core.training.command import train as command\n"
        "command.load_base = lambda *a: as_denoiser(sd3_pipe())\n"
        "from diffscaler_core.commands import app\n"
        "app()\n"
    )
    out = tmp_path / "t.safetensors"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command += ["--main_process_port", 0, script, "train", "--base", tmp_path, "--data", pictures]
    command += ["--out", out, "--steps", 2, "--batch", 4, "--rank", 2, "--size", 16]
    command += ["--words", words_file, "--sample-steps", 2, "--device", "cpu"]
    env = {**ENV, "ACCELERATE_USE_CPU": "true"}  # its own --cpu starts one process only
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # both write to one pipe, so that their lines may run into each other
    assert all(f"{rank} of 2" in done.stdout for rank in range(2))
    assert done.stderr.count("2 of 2 steps") == 1
    assert load_task(out).info["training"]["steps_done"] == 2
    assert [line["step"] for line in read_log(tmp_path / "t" / "log.jsonl")] == [1, 2]
