"""What the test of every target does: the first cases of a fixed seed, and hypothesis's own."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .harness import Target, rng_of, run_cases, run_one

SEED = 2024


def check_slice(target: Target, folder: Path, cases: int = 200) -> None:
    """Runs the cases 0, 1, … of the fixed seed; all end well, some each way."""
    tally = run_cases(target, folder, range(cases), SEED, traced=20)
    assert not tally.failures, "\n".join(f"case {n}: {why}" for n, why in tally.failures.items())
    assert tally.accepted, "no case was accepted: nothing behind the first check was reached"
    assert tally.refused > cases // 20, "hardly a case was refused"
    assert tally.held < 64 << 20


def check_case(target: Target, folder: Path, seed: int, case: int) -> None:
    """Runs one case that once went wrong."""
    fault, _ = run_one(target, rng_of(seed, case), folder)
    assert fault is None, fault


def check_with_hypothesis(target: Target, folder: Path) -> None:
    """Lets hypothesis choose; what fails is shrunk to the choices that matter."""

    @settings(
        max_examples=target.examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def run(rng) -> None:
        fault, _ = run_one(target, rng, folder)
        assert fault is None, fault

    run()
