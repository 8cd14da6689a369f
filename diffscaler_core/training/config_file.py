"""A run's configuration file: TOML in, checked settings out, and back. Loads no model, no picture.

Every mistake is one line with the file's name and the line's number, before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DiffScalerError, reason_of, shown
from .config import TrainingConfig
from .settings import (
    SECTIONS,
    SETTINGS,
    TASK_KEYS,
    RunSettings,
    Setting,
    check_choice,
    expanded,
    settings_of,
)

#: A section that a run writes for people to read; reading ignores it.
FACTS = "facts"
MAX_BYTES = 2**20
#: The largest whole number that is meant; a seed has 64 bits.
MOST = 2**64
_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS[Path] = "a path, as a text"
_TABLE = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*(?:\"([^\"]+)\"|'([^']+)'|([A-Za-z0-9_-]+))\s*=")


def read_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunSettings:
    """Returns the run that a file and flags describe; flags win.

    Args:
        path: The TOML file; None: flags only.
        overrides: Key of SETTINGS -> value; None counts as not said.

    Raises:
        DiffScalerError: Anything wrong with either, one line.
        FileNotFoundError: No such file.
    """
    values = {} if path is None else _File(Path(path)).values()
    for name, value in (overrides or {}).items():
        if value is not None:
            values[name] = checked(SETTINGS[name], value)
    try:
        return settings_of(values)
    except DiffScalerError as error:
        said = f"{Path(path).name}: " if path is not None else ""
        raise type(error)(f"{said}{error}") from None


def checked(setting: Setting, value: Any) -> Any:
    """Returns a value as its setting's type.

    Raises:
        DiffScalerError: It is of another type, is none of the choices, or is out of range.
    """
    kind = setting.kind
    if setting.many and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return list(value)
    if isinstance(value, int) and not -MOST <= value <= MOST:
        raise DiffScalerError(
            f"{setting.name} must not be a number of {len(hex(value)) - 2} digits"
        )
    if isinstance(value, int) and not isinstance(value, bool) and kind is float:
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise DiffScalerError(f"{setting.name} must be a finite number, got {value}")
    if setting.text and isinstance(value, str):
        short = value.strip()
        value = int(short) if short.isdecimal() and len(short) < len(str(MOST)) else short
    taken = (str, Path) if kind is Path else (int, str) if setting.text else (kind,)
    if type(value) not in taken and not (kind is Path and isinstance(value, Path)):
        more = ", or a list of texts" if setting.many else ""
        raise DiffScalerError(f"{setting.name} must be {_KINDS[kind]}{more}, got {shown(value)}")
    if kind in (str, Path) and not str(value).strip():
        raise DiffScalerError(f"{setting.name} is empty; leave it out for the default")
    if kind in (str, Path) and "\0" in str(value):
        raise DiffScalerError(f"{setting.name} must not hold a NUL, got {shown(str(value))}")
    check_choice(setting, value)
    if setting.name in TrainingConfig.__dataclass_fields__:
        alone = {"batch": value} if setting.name == "accumulate" else {}  # it must divide that
        TrainingConfig(**{**alone, setting.name: value})  # its own rules
    least = {"size": 1, "crops": 0}.get(setting.name)
    if least is not None and value < least:
        raise DiffScalerError(f"{setting.name} must be at least {least}, got {value}")
    return expanded(value) if kind is Path else value


def dump(config: TrainingConfig, settings: RunSettings | None = None, **facts: Any) -> str:
    """Returns a run as the text of a file that `read_config` reads.

    Args:
        config: All of it is written, also what was never said: defaults may change one day.
        settings: What the run was told beside it.
        facts: What is known of the run; written into a section of its own, which reading ignores.
    """
    said = dict(settings.values) if settings else {}
    entries = said.pop("tasks", ())
    unsaid = ("name", "control") if entries else ()
    written = {
        k: v for k, v in asdict(config).items() if v is not None and v != "" and k not in unsaid
    }
    values = {**written, **{k: v for k, v in said.items() if k not in written}}
    parts = []
    for section in SECTIONS:
        own = [n for n, s in SETTINGS.items() if s.section == section and n in values]
        head = f"[{section}]\n" if section else ""
        if own:
            parts.append(head + "".join(f"{n} = {_value(values[n])}\n" for n in own))
    for entry in entries:
        parts.append("[[tasks]]\n" + "".join(f"{k} = {_value(v)}\n" for k, v in entry.items()))
    known = {str(k): v for k, v in facts.items() if v is not None}
    if known:
        lines = "".join(f"{_bare(k)} = {_value(v)}\n" for k, v in known.items())
        parts.append(f"[{FACTS}]\n{lines}")
    return "\n".join(parts)


class _File:
    """One file's text and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
                raise DiffScalerError(
                    f"{str(path)!r} is a folder or a device, not a configuration file"
                )
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DiffScalerError(f"could not read {str(path)!r}: {reason_of(error)}") from error
        if len(raw) > MAX_BYTES:
            raise DiffScalerError(f"{path.name} has over {MAX_BYTES} bytes: no configuration has")
        try:
            self.text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DiffScalerError(f"{path.name} is no UTF-8 text, so no TOML") from None
        self.lines = _line_numbers(self.text)

    def values(self) -> dict[str, Any]:
        """Returns every key's value, checked."""
        values: dict[str, Any] = {}
        for name, value in self._parsed().items():
            if name == FACTS:
                continue
            if name == "tasks":
                values["tasks"] = self._tasks(value)
            elif name in SECTIONS and isinstance(value, dict):
                for key, own in value.items():
                    self._take(values, key, own, name)
            else:
                self._take(values, name, value, "")
        return values

    def _parsed(self) -> dict[str, Any]:
        toml = _toml()
        try:
            parsed: dict[str, Any] = toml.loads(self.text.replace("\r\n", "\n"))
        except ValueError as error:  # TOMLDecodeError
            found = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
            said = f" line {found[2]}: {found[1]}" if found else f": {reason_of(error)}"
            raise DiffScalerError(f"{self.path.name}{said}; see docs/training.md") from None
        except RecursionError:
            raise DiffScalerError(f"{self.path.name} is nested too deeply") from None
        return parsed

    def _take(self, values: dict[str, Any], key: str, value: Any, section: str) -> None:
        where = self._where(section, key)
        if key not in SETTINGS:
            raise DiffScalerError(f"{where}: unknown key {shown(key)}{_nearest(key, section)}")
        home = SETTINGS[key].section
        if section not in ("", home):
            place = f"in [{home}]" if home else "before the first section"
            raise DiffScalerError(f"{where}: {key} belongs {place}, not in [{section}]")
        if key in values:
            raise DiffScalerError(f"{where}: {key} is said twice")
        values[key] = self._checked(where, key, value)

    def _tasks(self, entries: Any) -> list[dict[str, Any]]:
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise DiffScalerError(f"{self._where('', 'tasks')}: write each task as [[tasks]]")
        tasks = []
        for i, entry in enumerate(entries):
            for key in entry:
                if key not in TASK_KEYS:
                    known = ", ".join(TASK_KEYS)
                    why = "is the same for all tasks" if key in SETTINGS else "is unknown"
                    where = self._where(f"tasks {i}", key)
                    raise DiffScalerError(f"{where}: {shown(key)} {why}; a task's keys: {known}")
            tasks.append(
                {k: self._checked(self._where(f"tasks {i}", k), k, v) for k, v in entry.items()}
            )
        return tasks

    def _checked(self, where: str, key: str, value: Any) -> Any:
        try:
            return checked(SETTINGS[key], value)
        except DiffScalerError as error:
            raise type(error)(f"{where}: {error}") from None

    def _where(self, section: str, key: str) -> str:
        places = ((section, key), (key, ""), (section, ""))
        line = next((self.lines[place] for place in places if place in self.lines), None)
        return f"{self.path.name} line {line}" if line else self.path.name


