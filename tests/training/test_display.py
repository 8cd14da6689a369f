import io
import math

import pytest

console_of = pytest.importorskip("rich.console").Console

from diffscaler_core.training.command.display import Display, Encoding  # noqa: E402
from diffscaler_core.training.progress import Progress  # noqa: E402
from diffscaler_core.training.run_folder import RunFolder  # noqa: E402


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def console(request):
    return console_of(
        file=io.StringIO(), force_terminal=request.param, width=200, color_system=None
    )


def shown(console, *steps):
    with Display(console, 20, RunFolder("run")) as display:
        for step in steps:
            display(step)
    return console.file.getvalue()


def step(number, **more):
    facts = {"rate": 0.5, "seconds_left": 600.0, "memory": 3 * 2**30, **more}
    return Progress(number, 20, 0.5, 0.25, **facts)


def test_events_are_lines_and_the_best_is_marked(console):
    text = shown(
        console,
        step(1),
        step(5, validation=0.5, saved=True),
        step(10, validation=0.7, samples=[0], advice=("you can stop [now]",)),
    )
    assert "step 5: validation loss 0.5000 (best so far)" in text
    assert "step 10: validation loss 0.7000\n" in text
    assert "step 5: checkpoint saved" in text
    assert "step 10: samples in run/samples" in text
    assert "step 10: you can stop [now]" in text
    assert "going on" not in text


def test_a_terminal_sees_pace_and_memory_move():
    console = console_of(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    text = shown(console, step(1), step(2, validation=0.75))
    assert "2/20" in text
    assert "loss 0.2500, validation 0.7500, 2.0 s/it, 10 min left, 3.00 GiB" in text


def test_a_pipe_gets_a_line_now_and_then(monkeypatch):
    console = console_of(file=io.StringIO(), width=200)
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    text = shown(console, *(step(number) for number in range(1, 7)))
    lines = text.splitlines()
    assert 1 < len(lines) < 6
    assert lines[0].startswith("step 2 of 20: loss 0.2500")


def test_what_is_not_known_is_not_shown_and_a_resumed_run_says_so(console):
    text = shown(console, step(8, rate=0.0, seconds_left=math.nan, memory=0))
    assert "going on after step 7, from run/checkpoints" in text
    assert "it/s" not in text
    assert "nan" not in text


def test_tasks_are_told_apart(console):
    text = shown(
        console, step(1, task="ink"), step(1, task="neon"), step(2, task="ink", validation=0.5)
    )
    assert "step 2, ink: validation loss" in text
    assert "going on" not in text


def test_encoding_shows_how_far_it_is():
    console = console_of(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    bar = Encoding(console, "pictures")
    bar(1, 2)
    bar(2, 2)
    assert "encoding pictures" in console.file.getvalue()
    bar.close()
