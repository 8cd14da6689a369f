"""Data sets of the library `datasets`, which columns of them hold what, and their rows as examples.

The library is not a dependency: it is imported when a data set is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import DiffScalerError, unknown
from .sources import CONTROL_KEYS, PROMPT_KEYS, Example


def require_datasets() -> Any:
    """Returns the library `datasets`.

    Raises:
        DiffScalerError: It is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DiffScalerError(
            "data sets need the library `datasets`: pip install datasets"
        ) from error
    return datasets


def load_dataset(where: str, split: str, *, streaming: bool = False) -> Any:
    """Returns a data set of the library `datasets`: by name, or a local folder.

    Raises:
        DiffScalerError: The library is missing, or cannot load it.
    """
    datasets = require_datasets()
    try:
        if (Path(where) / "state.json").is_file() or (Path(where) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(where)
            loaded = loaded[split] if isinstance(loaded, Mapping) else loaded
            return loaded.to_iterable_dataset() if streaming else loaded
        return datasets.load_dataset(where, split=split, streaming=streaming)
    except _errors(datasets) as error:
        reason = " ".join(str(error).split())[:200]
        raise DiffScalerError(f"data set {where!r}, split {split!r}: {reason}") from error


def load_tars(files: Sequence[str]) -> Any:
    """Returns tar files, as webdataset writes them, as a stream.

    Raises:
        DiffScalerError: The library is missing, or the files are no such.
    """
    datasets = require_datasets()
    try:
        return datasets.load_dataset(
            "webdataset", data_files={"train": list(files)}, split="train", streaming=True
        )
    except _errors(datasets) as error:
        reason = " ".join(str(error).split())[:200]
        raise DiffScalerError(f"{len(files)} tar files from {files[0]!r}: {reason}") from error


def _errors(datasets: Any) -> tuple[type[Exception], ...]:
    """What loaders of foreign files, and the network, raise."""
    import tarfile

    own = datasets.exceptions.DatasetsError
    return (OSError, ValueError, KeyError, RuntimeError, EOFError, tarfile.TarError, own)


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what.

    Attributes:
        image: The pictures.
        prompt: What they show; None if nothing says so.
        labels: The class names, if `prompt` holds class numbers.
        control: The control pictures, if they are wanted.
    """

    image: str
    prompt: str | None
    labels: tuple[str, ...] | None
    control: str | None

    def counting(self, prompts: Sequence[str], features: Mapping[str, Any]) -> Columns:
        """Returns the same, with numbers in the prompts' column counting through `prompts`."""
        kind = getattr(features[self.prompt or ""], "dtype", "")
        return replace(self, labels=tuple(prompts)) if kind.startswith("int") else self

    def prompt_of(self, value: Any, default: str) -> str:
        """Returns the prompt that a cell of the column stands for; ValueError if it has none."""
        if self.prompt is None:
            return default
        if self.labels is not None and isinstance(value, int) and 0 <= value < len(self.labels):
            return self.labels[value]
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if self.labels is not None or not isinstance(value, str):
            raise ValueError(f"column {self.prompt!r} holds {value!r}, which names nothing")
        return value.strip()


def find_columns(
    features: Mapping[str, Any], image: str | None, prompt: str | None, control: str | Path | bool
) -> Columns:
    """Returns which columns of a data set hold what.

    Raises:
        DiffScalerError: There is no such column.
    """
    datasets = require_datasets()
    for column in (image, prompt, control if isinstance(control, str) else None):
        if column is not None and column not in features:
            raise unknown("column", column, features)
    pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    controls = [key for key in CONTROL_KEYS if key in features]
    if isinstance(control, bool):
        other = controls[0] if control and controls else None
    else:
        other = str(control)
    if control is not False and other is None:
        raise unknown("column", "control", features)
    images = [key for key in pictures if key != other and key not in CONTROL_KEYS]
    if image is None and not images:
        raise DiffScalerError(
            f"no column of the data set holds pictures; it has {', '.join(features)}"
        )
    labels = {
        key: tuple(kind.names)
        for key, kind in features.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    known = [key for key in PROMPT_KEYS if key in features] + list(labels)
    prompt = prompt or (known[0] if known else None)
    return Columns(image or images[0], prompt, labels.get(prompt or ""), other)


def cell_bytes(cell: Any) -> bytes:
    """Returns the file in an undecoded picture cell of a data set.

    Raises:
        ValueError: The cell is empty.
        OSError: It names a file that cannot be read.
    """
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise ValueError("holds no picture")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def examples_of(
    dataset: Any, name: str, control: str | Path | bool, image: str | None, prompt: str | None
) -> list[Example]:
    """Returns a data set's rows; their pictures are read one at a time, when they are asked for.

    Args:
        dataset: A `datasets.Dataset`.
        name: Prompt, where no column holds one.
        control: As in `sources.find_examples`.
        image: Column of the pictures.
        prompt: Column of the prompts.

    Raises:
        DiffScalerError: It is empty, is no data set, or has no such columns.
    """
    if not (hasattr(dataset, "features") and hasattr(dataset, "cast_column")):
        raise DiffScalerError(f"{type(dataset).__name__} is no folder, file or data set")
    if not len(dataset):
        raise DiffScalerError("the data set is empty")
    columns = find_columns(dataset.features, image, prompt, control)
    undecoded = require_datasets().Image(decode=False)

    def cells(column: str | None) -> Any:
        return column and dataset.select_columns([column]).cast_column(column, undecoded)

    def reader(only: Any, row: int, column: str) -> Callable[[], bytes]:
        return lambda: cell_bytes(only[row][column])

    images, controls = cells(columns.image), cells(columns.control)
    said = list(dataset[columns.prompt]) if columns.prompt else [None] * len(dataset)
    found = []
    for row, value in enumerate(said):
        own, problem = "", ""
        try:
            own = columns.prompt_of(value, name)
        except ValueError as error:
            problem = str(error)
        other = reader(controls, row, columns.control) if columns.control else None
        source = reader(images, row, columns.image)
        found.append(Example(f"row {row}", source, own, other, problem))
    return found