def _toml() -> Any:
    """Returns Python's own reader, or before Python 3.11 the package it was made from."""
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib  # type: ignore[import-not-found, unused-ignore, no-redef]
        except ModuleNotFoundError:
            raise DiffScalerError(
                "Python 3.10 cannot read TOML by itself; run: pip install tomli (or use flags)"
            ) from None
    return tomllib


def _line_numbers(text: str) -> dict[tuple[str, str], int]:
    """Returns (section, key) -> line, for messages; tomllib keeps no positions.

    The i-th `[[tasks]]` is the section "tasks i", and ("section", "") its own heading.
    """
    found: dict[tuple[str, str], int] = {}
    section, count = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if table := _TABLE.match(line):
            section = table[2].strip("\"' ")
            if table[1] == "[[":
                section, count = f"{section} {count}", count + 1
                found.setdefault(("tasks", ""), number)
            found.setdefault((section, ""), number)
        elif key := _KEY.match(line):
            found.setdefault((section, next(filter(None, key.groups()))), number)
    return found


def _nearest(key: str, section: str) -> str:
    """Returns the known name that was probably meant."""
    if section == "" and key not in SETTINGS:
        names: Sequence[str] = [*SETTINGS, *(f"[{s}]" for s in SECTIONS if s), "[[tasks]]"]
    else:
        names = list(SETTINGS)
    near = difflib.get_close_matches(key, names, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else "; see docs/training.md"


def _value(value: Any) -> str:
    """Returns a value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_bare(k)} = {_value(v)}" for k, v in value.items()) + "}"
    return _text(value)


def _bare(key: object) -> str:
    """Returns a key, quoted if it must be."""
    return str(key) if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else _text(key)


def _text(value: object) -> str:
    """Returns a TOML basic string: JSON's, without the one character that only JSON allows."""
    clean = str(value).encode("utf-8", "replace").decode()
    return json.dumps(clean, ensure_ascii=False).replace("\x7f", "\\u007f")
