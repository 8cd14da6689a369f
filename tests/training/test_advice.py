import pytest

from diffscaler_core.training.advice import after_validation, before_training
from diffscaler_core.training.config import TrainingConfig
from diffscaler_core.training.progress import History


@pytest.mark.parametrize(
    ("settings", "pictures", "base", "said"),
    [
        ({"steps": 50}, 9, 0, "9 pictures are few"),
        ({"steps": 1000, "batch": 8}, 20, 0, "shown 400 times; above 200"),
        ({"steps": 1000, "batch": 8}, 20, 0, "try steps 500"),
        ({"batch": 16, "steps": 5}, 12, 0, "a batch of 16 shows the same picture twice"),
        ({"rank": 32, "steps": 5}, 20, 0, "rank 32 is wide for 20 pictures"),
        ({"steps": 5}, 100, 4_000_000, "lr 0.001 is low for a base of 4.0 M"),
        ({"steps": 5, "lr": 0.01}, 100, 2_000_000_000, "lr 0.01 is high for a base of 2.0 B"),
    ],
)
def test_each_rule_speaks_up_in_one_line(settings, pictures, base, said):
    lines = before_training(TrainingConfig(**settings), pictures, base)
    assert any(said in line for line in lines), lines
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "pictures", "base"),
    [
        ({"steps": 500, "batch": 8}, 100, 2_000_000_000),
        ({"steps": 500, "lr": 5e-3}, 100, 4_000_000),
        ({"steps": 500, "method": "bitfit", "rank": 64}, 20, 4_000_000),
        ({"steps": 500, "optimizer": "prodigy"}, 100, 4_000_000),
    ],
)
def test_a_sensible_run_is_told_nothing(settings, pictures, base):
    assert before_training(TrainingConfig(**settings), pictures, base) == ()


def told(losses):
    history, lines = History(), []
    for step, loss in enumerate(losses, 1):
        history.validated(step, loss)
        lines.append(after_validation(history))
    return lines


def test_three_validations_above_the_best_are_told_once():
    lines = told([1.0, 0.8, 0.6, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75])
    assert [bool(line) for line in lines] == [False] * 6 + [True, False, False]
    assert "0.65 now, 0.5 at step 4" in lines[6][0]


def test_a_new_best_makes_it_quiet_and_a_second_rise_is_told_again():
    lines = told([0.6, 0.5, 0.6, 0.6, 0.6, 0.4, 0.5, 0.5, 0.5])
    assert [i for i, line in enumerate(lines) if line] == [4, 8]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],  # still falling
        [0.5, 0.5001, 0.5001, 0.5001, 0.5001],  # flat
        [0.60, 0.50, 0.58, 0.51, 0.59, 0.52, 0.58],  # jumps about by more than it rises
        [0.5, 0.6, 0.7],  # too few to tell
    ],
)
def test_noise_and_a_fall_are_no_rise(losses):
    assert not any(told(losses))
