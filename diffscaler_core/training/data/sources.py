"""Where pictures come from: a folder, a list in a file, or a data set. Decodes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DiffScalerError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LISTING = "metadata.jsonl"
#: Marks a data set of the library `datasets`: without it no name is ever looked up on the Hub.
DATASETS = "datasets:"
#: Names that prompts and control pictures have in lists and data sets, the first found counts.
PROMPT_KEYS = ("text", "caption", "prompt", "txt")
CONTROL_KEYS = ("control", "control_file_name", "conditioning_image", "control_image")
CONTROL_FOLDER = "_control"

Bytes = Path | Callable[[], bytes]


@dataclass(frozen=True)
class Example:
    """One picture and what it shows.

    Attributes:
        name: What messages call it.
        source: Its file, or a function that reads the file's bytes.
        prompt: What it shows.
        control: The control picture's file, if there is one.
        problem: Why it cannot be used, where that is known before the picture is read.
    """

    name: str
    source: Bytes
    prompt: str
    control: Bytes | None = None
    problem: str = ""

    def read(self) -> bytes:
        """Returns the picture's file.

        Raises:
            ValueError: It cannot be read; the message is the reason.
        """
        if self.problem:
            raise ValueError(self.problem)
        return _read(self.source, "")

    def read_control(self) -> bytes:
        """Returns the control picture's file; raises as `read` does."""
        if self.control is None:
            raise ValueError("has no control picture")
        return _read(self.control, "its control picture ")


def _read(source: Bytes, which: str) -> bytes:
    try:
        return source.read_bytes() if isinstance(source, Path) else source()
    except FileNotFoundError as error:
        raise ValueError(f"{which}is no longer there") from error
    except OSError as error:
        raise ValueError(f"{which}cannot be read: {error.strerror or error}") from error


def find_examples(
    where: Any,
    *,
    name: str = "task",
    control: str | Path | bool = False,
    split: str = "train",
    image: str | None = None,
    prompt: str | None = None,
) -> list[Example]:
    """Returns the pictures of a source, in an order that stays the same.

    Args:
        where: One of
            - a folder of pictures, or of one sub-folder per class: a picture's prompt is the text
              file beside it (`cat.png`, `cat.txt`), else the name of its class folder, else `name`;
            - a folder with a `metadata.jsonl`, or such a file: one JSON object a line, with
              "file_name" and one of PROMPT_KEYS (and one of CONTROL_KEYS);
            - "datasets:<name or path>", for the library `datasets` (the Hub, parquet files, what
              `save_to_disk` wrote), or one of its `Dataset` objects.
        name: Prompt of pictures that have none.
        control: Also find control pictures. True: in `<folder>_control`, by the same names, or
            under one of CONTROL_KEYS; a path: in that folder; for data sets, a column.
        split: Of a data set.
        image: Column of the pictures; default: the first that holds pictures.
        prompt: Column or key of the prompts; default: the first of PROMPT_KEYS, or class labels.

    Raises:
        DiffScalerError: No such place, or nothing in it.
    """
    if not isinstance(where, (str, Path)) or str(where).startswith(DATASETS):
        from .datasets_library import examples_of, load_dataset

        if isinstance(where, str):
            where = load_dataset(where[len(DATASETS) :], split)
        return examples_of(where, name, control, image, prompt)
    where = Path(where)
    if where.suffix == ".jsonl" and where.is_file():
        return _from_listing(where, control, prompt)
    if (where / LISTING).is_file():
        return _from_listing(where / LISTING, control, prompt)
    return find_pictures(where, name, control)


def find_pictures(
    folder: str | Path, name: str = "task", control: str | Path | bool = False
) -> list[Example]:
    """Returns the pictures of a folder and of its sub-folders, in the order of their paths.

    Hidden files and folders (.name) are left alone.

    Args:
        folder: Pictures, or one sub-folder of pictures per class.
        name: Prompt of pictures in the folder itself that have no text file.
        control: As in `find_examples`.

    Raises:
        DiffScalerError: No such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DiffScalerError(f"{str(folder)!r} is no folder; give a folder of pictures")
    found = []
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)  # macOS leaves ._cat.png
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            own = name if path.parent == folder else path.parent.name
            found.append(_captioned(path, inner.as_posix(), own))
    if not found:
        raise DiffScalerError(
            f"{str(folder)!r} holds no picture ({', '.join(SUFFIXES)}), also not in its sub-folders"
        )
    if control is False:
        return found
    beside = folder.with_name(folder.name + CONTROL_FOLDER) if control is True else Path(control)
    if not beside.is_dir():
        raise DiffScalerError(
            f"{str(beside)!r} is no folder; give the folder of control pictures, "
            f"or have them made of the pictures (control_from)"
        )
    return [_paired(example, beside) for example in found]


def _captioned(path: Path, name: str, own: str) -> Example:
    text = path.with_suffix(".txt")
    try:
        prompt = text.read_text(encoding="utf-8-sig").strip() if text.is_file() else own
    except UnicodeDecodeError:
        return Example(name, path, own, problem=f"{text.name} is not UTF-8 text")
    except OSError as error:
        return Example(name, path, own, problem=f"{text.name} cannot be read: {error.strerror}")
    return Example(name, path, prompt)


def _paired(example: Example, folder: Path) -> Example:
    stem = folder / Path(example.name).with_suffix("")
    for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES)):
        path = stem.with_name(stem.name + suffix)
        if path.is_file():
            return replace(example, control=path)
    problem = f"no control picture of that name in {str(folder)!r}"
    return replace(example, problem=example.problem or problem)


def _from_listing(path: Path, control: str | Path | bool, prompt: str | None) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DiffScalerError(f"{str(path)!r} is not UTF-8 text") from error
    except OSError as error:
        raise DiffScalerError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    found = [
        _from_line(line, number, path, control, prompt)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DiffScalerError(f"{str(path)!r} is empty; it needs one JSON object a line")
    return found


def _from_line(
    line: str, number: int, path: Path, control: str | Path | bool, key: str | None
) -> Example:
    name = f"{path.name} line {number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        return Example(name, path, "", problem=f"no JSON: {error.msg}")
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        return Example(name, path, "", problem='no "file_name"')
    name = f"{name}, {entry['file_name']}"
    file, prompt = path.parent / entry["file_name"], _first(entry, [key] if key else PROMPT_KEYS)
    if not file.is_file():
        return Example(name, path, "", problem="no such file")
    if prompt is None:
        return Example(
            name, path, "", problem=f"none of {', '.join([key] if key else PROMPT_KEYS)}"
        )
    if control is False:
        return Example(name, file, prompt)
    if control is not True and Path(control).is_dir():
        return _paired(replace(Example(entry["file_name"], file, prompt)), Path(control))
    keys = CONTROL_KEYS if control is True else [str(control)]
    value = _first(entry, keys)
    if value is None or not (path.parent / value).is_file():
        reason = f"none of {', '.join(keys)}" if value is None else f"no control picture {value!r}"
        return Example(name, file, prompt, problem=reason)
    return Example(name, file, prompt, path.parent / value)


def _first(entry: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    return next((entry[key] for key in keys if isinstance(entry.get(key), str)), None)
