import re

import pytest

from diffscaler_core.errors import DiffScalerError
from diffscaler_core.strengths import parse_block_weights, parse_strengths


def _matching(line: str, names: list[str]) -> list[str]:
    (pattern,) = parse_block_weights(f"{line}: 0.5")
    return [name for name in names if re.fullmatch(pattern, name)]


NAMES = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.3.attn.to_q",
    "transformer_blocks.12.ff.net.2",
    "single_transformer_blocks.3.attn.to_q",
    "down_blocks.0.attentions.3.proj_in",
    "proj_out",
]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("3", [1, 3]),  # the first number of a name is its block
        ("0-5", [0, 1, 3, 4]),
        ("10 - 12", [2]),
        ("transformer_blocks.3", [1]),  # not the single ones
        ("transformer_blocks.0-5", [0, 1]),
        ("single_transformer_blocks", [3]),
        ("attn", [0, 1, 3]),
        ("attn.to_q", [0, 1, 3]),
        ("proj_out", [5]),
        (r".*\.net\.\d", [2]),
        ("nothing", []),
    ],
)
def test_lines_name_the_layers_people_mean(line: str, found: list[int]) -> None:
    assert _matching(line, NAMES) == [NAMES[i] for i in found]


def test_blank_lines_comments_and_repeats() -> None:
    weights = parse_block_weights("\n0: 0.5 # the first\n  # nothing\n0: 2\n.*: -1e-1")
    assert list(weights.values()) == [0.5, -0.1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-5", "write 'which: factor'"),
        (": 1", "write 'which: factor'"),
        ("0: much", "'much' is no number"),
        ("0: nan", "'nan' is no number"),
        ("0: inf", "'inf' is no number"),
        ("5-3: 1", "is no range"),
        ("0-99999999999: 1", "is no range"),
        ("\n(: 1", r"line 2 .*no pattern"),
    ],
)
def test_lines_that_cannot_be_read_are_named(text: str, message: str) -> None:
    with pytest.raises(DiffScalerError, match=message) as error:
        parse_block_weights(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "count", "numbers"),
    [
        ("", 3, [1, 1, 1]),
        ("0.5", 3, [0.5, 0.5, 0.5]),
        ("1, .5", 2, [1, 0.5]),
        ("1;2\n3", 3, [1, 2, 3]),
        ("  -1 ,", 1, [-1]),
        ("1", 0, []),
    ],
)
def test_strengths_in_a_line(text: str, count: int, numbers: list[float]) -> None:
    assert parse_strengths(text, count) == numbers


@pytest.mark.parametrize(
    ("text", "message"), [("1, 2", "2 strengths for 3 tasks"), ("x", "'x' is")]
)
def test_strengths_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(DiffScalerError, match=message):
        parse_strengths(text, 3)
