"""docs/examples/serve_ray.py: a real Ray Serve with two replicas of the pocket base, over HTTP."""

import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
START, STOP = 300, 90  # seconds; a busy machine takes long to import torch twice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(
        not (ROOT / "assets/pocket/transformer/config.json").is_file(),
        reason="no pocket base in assets",
    ),
]


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.body))).astype(int)


class Client:
    """The server under test."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=30) as answer:
            return answer.read()

    def draw(self, body: Any) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps({"steps": 2, **body}).encode()
        request = urllib.request.Request(
            f"{self.address}/v1/pictures", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def draw_all(self, bodies: list[dict[str, Any]]) -> list[Answer]:
        """Sends all at once."""
        with ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(self.draw, bodies))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(text: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START
    while text not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.2)


def error_of(answer: Answer) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["error"]


def check_answers(client: Client) -> None:
    """A picture; and one line for all that can be wrong with a request."""
    assert client.get("/-/healthz") == b"success"
    assert {"ink", "neon"} <= set(json.loads(client.get("/v1/tasks"))["tasks"])
    drawn = client.draw({"prompt": "cat", "task": "ink"})
    assert (drawn.status, drawn.headers["content-type"]) == (200, "image/png")
    assert drawn.pixels.shape == (128, 128, 3)
    assert error_of(client.draw({"prompt": "cat", "task": "nowhere"})) == (
        404,
        "no task 'nowhere'; GET /v1/tasks lists them",
    )
    status, message = error_of(client.draw({"prompt": "unicorn"}))
    assert (status, message[:31]) == (422, "unknown word 'unicorn'; known: ")
    for wrong, where in ({"width": 4096}, "4096 x 128 pixels"), ({"sed": 1}, "sed: Extra inputs"):
        status, message = error_of(client.draw({"prompt": "cat", **wrong}))
        assert (status, message[: len(where)]) == (422, where)
    assert client.draw(b'{"prompt": "cat", "guidance": 1e999}').status == 422
    assert client.draw(b'{"prompt": ').status == 422


def check_mixed_batch(client: Client) -> None:
    """Different tasks in one batch, an unknown one beside them; each picture as if alone."""
    # the first name says where a request goes, so these meet
    tasks = [{"ink": 1.0}, {"ink": 0.5, "neon": 0.5}, {"ink": 0.0, "smileys": 1.0}, {"nowhere": 1}]
    bodies = [{"prompt": "dog", "task": t, "seed": 5} for t in tasks]
    *together, unknown = client.draw_all(bodies)
    assert unknown.status == 404
    assert {(a.status, a.headers["x-batch-rows"]) for a in together} == {(200, "3")}
    assert together[0].headers["x-batch-tasks"] == "3"
    for body, answer in zip(bodies, together, strict=False):
        alone = client.draw(body)
        assert alone.headers["x-batch-rows"] == "1"
        assert np.abs(alone.pixels - answer.pixels).max() <= 1
    assert np.abs(together[0].pixels - together[2].pixels).mean() > 2


def check_affinity(client: Client) -> None:
    """A task is always drawn by the same replica, so it is loaded once."""
    names = ["ink", "neon", "fruits", "smileys"]
    bodies = [{"prompt": "cat", "task": name, "seed": i} for i in range(4) for name in names]
    answers = client.draw_all(bodies)
    assert {answer.status for answer in answers} == {200}
    homes = {
        (body["task"], answer.headers["x-batch-replica"])
        for body, answer in zip(bodies, answers, strict=True)
    }
    assert len(homes) == len(names)
    again = client.draw_all(bodies[:4])
    assert {answer.headers["x-batch-misses"] for answer in again} == {"0"}


def check_metrics(port: int) -> None:
    """Prometheus finds the batches and the loaded tasks."""
    end = time.monotonic() + 30
    wanted = {"diffscaler_batch_rows_sum", "diffscaler_task_hits", "diffscaler_task_misses"}
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        missing = {name for name in wanted if f"ray_{name}" not in text}
        if not missing:
            return
        assert time.monotonic() < end, missing
        time.sleep(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in Ray's own use of pydantic
def test_options_come_from_a_config_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    build = import_module("serve_ray").build
    assert (
        type(build({"device": "cuda", "affinity": "true", "rows": "4"})).__name__ == "Application"
    )
    with pytest.raises(SystemExit):
        build({"rowz": "4"})


def test_the_server(tmp_path: Path) -> None:
    port, metrics, log = free_port(), free_port(), tmp_path / "log.txt"
    options = ["--min-replicas=2", "--max-replicas=2", "--cpus=0.5", "--affinity"]
    where = [f"--port={port}", f"--metrics-port={metrics}", "--patience=0.2"]
    with (
        # pytest's own folders are too deep for the sockets Ray puts there
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch,
        log.open("wb") as output,
    ):
        own = {
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": scratch,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_worker_niceness": "0",  # at Ray's 15 it would starve beside other tests
        }
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "docs/examples/serve_ray.py"), *options, *where],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
        )
        try:
            wait_for("serving on", process, log)
            client = Client(port)
            check_answers(client)
            check_mixed_batch(client)
            check_affinity(client)
            check_metrics(metrics)
            with ThreadPoolExecutor(1) as thread:
                drawing = thread.submit(client.draw, {"prompt": "cat", "task": "ink", "steps": 40})
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
                assert drawing.result().status == 200  # what is in the works is finished
            assert process.wait(timeout=STOP) == 0
        finally:
            process.terminate()
            process.wait(timeout=STOP)
