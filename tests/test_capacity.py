"""benchmarks/capacity_model.py against what is known without it."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EVEN = np.full(16, 1 / 16)
ZIPF = np.arange(1, 1001) ** -1.0 / (np.arange(1, 1001) ** -1.0).sum()


@pytest.fixture(scope="module")
def model() -> Iterator[SimpleNamespace]:
    """The model and the load generator, as `capacity.py` imports them."""
    pytest.importorskip("aiohttp")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.syspath_prepend(ROOT / "docs" / "examples")
        names = vars(import_module("capacity_model")) | vars(import_module("serving_load"))
        yield SimpleNamespace(**names)


def test_a_queue_of_single_requests_waits_as_theory_says(model: SimpleNamespace) -> None:
    """M/D/1, Pollaczek and Khinchine: mean wait = D ρ / (2 (1 − ρ))."""
    service = model.Service(fixed=0.02, per_row=0.08, overhead=0.5)
    one = model.Installation(service, 1, rows=1, patience=0.0)
    for busy in (0.3, 0.7):
        times = model.poisson(busy / 0.1, 20_000, seed=3)
        found = model.simulate(one, EVEN, times, seconds=20_000, warm=100)
        wait = found.latencies.mean() - 0.1 - 0.5
        assert wait == pytest.approx(0.1 * busy / (2 * (1 - busy)), rel=0.08)
        assert found.busy == pytest.approx(busy, rel=0.03)


def test_a_full_server_draws_full_batches(model: SimpleNamespace) -> None:
    service = model.Service(fixed=0.8, per_row=0.1, per_task=0.01)
    own = model.Installation(service, 1, rows=8)
    mixed = model.simulate(own, np.full(1, 1.0), clients=32, seconds=400, warm=40)
    assert mixed.rows == 8
    assert mixed.throughput == pytest.approx(8 / service.seconds(8, 1), rel=0.01)
    single = model.Installation(service, 1, mixed=False, rows=8)
    alone = model.simulate(single, np.full(10**5, 1e-5), clients=32, seconds=400, warm=40)
    assert alone.rows < 1.05  # no two of 32 want the same of 100,000 tasks
    assert alone.throughput == pytest.approx(1 / service.seconds(1, 1), rel=0.03)


def test_a_batch_waits_for_company_as_long_as_it_was_told(model: SimpleNamespace) -> None:
    own = model.Installation(model.Service(0.0, 0.1), 1, rows=2, patience=0.5)
    found = model.simulate(own, EVEN, [0.0, 10.0, 10.2, 20.0], seconds=30)
    assert found.latencies == pytest.approx([0.6, 0.4, 0.2, 0.6])


def test_the_bank_keeps_what_was_used_last(model: SimpleNamespace) -> None:
    replica = model.Replica()
    assert [replica.use(task, 2) for task in (1, 2, 1, 3, 1, 2)] == [1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("affinity", [False, True])
def test_banks_start_as_long_service_leaves_them(model: SimpleNamespace, affinity: bool) -> None:
    """The hits of the first minutes are those of the last."""
    own = model.Installation(
        model.Service(0.0, 0.001, load=0.001), 5, affinity=affinity, rows=1, slots=50, patience=0.0
    )
    times = model.poisson(50, 1_200, seed=1)
    hits = [
        model.simulate(
            own, ZIPF, times[: len(times) // share], seconds=1_200 / share, warm=warm
        ).hits
        for share, warm in ((12, 0.0), (1, 600.0))
    ]
    assert hits[0] == pytest.approx(hits[1], abs=0.02)


def test_a_task_stays_at_home_until_its_home_is_full(model: SimpleNamespace) -> None:
    service = model.Service(0.0, 1.0)
    own = model.Installation(service, 10, affinity=True, rows=2, full=1.0, fallbacks=2, patience=0)
    one_task = np.full(1, 1.0)
    quiet = model.simulate(own, one_task, [0.0, 5.0, 10.0], seconds=20)
    assert quiet.hits == 1
    rush = model.simulate(own, one_task, [0.0] * 6, seconds=20)
    # 2 each on the home and both stand-ins, which begin with the first alone
    assert rush.latencies == pytest.approx([1, 2, 1, 2, 1, 2])
    assert rush.hits == pytest.approx(1 - 2 / 6)


def test_a_hopeless_load_is_given_up(model: SimpleNamespace) -> None:
    own = model.Installation(model.Service(1.0, 1.0), 1)
    found = model.simulate(own, EVEN, model.poisson(100, 60, 0), seconds=60, patient=4)
    assert found.percentile(95) == float("inf")


def test_the_fit_finds_the_terms(model: SimpleNamespace) -> None:
    true = model.Service(0.3, 0.05, 0.01)
    block = model.Block("mixed", 64, "open", 1.0, 10.0, overheads=[0.02, 0.04, 0.9])
    for rows in range(1, 9):
        for tasks in range(1, rows + 1):
            seconds = true.seconds(rows, tasks)
            block.batches += [model.Batch(rows, tasks, 0, seconds * f) for f in (0.99, 1.0, 1.5)]
            block.batches.append(model.Batch(rows, tasks, 1, 50.0))  # a miss: not in the fit
    found, quality = model.fit([block], load=0.1)
    assert (found.fixed, found.per_row, found.per_task) == pytest.approx((0.3, 0.05, 0.01))
    assert (found.load, found.overhead, len(found.noise)) == (0.1, 0.04, 108)
    assert quality == pytest.approx(1)
    assert model.Block.of(block.json()).batches[5].rows == block.batches[5].rows
