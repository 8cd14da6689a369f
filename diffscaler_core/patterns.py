"""Patterns of layer names that people type, or that come with somebody's workflow or file.

A regular expression may take for ever on a name of forty letters, and while it runs nothing can
stop it: Python holds its lock. So expressions whose time may grow like that are refused.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass

from .errors import DiffScalerError, reason_of, shown

#: The most repeats (*, +, {…}) that one way through a pattern may have.
MOST_REPEATS = 4
MOST_LETTERS = 6_000
_COUNT = re.compile(r"\{\d*,?\d*\}")


@functools.lru_cache(maxsize=512)
def compiled(pattern: str) -> re.Pattern[str]:
    """Returns a regular expression whose matching ends soon.

    Args:
        pattern: What somebody typed.

    Raises:
        DiffScalerError: It is no regular expression, or one that might not end.
    """
    reason = _why_slow(pattern)
    if reason is not None:
        raise DiffScalerError(f"the pattern {shown(pattern)} {reason}: write it more simply")
    try:
        with warnings.catch_warnings():  # of sets within sets, which Python may know one day
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DiffScalerError(
            f"{shown(pattern)} is no preset and no regular expression: {reason_of(error)}"
        ) from error


@dataclass
class _Group:
    """What has been read of a group so far: repeats of this way, of the others, and any choice."""

    here: int = 0
    others: int = 0
    has_choice: bool = False


def _why_slow(pattern: str) -> str | None:
    """Returns why matching might take for ever, None if it cannot; reads it once, left to right."""
    if len(pattern) > MOST_LETTERS:
        return f"has {len(pattern)} letters"
    groups, closed, at = [_Group()], False, 0  # closed: the last thing was a group with a choice
    while at < len(pattern):
        letter, own = pattern[at], groups[-1]
        count = _COUNT.match(pattern, at) if letter == "{" else None
        if letter in "*+" or count:
            if closed:
                return "repeats a group in which there is a choice or another repeat"
            own.here, own.has_choice, closed = own.here + 1, True, False
            at += len(count[0]) if count else 1
            at += pattern[at : at + 1] in ("?", "+")  # a lazy or possessive repeat is still one
            continue
        if letter == "?":
            own.has_choice = True
        elif letter == "(":
            groups.append(_Group())
            at += pattern[at + 1 : at + 2] == "?"
        elif letter == "|":
            own.others, own.here, own.has_choice = max(own.others, own.here), 0, True
        elif letter == ")" and len(groups) > 1:
            groups.pop()
            groups[-1].here += max(own.here, own.others)
            groups[-1].has_choice |= own.has_choice
        closed = letter == ")" and own.has_choice
        at = _after(pattern, at)
        if max(own.here, own.others, groups[-1].here) > MOST_REPEATS:
            break
    most = max(max(group.here, group.others) for group in groups)
    return f"has more than {MOST_REPEATS} repeats" if most > MOST_REPEATS else None


def _after(pattern: str, at: int) -> int:
    """Returns where the next thing begins: after a letter, an escaped letter or a set of them."""
    if pattern[at] == "\\":
        return at + 2
    if pattern[at] != "[":
        return at + 1
    at += 1 + (pattern[at + 1 : at + 2] == "^")
    at += pattern[at : at + 1] == "]"  # as the first of a set it is a letter
    while at < len(pattern) and pattern[at] != "]":
        at += 1 + (pattern[at] == "\\")
    return at + 1
