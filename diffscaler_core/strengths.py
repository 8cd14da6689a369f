"""Strengths written as text, as people type them into a node or on the command line."""

from __future__ import annotations

import math
import re

from .errors import DiffScalerError, shown
from .patterns import compiled

_RANGE = re.compile(r"(?:(?P<list>[\w.]*?[A-Za-z_]\w*)\.)?(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?")
_PLAIN = re.compile(r"[\w.]+")
_MOST_BLOCKS, _MOST_LETTERS = 1000, 1000


def parse_strengths(text: str, count: int) -> list[float]:
    """Returns `count` strengths from "0.7, 0.3": one for each, or one for all; nothing means 1.

    Raises:
        DiffScalerError: Another number of strengths, or something that is no number.
    """
    where = f"strengths {shown(text)}"
    numbers = [read_number(word, where) for word in re.split(r"[,;\s]+", text) if word]
    if len(numbers) <= 1:
        return (numbers or [1.0]) * count
    if len(numbers) != count:
        raise DiffScalerError(
            f"{len(numbers)} strengths for {count} tasks: write one number for each task "
            f"(such as '{', '.join(['1.0'] * count)}'), one for all, or none"
        )
    return numbers


def parse_block_weights(text: str) -> dict[str, float]:
    """Returns {pattern: factor} for `scale_task(layers=…)` from lines such as "0-5: 0.5".

    A line is `which: factor`; the first line that matches a layer decides, other layers keep 1.
    Which:

    - `3` or `0-5`: blocks by number, in every list of blocks;
    - `transformer_blocks.3`, `transformer_blocks.0-5`: the same in one list;
    - `attn` or `attn.to_q`: layers with these names in their path;
    - anything else: a regular expression for the whole name.

    Empty lines and what follows a # are left out.

    Raises:
        DiffScalerError: A line that cannot be read; the message names it.
    """
    weights: dict[str, float] = {}
    for row, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        where = f"line {row} of the block strengths, {shown(line)}"
        which, colon, number = line.rpartition(":")
        if not colon or not which.strip():
            raise DiffScalerError(f"{where}: write 'which: factor', such as '0-5: 0.5'")
        weights.setdefault(_pattern(which.strip(), where), read_number(number.strip(), where))
    return weights


def _pattern(which: str, where: str) -> str:
    if len(which) > _MOST_LETTERS:  # before our own pattern reads it, whose time is its square
        raise DiffScalerError(f"{where}: no pattern has {len(which)} letters")
    numbered = _RANGE.fullmatch(which)
    if numbered:
        low, high = numbered["first"], numbered["last"] or numbered["first"]
        first, last = (int(word) if len(word) < 9 else _MOST_BLOCKS for word in (low, high))
        if not first <= last < _MOST_BLOCKS:
            raise DiffScalerError(f"{where}: blocks {shown(low)} to {shown(high)} is no range")
        blocks = "|".join(map(str, range(first, last + 1)))
        if numbered["list"]:
            return rf"(.*\.)?{re.escape(numbered['list'])}\.({blocks})(\..*)?"
        # the first number in the path, and no later one
        return rf"[A-Za-z_]((?!\.\d).)*\.({blocks})(\..*)?"
    if _PLAIN.fullmatch(which):
        return rf"(.*\.)?{re.escape(which)}(\..*)?"
    try:
        compiled(which)
    except DiffScalerError as error:
        raise DiffScalerError(f"{where}: no block, no name and no pattern: {error}") from error
    return which


def read_number(word: str, where: str) -> float:
    """Returns the finite number a word says; `where` begins the message if it says none."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DiffScalerError(f"{where}: {shown(word)} is no number")
    return number
