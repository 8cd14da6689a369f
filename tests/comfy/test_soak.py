"""A small slice of scripts/soak.py: random workflows of two clients who misbehave."""

import asyncio
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

SEED, GRAPHS, PROMPTS = 7, 13, 25


@pytest.fixture(scope="module")
def soak(script: Callable[[str], ModuleType]) -> ModuleType:
    for name in ("soak_graphs", "soak_client", "soak_models"):
        script(name)
    return script("soak")


def test_graphs_follow_from_their_number_and_every_kind_is_drawn(soak: ModuleType) -> None:
    pool = [soak.draw(3, number) for number in range(60)]
    assert [recipe.kind for recipe in pool[: len(soak.KINDS)]] == list(soak.KINDS)
    assert pool[40] == soak.draw(3, 40) != soak.draw(4, 40)
    for recipe in pool:
        graph = recipe.prepared("here", 5)
        links = [v for one in graph.values() for v in one["inputs"].values() if type(v) is list]
        assert {name for name, _ in links} <= set(graph)
        assert recipe.wanted or recipe.error
        assert graph != recipe.prepared("there", 6)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, ""),
        ({"a": torch.tensor([1.0, 2.001])}, "a is 0.0005 from the reference"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a is inf"),
        ({"b": "another"}, "b is inf"),
        ({"error": "no"}, "success: no"),
    ],
)
def test_wrong_answers_are_faults(soak: ModuleType, changed: dict[str, Any], fault: str) -> None:
    right = {"a": torch.tensor([1.0, 2.0]), "b": "text"}
    state = soak.Soak([soak.draw(1, 0)], [right], 1, 1, time.monotonic())
    state.judge(0, ("success", {**right, **changed}), "nothing")
    assert len(state.faults) == bool(fault)
    assert fault in "".join(state.faults)


def test_memory_is_judged_after_warm_up(soak: ModuleType) -> None:
    flat = [(n, 500.0 if n >= 20 else 100.0) for n in range(0, 201, 5)]
    found = soak.memory_figures(flat, 200)
    assert found["warm_mib"] == found["end_mib"] == 500
    assert abs(found["slope_mib_per_1000"]) < 1e-6
    growing = [(n, mib + 0.1 * n) for n, mib in flat]
    assert abs(soak.memory_figures(growing, 200)["slope_mib_per_1000"] - 100) < 1e-3


@pytest.mark.slow
def test_two_clients_who_misbehave_get_the_right_answers(server: Any, soak: ModuleType) -> None:
    folder = server.log.parent
    soak.write_files(folder / "models")
    pool = [soak.draw(SEED, number) for number in range(GRAPHS)]
    right, wrong = asyncio.run(soak.reference(server.url, folder / "output", pool, "alone"))
    assert not wrong
    state = soak.Soak(pool, right, PROMPTS, SEED, time.monotonic() + 240)
    asyncio.run(soak.soaked(server.url, folder / "output", state, 2))
    assert not state.faults
    assert state.sent >= PROMPTS
    assert state.tally["identical"] == state.tally["answers"] > PROMPTS / 2
    assert state.facts["last"]["looked"] >= 2
    assert {recipe.kind for recipe in pool} == set(soak.KINDS)
