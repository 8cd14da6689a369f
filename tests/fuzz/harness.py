"""One loop for all targets: make an input, run it, and say what came of it.

A target draws its input from a `random.Random`, so that the same code is driven by a seed (the bulk
runs, one case by its number), by hypothesis (which shrinks what it finds) and by atheris (which
follows the branches taken).
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
import traceback
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

#: The most characters of an error's line.
MOST_LETTERS = 1500
#: Seconds of computing, and of waiting, that one case may take.
COMPUTING, WAITING = 5.0, 60.0
#: The most that one case may add to the process, and that Python may hold at once, in bytes.
MOST_GROWTH, MOST_HELD = 128 << 20, 64 << 20
#: Of so many cases one is run under tracemalloc, which makes it several times as slow.
TRACED = 50


class Hang(BaseException):
    """A case took too long. No Exception, so that nothing under test can swallow it."""


@dataclass(frozen=True)
class Target:
    """Something that reads input nobody vouches for.

    Attributes:
        name: Its name on the command line.
        make: Draws an input; all that it draws comes from the Random.
        run: Runs the code under test; `folder` is empty at the start and its own.
        expected: Errors that are right beside DiffScalerError.
        weights: How often hypothesis tries it in the tests.
    """

    name: str
    make: Callable[[Random], Any]
    run: Callable[[Any, Path], None]
    expected: tuple[type[Exception], ...] = ()
    examples: int = 40


@dataclass
class Tally:
    """What came of the cases.

    Attributes:
        cases: How many were run.
        accepted: How many succeeded.
        refused: How many ended in an error of ours (or one that is expected).
        failures: Case number -> what went wrong.
        slowest: Seconds, and the case.
        held: The most that Python held at once in a traced case, in bytes.
        grown: By how much the process grew, in bytes.
        messages: First words of refusals -> how often: what the cases reached.
    """

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    held: int = 0
    grown: int = 0
    messages: dict[str, int] = field(default_factory=dict)


def rng_of(seed: int, case: int) -> Random:
    """Returns the source of one case, the same wherever it is run."""
    return Random(f"{seed}/{case}")


def run_cases(
    target: Target,
    folder: Path,
    cases: range,
    seed: int,
    *,
    traced: int = TRACED,
    on_case: Callable[[int], None] = lambda case: None,
) -> Tally:
    """Runs cases by number; see `Tally`."""
    tally = Tally()
    before = _largest()
    for case in cases:
        on_case(case)
        trace = traced and case % traced == 0
        if trace:
            tracemalloc.start()
        largest, start = _largest(), time.process_time()
        fault, error = run_one(target, rng_of(seed, case), folder)
        seconds, growth = time.process_time() - start, _largest() - largest
        if trace:
            held = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            tally.held = max(tally.held, held)
            if held > MOST_HELD and fault is None:
                fault = f"held {held >> 20} MiB"
        if growth > MOST_GROWTH and fault is None and case > cases.start + traced:
            fault = f"grew by {growth >> 20} MiB"
        tally.cases += 1
        tally.slowest = max(tally.slowest, (seconds, case))
        if fault is not None:
            tally.failures[case] = fault
        elif error is None:
            tally.accepted += 1
        else:
            tally.refused += 1
            words = _kind(str(error))
            tally.messages[words] = tally.messages.get(words, 0) + 1
    tally.grown = _largest() - before
    return tally


def run_one(target: Target, rng: Random, folder: Path) -> tuple[str | None, Exception | None]:
    """Runs one case; returns what is wrong with its outcome (None: nothing), and its error."""
    case = target.make(rng)
    _emptied(folder)
    try:
        with limited():
            target.run(case, folder)
    except Hang as hang:
        return f"{hang} on {short(case)}", None
    except AssertionError as failed:
        return f"{failed} on {short(case)}", None
    except Exception as error:
        if not isinstance(error, target.expected) and not is_ours(error):
            trace = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(trace.filename).name}:{trace.lineno}"
            return f"{type(error).__name__} at {place}: {error} on {short(case)}", error
        wrong = what_is_wrong(str(error))
        return (f"{wrong}: {str(error)[:300]!r} on {short(case)}" if wrong else None), error
    return None, None


def is_ours(error: Exception) -> bool:
    """Says whether an error is a DiffScalerError, of this package or of a copy of it."""
    return any(kind.__name__ == "DiffScalerError" for kind in type(error).__mro__)


def what_is_wrong(message: str) -> str | None:
    """Returns what is wrong with an error's line, or None."""
    if not message.strip():
        return "an empty message"
    if len(message) > MOST_LETTERS:
        return f"a message of {len(message)} characters"
    return not_printable(message)


def not_printable(text: str, but: str = "") -> str | None:
    """Returns why a terminal should not be shown a text, or None."""
    for letter in text:
        kind = unicodedata.category(letter)
        if letter not in but and kind in ("Cc", "Cs", "Zl", "Zp"):
            return f"a text with {letter!r}"
    return None


def short(case: Any) -> str:
    """Returns a case as text for a report."""
    text = repr(case)
    return text if len(text) < 400 else f"{text[:300]} … {text[-60:]} ({len(text)} characters)"


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises Hang in what takes too long, computing or waiting."""

    def stop(number: int, _: Any) -> None:
        raise Hang("computed for ever" if number == signal.SIGVTALRM else "waited for ever")

    kept = [signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_VIRTUAL, COMPUTING)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in zip((signal.SIGVTALRM, signal.SIGALRM), kept, strict=True):
            signal.signal(number, old)


def _emptied(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _emptied(path)
            path.rmdir()
        else:
            path.unlink()


def _kind(message: str) -> str:
    """Returns a message without what differs from case to case."""
    words = [w for w in message.split() if w.isalpha()]
    return " ".join(words[:8])


def _largest() -> int:
    """Returns the most memory the process has ever held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
