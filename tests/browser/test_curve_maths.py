"""The curve that the frontend draws is the schedule that the core computes; edits keep the text."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffscaler_core import DiffScalerError
from diffscaler_core.schedule import INTERPOLATIONS, Schedule

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("curve_maths.js", "schedule_text.js", "texts.js")
PARTS = ("scale", "shift", "subspace")

#: One JSON list of calls on stdin, one of results on stdout; a result is {value} or {error}.
RUNNER = """
import { readFileSync } from "node:fs";
import * as maths from "./curve_maths.js";
import * as text from "./schedule_text.js";

const values = ({ parts, interpolation }, percents) =>
  percents.map((at) => text.PARTS.map((part) => maths.valueAt(parts[part], at, interpolation)));
const all = (points) => Object.fromEntries(text.PARTS.map((part) => [part, points]));
const calls = {
  parse: ({ given, interpolation, percents }) =>
    values(text.parse(given, interpolation), percents),
  window: ({ start, end, fade, percents }) => {
    const { points, interpolation } = maths.windowCurve(start, end, fade);
    return values({ parts: all(points), interpolation }, percents);
  },
  entries: ({ given }) => text.parse(given, "linear").entries.map(
    ({ part, percent, factor }) => [part, percent, factor]),
  drawn: ({ points, interpolation }) => maths.polyline(points, interpolation),
  converted: ({ start, end, fade, wanted }) => maths.asPoints(maths.windowCurve(start, end, fade),
    wanted),
  move: ({ given, part, index, percent, factor }) => {
    const own = text.entriesOf(text.parse(given, "linear").entries, part);
    return { text: text.withMoved(given, own[index], percent, factor),
      limits: text.limits(own, index, 0.01) };
  },
  remove: ({ given, index }) =>
    text.withRemoved(given, text.parse(given, "linear").entries[index]),
  add: ({ given, part, point }) =>
    text.withAdded(given, given ? text.parse(given, "linear").entries : [], part, point),
};
const results = JSON.parse(readFileSync(0, "utf8")).map(([name, argument]) => {
  try {
    return { value: calls[name](argument) };
  } catch (error) {
    return { error: error.message };
  }
});
process.stdout.write(JSON.stringify(results));
"""

Run = Callable[[list[tuple[str, dict[str, Any]]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs calls of the frontend's modules in Node.js."""
    if (node := shutil.which("node")) is None:
        pytest.skip("no Node.js on this machine")
    folder = tmp_path_factory.mktemp("web")
    for name in MODULES:
        shutil.copy(ROOT / "web" / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "runner.js").write_text(RUNNER)

    def run_calls(calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        done = subprocess.run(
            [node, str(folder / "runner.js")],
            input=json.dumps(calls),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    return run_calls


def _number(rng: random.Random, high: float) -> str:
    value = rng.choice([0, 1, high, rng.random() * high, round(rng.random() * high, 2)])
    return rng.choice([repr(value), f"{value:g}", f"{value:.3e}", f"+{value:g}", f" {value:g}"])


def _text(rng: random.Random) -> str:
    """Any lines a person could write: several parts, separators, comments, interpolations."""
    words = []
    for _ in range(rng.randint(1, 7)):
        part = rng.choice(["", "", "", "scale ", "shift  ", "subspace\t"])
        percent = _number(rng, 1.0).strip() if part else _number(rng, 1.0)
        sign = rng.choice(["", "", "-"])
        words.append(f"{part}{percent}{rng.choice(['', ' '])}:{sign}{_number(rng, 3.0).strip()}")
    words += rng.choices(["", "step", "smooth", "linear", " "], k=rng.randint(0, 2))
    rng.shuffle(words)
    joints = ["\n", "\r\n", ", ", ";", "\n\n", " # 0.5: 9, so\n", "\x0b"]
    return "".join(word + rng.choice(joints) for word in words)


def _spoiled(rng: random.Random) -> str:
    text = list(_text(rng))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        text[at] = rng.choice([*"0123456789.:,;#+-_eE sclf\n\t", "\x1c", "\xa0", "\ufeff", ""])
    return "".join(text)


def _percents(rng: random.Random, schedule: Schedule | None) -> list[float]:
    own = [p for part in PARTS for p, _ in getattr(schedule, part, ())]
    near = [p + by for p in own for by in (-2e-6, -5e-7, 0.0, 5e-7, 2e-6)]
    return [0.0, 1.0, *near, *(rng.random() for _ in range(10))]


def _parsed(text: str, interpolation: str) -> Schedule | None:
    try:
        return Schedule.parse(text, interpolation)
    except DiffScalerError:
        return None


def test_text_means_the_same_as_in_the_core(run: Run) -> None:
    rng = random.Random(0)
    texts = [_text(rng) for _ in range(600)] + [_spoiled(rng) for _ in range(600)]
    cases = []
    for text in texts:
        interpolation = rng.choice(list(INTERPOLATIONS))
        schedule = _parsed(text, interpolation)
        cases.append((text, interpolation, schedule, _percents(rng, schedule)))
    results = run(
        [("parse", {"given": t, "interpolation": i, "percents": p}) for t, i, _, p in cases]
    )
    refused = sum(schedule is None for _, _, schedule, _ in cases)
    assert 200 < refused < 900  # both kinds are really met
    for (text, _, schedule, percents), got in zip(cases, results, strict=True):
        assert ("error" in got) == (schedule is None), repr(text)
        if schedule is not None:
            assert [tuple(f) for f in got["value"]] == [schedule.at(p) for p in percents], text


def test_window_is_the_core_s(run: Run) -> None:
    rng = random.Random(1)
    cases = []
    for _ in range(500):
        start, end = (rng.choice([0.0, 0.3, 0.7, 1.0, rng.random()]) for _ in range(2))
        fade = rng.choice([0.0, 0.1, rng.random()])
        cases.append((start, end, fade, [rng.random() for _ in range(8)] + [0.0, start, end, 1.0]))
    keys = ("start", "end", "fade", "percents")
    results = run([("window", dict(zip(keys, case, strict=True))) for case in cases])
    outcomes = set()
    for (start, end, fade, percents), got in zip(cases, results, strict=True):
        try:
            schedule = Schedule.window(start, end, fade)
        except DiffScalerError:
            assert "error" in got, (start, end, fade)
        else:
            assert [tuple(f) for f in got["value"]] == [schedule.at(p) for p in percents]
        outcomes.add("error" in got)
    assert outcomes == {True, False}


def test_drawn_corners_lie_on_the_core_s_curve(run: Run) -> None:
    points = [(0.1, 0.5), (0.3, 0.0), (0.3, 1.0), (0.8, -0.5), (0.9, 2.0)]
    for name in INTERPOLATIONS:
        schedule = Schedule.of(points, name)
        (drawn,) = run([("drawn", {"points": points, "interpolation": name})])
        line = drawn["value"]
        assert line[0] == [0, 0.5]
        assert line[-1] == [1, 2.0]
        assert [p for p, _ in line] == sorted(p for p, _ in line)
        for percent, factor in line:
            sides = [schedule.at(percent + by)[0] for by in (0.0, -2e-6)]
            assert min(abs(factor - side) for side in sides) < 1e-4, (name, percent)


def test_window_turned_into_points_is_the_same_curve(run: Run) -> None:
    cases = [(0.2, 0.7, 0.0), (0.0, 0.5, 0.0), (0.0, 1.0, 0.3), (0.2, 0.7, 0.1), (0.4, 1.0, 0.2)]
    for start, end, fade in cases:
        window = Schedule.window(start, end, fade)
        for wanted in INTERPOLATIONS:
            facts = {"start": start, "end": end, "fade": fade, "wanted": wanted}
            (got,) = run([("converted", facts)])
            if got["value"] is None:  # a ramp is no step: the text then has to say "linear"
                assert fade
                assert wanted != "linear"
                continue
            same = Schedule.of([tuple(point) for point in got["value"]], wanted)
            for percent in [i / 200 for i in range(201)]:
                assert same.at(percent) == pytest.approx(window.at(percent))


def test_moving_a_point_leaves_the_rest_of_the_text(run: Run) -> None:
    text = "# mine\n0: 0, scale 0.5: 2  # two\n\n  0.60 : 1;step\n"
    move = {"given": text, "part": "", "index": 1, "percent": 0.4, "factor": 0.25}
    scale = {**move, "part": "scale", "index": 0}
    moved, scaled = (got["value"] for got in run([("move", move), ("move", scale)]))
    assert moved["text"] == "# mine\n0: 0, scale 0.5: 2  # two\n\n  0.4: 0.25;step\n"
    assert moved["limits"] == [0, 1]
    assert scaled["text"] == "# mine\n0: 0, scale 0.4: 0.25  # two\n\n  0.60 : 1;step\n"


@pytest.mark.parametrize(
    ("text", "index", "limits"),
    [
        ("0: 0\n0.5: 1\n1: 0", 1, [0, 1]),
        ("0.5: 1\n0: 0\n1: 0", 1, [0.01, 1]),  # written first, it cannot be the second of a jump
        ("0.2: 0\n0.2: 1\n0.5: 1\n1: 0", 2, [0.21, 1]),  # no third point at a jump
        ("0.5: 1", 0, [0, 1]),
    ],
)
def test_a_point_moves_between_its_neighbours(
    run: Run, text: str, index: int, limits: list[float]
) -> None:
    (got,) = run(
        [("move", {"given": text, "part": "", "index": index, "percent": 0.3, "factor": 1})]
    )
    assert got["value"]["limits"] == pytest.approx(limits)
    for percent in limits:
        facts = {"given": text, "part": "", "index": index, "percent": percent, "factor": 9}
        (moved,) = run([("move", facts)])
        schedule = Schedule.parse(moved["value"]["text"])
        assert [factor for _, factor in schedule.scale].index(9.0) == index


@pytest.mark.parametrize(
    ("text", "index", "left"),
    [
        ("0: 0\n0.5: 1\n1: 0", 1, "0: 0\n1: 0"),
        ("0: 0\n0.5: 1", 1, "0: 0"),
        ("0: 0\r\n0.5: 1", 1, "0: 0"),
        ("0: 0\n0.5: 1", 0, "0.5: 1"),
        ("0: 0, 0.5: 1, 1: 0", 1, "0: 0, 1: 0"),
        ("0: 0, 0.5: 1", 0, "0.5: 1"),
        ("0: 0, 0.5: 1  # so", 1, "0: 0  # so"),
        ("0.5: 1  # so\n1: 2", 0, "  # so\n1: 2"),
        ("0.5: 1", 0, ""),
    ],
)
def test_removing_a_point_takes_its_text_only(run: Run, text: str, index: int, left: str) -> None:
    (got,) = run([("remove", {"given": text, "index": index})])
    assert got["value"].replace(" ", "") == left.replace(" ", "")
    assert "\n\n" not in got["value"]


@pytest.mark.parametrize(
    ("text", "part", "whole"),
    [
        ("", "", "0.3: 2"),
        ("0: 0\n1: 1", "", "0: 0\n0.3: 2\n1: 1"),
        ("0: 0", "", "0: 0\n0.3: 2"),
        ("0: 0  # so\nstep", "", "0: 0  # so\n0.3: 2\nstep"),
        ("0: 0, 1: 1", "", "0: 0, 0.3: 2, 1: 1"),
        ("0: 0, 0.1: 1", "", "0: 0, 0.1: 1, 0.3: 2"),
        ("0: 0", "shift", "0: 0\nshift 0.3: 2"),
        ("0: 0\n", "shift", "0: 0\nshift 0.3: 2"),
        ("0.3: 0", "", "0.3: 0\n0.3: 2"),
    ],
)
def test_adding_a_point_writes_it_in_its_place(run: Run, text: str, part: str, whole: str) -> None:
    (got,) = run([("add", {"given": text, "part": part, "point": [0.3, 2]})])
    assert got["value"]["text"] == whole
    assert whole[got["value"]["start"] :].startswith(f"{part} 0.3: 2".strip())


def test_any_edit_of_any_text_changes_that_point_alone(run: Run) -> None:
    rng = random.Random(2)
    texts = [text for text in (_text(rng) for _ in range(300)) if _parsed(text, "linear")]
    entries = [got["value"] for got in run([("entries", {"given": text}) for text in texts])]
    indices = [rng.randrange(len(own)) for own in entries]
    removed = run(
        [("remove", {"given": t, "index": i}) for t, i in zip(texts, indices, strict=True)]
    )
    part, percent, factor = "shift", 0.123457, 0.765432
    point = {"part": part, "point": [percent, factor]}
    added = run([("add", {"given": text, **point}) for text in texts])
    after = run([("entries", {"given": got["value"]}) for got in removed])
    more = run([("entries", {"given": got["value"]["text"]}) for got in added])
    assert len(texts) > 100
    for own, index, left, got in zip(entries, indices, after, more, strict=True):
        assert left.get("value", []) == own[:index] + own[index + 1 :]
        assert sorted(got["value"]) == sorted([*own, [part, percent, factor]])
