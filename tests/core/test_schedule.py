from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffscaler_core import DiffScalerError, UnknownNameError, combine_tasks, load_task, save_task
from diffscaler_core.affiner import PARTS
from diffscaler_core.combine import cast_task, scale_task
from diffscaler_core.schedule import INTERPOLATIONS, Schedule, scaled

SHARES = st.integers(0, 1000).map(lambda n: n / 1000)
FACTORS = st.floats(-1e3, 1e3).filter(lambda f: f == 0 or abs(f) > 1e-9)
POINTS = st.lists(st.tuples(SHARES, FACTORS), min_size=1, max_size=6, unique_by=lambda p: p[0])
SCHEDULES = st.builds(
    Schedule, POINTS, POINTS | st.just([]), POINTS, st.sampled_from(sorted(INTERPOLATIONS))
)


@given(SCHEDULES)
def test_the_text_of_a_schedule_is_read_back_as_the_same_schedule(schedule):
    back = Schedule.parse(str(schedule))
    assert back == schedule
    assert hash(back) == hash(schedule)
    assert Schedule.of(str(schedule)) == pickle.loads(pickle.dumps(schedule)) == schedule


@given(POINTS, st.sampled_from(sorted(INTERPOLATIONS)), SHARES)
def test_factors_go_through_their_points_and_never_beyond_their_neighbours(points, way, percent):
    schedule = Schedule.of(points, way)
    for place, factor in points:
        assert schedule.at(place) == (factor,) * 3
    ordered = sorted(points)
    before = [p for p in ordered if p[0] <= percent] or ordered[:1]
    after = [p for p in ordered if p[0] >= percent] or ordered[-1:]
    low, high = sorted((before[-1][1], after[0][1]))
    rounding = 1e-9 * (1 + abs(low) + abs(high))
    assert all(low - rounding <= f <= high + rounding for f in schedule.at(percent))
    if way == "step":
        assert schedule.at(percent) == (before[-1][1],) * 3


@given(POINTS, SHARES)
def test_linear_and_smooth_are_the_formulas(points, percent):
    ordered = sorted(points)
    for (start, first), (end, last) in itertools.pairwise(ordered):
        if start <= percent <= end:
            t = (percent - start) / (end - start)
            linear, smooth = Schedule.of(points), Schedule.of(points, "smooth")
            assert linear.at(percent)[0] == pytest.approx((1 - t) * first + t * last)
            curve = 3 * t**2 - 2 * t**3
            assert smooth.at(percent)[0] == pytest.approx((1 - curve) * first + curve * last)


def test_before_the_first_point_and_after_the_last_the_factor_stays():
    schedule = Schedule.parse("0.2: 0\n0.4: 1\n0.8: 0.5")
    assert [schedule.at(p)[0] for p in (0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1)] == pytest.approx(
        [0, 0, 0, 0.5, 1, 0.75, 0.5, 0.5]
    )


def test_a_line_may_name_a_part_and_other_parts_follow_the_lines_that_name_none():
    schedule = Schedule.parse("0: 0.5  # all but the scale\nscale 0: 0\nscale 1: 1")
    assert schedule.at(0.25) == (0.25, 0.5, 0.5)
    alone = Schedule.parse("subspace 0: 2")
    assert alone.at(0.5) == (1, 1, 2)
    assert str(alone) == "subspace 0: 2"


def test_text_may_say_what_is_between_points_and_be_one_line():
    assert Schedule.parse("step\n0: 0\n0.5: 1").at(0.49) == (0, 0, 0)
    assert Schedule.parse("0: 0, 1: 1; smooth").interpolation == "smooth"
    assert Schedule.parse("0: 0, 1: 1", "step").interpolation == "step"
    assert Schedule.parse("0: 0, linear, 1: 1", "step").interpolation == "linear"


def test_two_points_at_one_percent_are_a_jump_where_the_second_counts():
    schedule = Schedule.parse("0: 0\n0.5: 0.2\n0.5: 1\n1: 1")
    assert schedule.at(0.25)[0] == pytest.approx(0.1)
    assert [schedule.at(p)[0] for p in (0.4999, 0.5)] == pytest.approx([0.2, 1], abs=1e-3)


def test_a_point_is_not_missed_by_the_last_digit_of_a_float32():
    assert Schedule.window(0.3, 0.6).at(0.3 - 1e-7) == (1, 1, 1)
    assert Schedule.window(0.3, 0.6).at(0.6 - 1e-7) == (0, 0, 0)


@given(st.lists(SHARES, min_size=1, max_size=5, unique=True), SHARES)
def test_windows_next_to_each_other_share_out_all_of_the_time(borders, percent):
    edges = sorted({0.0, 1.0, *borders})
    windows = [Schedule.window(*pair) for pair in itertools.pairwise(edges)]
    assert sorted(w.at(percent)[0] for w in windows) == [0.0] * (len(windows) - 1) + [1.0]


