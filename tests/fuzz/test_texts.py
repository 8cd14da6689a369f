"""Texts that people type: schedules, lists of strengths, strengths by block."""

from __future__ import annotations

from pathlib import Path
from random import Random

from diffscaler_core import scale_task
from diffscaler_core.schedule import INTERPOLATIONS, Schedule
from diffscaler_core.strengths import parse_block_weights, parse_strengths

from .good import task
from .harness import Target
from .mutations import number, spoiled_text, word
from .slices import check_slice, check_with_hypothesis

SCHEDULES = ("0: 0, 0.3: 1", "step\n0: 1\n0.5: 0 # off\nscale 0.2: 1; shift 1: 0.5", "smooth\n1: 2")
STRENGTHS = ("1.0, 0.5", "1", "", "0.7;0.3")
BLOCKS = ("0-5: 0.5", "transformer_blocks.0-1: 0\nattn: 1.2", "attn.to_q: 2 # x", r".*to_[qk]: 3")
_TASK = task()


def make(rng: Random) -> tuple[str, str]:
    kind, good = rng.choice((("schedule", SCHEDULES), ("strengths", STRENGTHS), ("blocks", BLOCKS)))
    text = rng.choice(good)
    if rng.random() < 0.3:
        lines = (f"{word(rng)}: {number(rng)}" for _ in range(rng.randrange(1, 4)))
        text = "\n".join(lines)
    elif rng.random() < 0.9:
        text = spoiled_text(rng, text)
    else:
        text = text * rng.choice((1, 2, 3, 3000))
    return kind, text


def run(case: tuple[str, str], folder: Path) -> None:
    kind, text = case
    if kind == "schedule":
        found = Schedule.parse(text)
        assert Schedule.parse(str(found)) == found, f"{found!r} is written otherwise"
        for percent in (-1.0, 0.0, 0.3, 1.0, 2.0):
            found.at(percent)
        assert found.interpolation in INTERPOLATIONS
    elif kind == "strengths":
        assert len(parse_strengths(text, 2)) == 2
    else:
        scale_task(_TASK, layers=parse_block_weights(text))


TARGET = Target("texts", make, run, examples=100)


def test_the_good_texts_are_good(tmp_path):
    for kind, texts in (("schedule", SCHEDULES), ("strengths", STRENGTHS), ("blocks", BLOCKS)):
        for text in texts:
            run((kind, text), tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path, 1000)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
