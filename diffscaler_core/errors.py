"""What can go wrong, and nothing else.

    DiffScalerError (ValueError)  anything this project refuses to do; the message says what to do
    ├── TaskFileError             a file that is no task file, is broken, or of an unknown version
    ├── MismatchError             a task that does not fit the model it met
    └── UnknownNameError          a method, preset, family, activation or task nobody knows

They derive from ValueError, so that code that cannot import this package can still catch them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


class DiffScalerError(ValueError):
    """Anything DiffScaler refuses to do."""


class TaskFileError(DiffScalerError):
    """A file that is not a task file, is broken, or has an unknown version."""


class MismatchError(DiffScalerError):
    """A task that does not fit the model it met."""


class UnknownNameError(DiffScalerError):
    """A name that is in none of the tables."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Returns the error for a `name` of some `kind` that is not among `known`."""
    return UnknownNameError(f"unknown {kind} {shown(name)}; known: {', '.join(known) or 'none'}")


def shown(value: object) -> str:
    """Returns a value as one short line, as names in foreign files may be as long as they like."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"


def reason_of(error: BaseException) -> str:
    """Returns what somebody else's error says, as one short line that any terminal can show."""
    line = str(error).partition("\n")[0]
    line = line if len(line) <= 300 else f"{line[:200]}…{line[-80:]}"
    return printable(line) or type(error).__name__


def printable(text: str) -> str:
    """Returns a text out of a foreign file without what would steer a terminal; lines stay."""
    if text.isprintable():
        return text
    lines = text.replace("\r\n", "\n").replace("\t", " ").split("\n")
    return "\n".join("".join(c if _is_shown(c) else "\ufffd" for c in line) for line in lines)


def _is_shown(letter: str) -> bool:
    # control characters, half characters, and the separators that some count as line ends
    return unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp")


def first_names(names: Iterable[str], count: int = 3) -> str:
    """Returns the first names quoted, and how many more there are: `'a', 'b' and 5 more`."""
    ordered = list(names)
    first = ", ".join(shown(name) for name in ordered[:count])
    return first + (f" and {len(ordered) - count} more" if len(ordered) > count else "")