def test_a_window_fades_within_itself_and_not_at_the_ends_of_the_time():
    def factors(schedule):
        return [schedule.at(p)[0] for p in (0, 0.2, 0.25, 0.3, 0.5, 0.7, 0.75, 0.8, 1)]

    assert factors(Schedule.window(0.2, 0.8, 0.1)) == pytest.approx([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0])
    assert factors(Schedule.window(0.2, fade=0.1)) == pytest.approx([0, 0, 0.5, 1, 1, 1, 1, 1, 1])
    assert factors(Schedule.window(0, 0.8, 0.1)) == pytest.approx([1, 1, 1, 1, 1, 1, 0.5, 0, 0])
    assert factors(Schedule.window(0.2, 0.8, 0.3))[4] == pytest.approx(1)  # two fades that meet
    assert factors(Schedule.window()) == [1] * 9


@given(SCHEDULES, SHARES)
def test_a_strength_is_multiplied_per_part(schedule, percent):
    factors = dict(zip(PARTS, schedule.at(percent), strict=True))
    assert scaled(0.5, schedule.at(percent)) == {part: 0.5 * f for part, f in factors.items()}
    own = scaled({"shift": -2.0}, schedule.at(percent))
    assert own == {**factors, "shift": -2.0 * factors["shift"]}


def test_a_schedule_is_given_as_text_as_points_or_as_points_of_parts():
    expected = Schedule.parse("0: 0\n1: 1")
    assert Schedule.of("0: 0, 1: 1") == Schedule.of([(1, 1), (0, 0)]) == expected
    assert Schedule.of(expected) is expected
    assert Schedule.of({"scale": [(0, 0)]}) == Schedule.parse("scale 0: 0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: 0\n\nfoo", "line 3 of the schedule, 'foo': write"),
        ("0: 0\n2: 1", "line 2 .*: a percent of sampling time is in 0..1"),
        ("0: 0\n-0.1: 1", "line 2 .* got -0.1"),
        ("bias 0: 1", "line 1 .*: no part 'bias'; parts are scale, shift, subspace"),
        ("0: 1\n0.5: nan", "line 2 .*: 'nan' is no number"),
        ("0,3: 1", "line 1 of the schedule, '0': write"),
        ("", "at least one line"),
        ("step", "at least one line"),
        ("0: 1\n0: 2\n0: 3", "at most two points at one percent"),
    ],
)
def test_text_that_is_no_schedule_names_its_line(text, message):
    with pytest.raises(DiffScalerError, match=message) as raised:
        Schedule.parse(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given_", [3, [1, 2], [(0, "x")], [(0, 1, 2)], [(2, 1)], [(0, math.inf)]])
def test_points_that_are_none_are_refused(given_):
    with pytest.raises(DiffScalerError, match="schedule"):
        Schedule.of(given_)


def test_windows_and_names_that_do_not_exist_are_refused():
    for numbers in [(0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1)]:
        with pytest.raises(DiffScalerError, match="0 <= start < end <= 1"):
            Schedule.window(*numbers)
    with pytest.raises(DiffScalerError, match=r"2 fades of 0\.2 do not fit"):
        Schedule.window(0.3, 0.6, 0.2)
    with pytest.raises(UnknownNameError, match="cubic"):
        Schedule.of("0: 1", "cubic")
    with pytest.raises(UnknownNameError, match="bias"):
        Schedule.of({"bias": [(0, 1)]})


def test_a_task_keeps_its_schedule_in_copies_but_not_in_its_file(make, tmp_path):
    schedule = Schedule.window(0.2)
    task = make(1).replace(schedule=schedule)
    assert make(1).schedule is None
    for copied in (
        task.replace(modelspec={"title": "t"}),
        task.with_info(name="other"),
        copy.copy(task),
        copy.deepcopy(task),
        pickle.loads(pickle.dumps(task)),
        scale_task(task, 0.5),
        cast_task(task, task.tensors[0].dtype),
        combine_tasks([task], [2.0]),
    ):
        assert copied.schedule == schedule
    saved = save_task(task, tmp_path / "scheduled.safetensors")
    plain = save_task(task.replace(schedule=None), tmp_path / "plain.safetensors")
    assert saved.read_bytes() == plain.read_bytes()
    assert load_task(saved).schedule is None


def test_tasks_combine_only_under_one_schedule(make):
    first, second = make(1), make(2)
    schedule = Schedule.window(0.5)
    both = combine_tasks([t.replace(schedule=schedule) for t in (first, second)])
    assert both.schedule == schedule
    assert combine_tasks([first, second]).schedule is None
    with pytest.raises(DiffScalerError, match="different schedules"):
        combine_tasks([first.replace(schedule=schedule), second])
