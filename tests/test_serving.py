"""docs/examples/serving: which requests share a batch, what a batch draws. All without Ray."""

import asyncio
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffscaler_core import load_task, new_task, save_task

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "assets" / "pocket"
TASKS = POCKET / "diffscaler"
CLOSE = 1  # of 255: a batch's sums may round differently from those of a single picture

pytestmark = pytest.mark.skipif(
    not (TASKS / "words.safetensors").is_file(), reason="no pocket base in assets"
)


@pytest.fixture(scope="module")
def serving() -> Iterator[SimpleNamespace]:
    """The modules of docs/examples/serving, as the server imports them."""
    sys.modules["comfy_launch"].prepare()  # before diffusers: see tests/diffusers/conftest.py
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs" / "examples")
        names = ("batching", "painter", "requests", "tasks")
        yield SimpleNamespace(**{name: import_module(f"serving.{name}") for name in names})


@pytest.fixture
def ask(serving: SimpleNamespace) -> Callable[..., Any]:
    """A small request: `ask("cat", "ink", seed=1)`."""

    def make(prompt: str, task: Any = None, **settings: Any) -> Any:
        tasks = serving.requests.tasks_of(task)
        return serving.requests.PictureRequest(prompt, tasks, **{"steps": 2, **settings})

    return make


@pytest.fixture
def painter(serving: SimpleNamespace) -> Any:
    return serving.painter.Painter(POCKET, TASKS)


def key_of(request: Any) -> Any:
    return request.batch_key


def test_a_batch_takes_what_can_be_mixed_the_oldest_first(
    serving: SimpleNamespace, ask: Callable[..., Any]
) -> None:
    waiting = [
        ask("cat", "ink", steps=4),
        ask("dog", "ink"),
        ask("fox", {"ink": 0.5, "neon": 0.5}, seed=3, steps=4),
        ask("pig", steps=4),
        ask("owl", "ink", steps=4),
        ask("fish", "neon", steps=4, guidance=1.0),
        ask("bear", "neon", steps=4, width=64),
        ask("lion", "neon", steps=4, height=64),
    ]

    def drawn(key: Callable[[Any], Any], most: int = 8) -> list[str]:
        return [r.prompt for r in serving.batching.next_batch(waiting, key, most)]

    assert drawn(key_of) == ["cat", "fox", "pig", "owl"]
    assert drawn(key_of, most=3) == ["cat", "fox", "pig"]
    assert drawn(lambda request: request.task_key) == ["cat", "owl"]


class Steps:
    """Runs a Batcher whose batches last until they are let go, and remembers them."""

    def __init__(self, serving: SimpleNamespace, most: int = 3, patience: float = 0.0) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Semaphore(0)  # a pass for each batch that may end
        self.batcher = serving.batching.Batcher(self._run, lambda r: r[0], most, patience)

    def _run(self, batch: list[Any]) -> list[Any]:
        self.batches.append(batch)
        assert self.gate.acquire(timeout=10)
        if any(name == "all fail" for _, name in batch):
            raise RuntimeError("the device is lost")
        return [ValueError(name) if name == "bad" else name.upper() for _, name in batch]

    def submit(self, *names: str, key: int = 0) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(self.batcher.submit((key, name))) for name in names]


def test_those_who_wait_while_the_model_is_busy_ride_together(serving: SimpleNamespace) -> None:
    async def scenario() -> None:
        steps = Steps(serving)
        first = steps.submit("a")
        await asyncio.sleep(0.05)  # "a" is being drawn now
        rest = steps.submit("b", "c", "d", "e") + steps.submit("x", key=1)
        await asyncio.sleep(0.05)
        steps.gate.release(4)
        answers = await asyncio.gather(*first, *rest)
        assert [name for name, _ in answers] == ["A", "B", "C", "D", "E", "X"]
        assert [[name for _, name in batch] for batch in steps.batches] == [
            ["a"],
            ["b", "c", "d"],
            ["e"],
            ["x"],
        ]
        assert answers[0][1] < 0.05 <= answers[1][1]  # how long each waited
        await steps.batcher.close()

    asyncio.run(scenario())


def test_a_free_model_waits_for_more_only_as_long_as_it_was_told(serving: SimpleNamespace) -> None:
    async def scenario() -> None:
        steps = Steps(serving, most=3, patience=0.3)
        steps.gate.release(2)
        start = time.perf_counter()
        full = steps.submit("a", "b")
        await asyncio.sleep(0.05)
        full += steps.submit("c")
        await asyncio.gather(*full)
        assert time.perf_counter() - start < 0.25  # full, so nobody waited on
        assert len(steps.batches) == 1
        start = time.perf_counter()
        await asyncio.gather(*steps.submit("d"))
        assert time.perf_counter() - start >= 0.3
        await steps.batcher.close()

    asyncio.run(scenario())


def test_an_error_reaches_its_own_request_and_a_lost_batch_all_of_its(
    serving: SimpleNamespace,
) -> None:
    async def scenario() -> None:
        steps = Steps(serving, most=2)
        steps.gate.release(3)
        tasks = steps.submit("good", "bad", "all fail", "good")
        good, bad, *lost = await asyncio.gather(*tasks, return_exceptions=True)
        assert good[0] == "GOOD"
        assert isinstance(bad, ValueError)
        assert all(isinstance(error, RuntimeError) for error in lost)
        assert (await steps.submit("again")[0])[0] == "AGAIN"  # the queue goes on
        await steps.batcher.close()

    asyncio.run(scenario())


def test_a_request_whose_client_left_takes_no_row(serving: SimpleNamespace) -> None:
    async def scenario() -> None:
        steps = Steps(serving)
        first = steps.submit("a")
        await asyncio.sleep(0.05)
        gone, stays = steps.submit("gone", "stays")
        await asyncio.sleep(0.02)
        gone.cancel()
        first[0].cancel()  # in the middle of its batch
        steps.gate.release(2)
        assert (await stays)[0] == "STAYS"
        assert [[name for _, name in batch] for batch in steps.batches] == [["a"], ["stays"]]
        await steps.batcher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ("../words", 404, "no task '../words'"),
        (".hidden", 404, "no task"),
        ("", 404, "no task"),
        ({"ink": float("nan")}, 422, "strength nan of task 'ink'"),
        ({"ink": 1e9}, 422, "not in ±10"),
        ({f"t{i}": 1.0 for i in range(9)}, 422, "9 tasks for one picture; at most 8"),
    ],
)
def test_names_and_strengths_are_checked_before_anything_else(
    serving: SimpleNamespace, given: Any, status: int, message: str
) -> None:
    with pytest.raises(serving.requests.RequestError, match=message) as caught:
        serving.requests.tasks_of(given)
    assert caught.value.status == status


def test_a_picture_does_not_depend_on_its_neighbours(painter: Any, ask: Callable[..., Any]) -> None:
    requests = [
        ask("cat", "ink", seed=1),
        ask("cat", "neon", seed=1),
        ask("cat", seed=1),
        ask("fox", {"ink": 0.7, "neon": 0.3}, seed=2),
        ask("smile", "smileys", seed=3),  # a word that only this task knows
    ]
    together = painter.paint(requests)
    assert {tuple(vars(p.facts).values())[:3] for p in together} == {(5, 3, 3)}
    for request, picture in zip(requests, together, strict=True):
        (alone,) = painter.paint([request])
        difference = np.abs(alone.pixels.astype(int) - picture.pixels.astype(int))
        assert difference.max() <= CLOSE, request
        assert alone.facts.misses == 0
    plain = [picture.pixels.astype(int) for picture in together]
    assert min(np.abs(plain[0] - plain[1]).mean(), np.abs(plain[0] - plain[2]).mean()) > 2


def test_a_bad_request_spoils_no_other(
    serving: SimpleNamespace, ask: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("ink", "edges"):
        shutil.copy(TASKS / f"{name}.safetensors", tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    save_task(new_task(other, targets="all"), tmp_path / "stranger.safetensors")
    painter = serving.painter.Painter(POCKET, tmp_path)
    answers = painter.paint(
        [
            ask("cat", "nowhere"),
            ask("cat", "broken"),
            ask("cat", "edges"),
            ask("unicorn", "ink"),
            ask("cat", "ink"),
            ask("cat", "stranger"),
            ask("dog", seed=1),
        ]
    )
    statuses = [getattr(answer, "status", 200) for answer in answers]
    assert statuses == [404, 422, 422, 422, 200, 422, 200]
    assert "needs a control picture" in str(answers[2])
    assert "unknown word 'unicorn'; known: cat, dog" in str(answers[3])
    assert "does not fit" in str(answers[5])
    assert answers[4].facts.rows == answers[6].facts.rows == 2


def test_a_batch_that_fails_is_drawn_one_by_one(
    painter: Any, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, batches = painter._call, []

    def poisoned(requests: Any, prompts: Any) -> Any:
        batches.append(len(requests))
        if any(request.seed == 13 for request in requests):
            raise RuntimeError("out of memory")
        return forward(requests, prompts)

    monkeypatch.setattr(painter, "_call", poisoned)
    good, bad = painter.paint([ask("cat", seed=1), ask("cat", seed=13)])
    assert batches == [2, 1, 1]
    assert good.pixels.shape == (128, 128, 3)
    assert str(bad) == "out of memory"
    for _ in range(3):
        painter.check_health()
        painter.paint([ask("cat", seed=13)])
    with pytest.raises(RuntimeError, match="the last 3 batches gave no picture"):
        painter.check_health()


def test_tasks_come_by_name_and_the_longest_unused_go(
    serving: SimpleNamespace, ask: Callable[..., Any]
) -> None:
    size = load_task(TASKS / "ink.safetensors").nbytes * 2  # the file has them in half precision
    painter = serving.painter.Painter(POCKET, TASKS, device_bytes=2 * size)

    def draw(*names: str | None) -> list[tuple[int, int]]:
        pictures = painter.paint([ask("cat", name) for name in names])
        return [(picture.facts.rows, picture.facts.misses) for picture in pictures]

    assert draw("ink", "neon") == [(2, 2)] * 2
    assert draw("ink", None) == [(2, 0)] * 2
    assert draw("fruits") == [(1, 1)]
    assert painter.tasks.loaded == ("ink", "fruits")
    # four tasks where two fit: two batches
    assert draw("neon", "smileys", "fruits", "ink") == [(2, 2)] * 4
    assert len(painter.tasks.loaded) == 2


def test_tasks_are_read_ahead_of_their_batch(
    serving: SimpleNamespace, ask: Callable[..., Any], tmp_path: Path
) -> None:
    painter = serving.painter.Painter(POCKET, tmp_path)
    shutil.copy(TASKS / "ink.safetensors", tmp_path)  # files may come while the server runs
    painter.tasks.prefetch(["ink"])
    assert painter.tasks.loaded == ()
    (tmp_path / "ink.safetensors").unlink()
    assert painter.paint([ask("cat", "ink")])[0].facts.misses == 1
    with pytest.raises(serving.requests.RequestError, match="no task 'ink2'") as caught:
        painter.tasks.prefetch(["ink2"])
    assert caught.value.status == 404
