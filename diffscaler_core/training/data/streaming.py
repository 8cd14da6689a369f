"""Training data larger than the disk: read, decoded and encoded on the way, never kept.

The library `datasets` reads it: data sets of the Hub, parquet files, and tar files as webdataset
writes them, here or elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DiffScalerError, first_names, unknown
from ..denoiser import Encode
from ..randomness import generator_for, mixed
from .batches import Batch
from .controls import MakeControl, made, maker_of
from .datasets_library import Columns, cell_bytes, find_columns, load_dataset, load_tars
from .pixels import View, check_size, cut, decode_picture
from .sources import DATASETS

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
EncodeText = Callable[[list[str]], dict[str, Tensor]]


class StreamedData:
    """Pictures of a stream, with the interface of `TrainingData`.

    Batch number n holds the rows n · size … of a stream that is shuffled by the seed, so it is the
    same whenever it is asked for. Asked for in order, batches cost nothing extra; any other step
    (a resumed run, or a second seed) reads the stream again up to there, without decoding or
    encoding what it passes: the time of fetching those files.

    A row that cannot be used is named once and replaced by the next good one of its batch.

    Attributes:
        prompts: The prompts' names. With `encode_text` it is one, and batches carry a condition.
        skipped: Rows that could not be used, with the reason; the first hundred.
        control: Always None; control pictures come with the batches.
        image_ids: Always empty.
    """

    control = None
    image_ids: tuple[str, ...] = ()

    def __init__(
        self,
        dataset: Any,
        columns: Columns,
        size: int,
        encode: Encode,
        prompts: Sequence[str],
        *,
        encode_text: EncodeText | None = None,
        flip: bool = False,
        channels: int = 3,
        shuffle: int = 1000,
        validation: int = 0,
        make_control: MakeControl | None = None,
    ) -> None:
        """Takes a stream as it is; `stream` finds out most of this by itself.

        Args:
            dataset: A `datasets.IterableDataset` whose pictures are not decoded.
            columns: What is where.
            size: Side of the square that pictures are cropped to, in pixels.
            encode: Pixels (B, channels, size, size) in −1..1 -> latents (B, C, h, w).
            prompts: All prompts there are.
            encode_text: Texts -> their condition: prompts are then whatever the stream says.
            flip: Mirror half of the pictures.
            channels: 3, or 1 for grey pictures.
            shuffle: Rows that are held to draw from; 0: the stream's own order.
            validation: How many of the first rows are kept back for `split`.
            make_control: Makes the control pictures of the pictures.
        """
        self.dataset, self.columns, self.size, self.encode = dataset, columns, size, encode
        self.prompts, self.encode_text = tuple(prompts), encode_text
        self.flip, self.channels, self.shuffle = flip, channels, shuffle
        self.validation, self.make_control = validation, make_control
        self.skipped: tuple[str, ...] = ()
        self._numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        self._length: int | None = None
        self._place: tuple[int, int] | None = None
        self._rows: Iterator[Row] = iter(())
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """How many rows an epoch has: 0 until a whole one has gone by."""
        return self._length or 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, h, w), from encoding one picture of one grey."""
        if self._shape is None:
            grey = torch.zeros(1, self.channels, self.size, self.size)
            with torch.no_grad():
                self._shape = tuple(self.encode(grey).shape[1:])
        return self._shape

    def batch(self, size: int, seed: int, step: int) -> Batch:
        """Returns batch number `step` (from 0) of a seed.

        Raises:
            DiffScalerError: No row of it can be used, a prompt that is none of `prompts`, or NaN.
        """
        if self._place != (seed, step * size):
            self._rows = self._from(seed, step * size)
        rows = [next(self._rows) for _ in range(size)]
        self._place = (seed, (step + 1) * size)
        mirrored = torch.rand(size, generator=generator_for(seed, "views", step)) < 0.5
        return self._batch(rows, mirrored.tolist() if self.flip else [False] * size)

    def whole(self, size: int) -> Iterator[Batch]:
        """Yields every picture once, as is, in order; of a validation set from memory."""
        for rows in self._groups(size):
            yield self._batch(rows, [False] * len(rows))

    def split(self, share: float, seed: int = 0) -> tuple[StreamedData, StreamedData]:
        """Returns (the stream without its first `validation` rows, those rows held in memory).

        Args:
            share: 0: nothing is kept back. Its size does not matter: a stream's length is unknown.
            seed: Does not matter: the first rows are the same for every seed.
        """
        count = self.validation if share > 0 else 0
        rest = self.dataset.skip(count) if count else self.dataset
        held = self._with(HeldOut, self.dataset.take(count))
        held._length = count
        return self._with(StreamedData, rest), held

    def _with(self, kind: type[StreamedData], dataset: Any) -> StreamedData:
        return kind(
            dataset,
            self.columns,
            self.size,
            self.encode,
            self.prompts,
            encode_text=self.encode_text,
            flip=self.flip,
            channels=self.channels,
            shuffle=self.shuffle,
            make_control=self.make_control,
        )

    def _groups(self, size: int) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for row in self.dataset:
            rows.append(row)
            if len(rows) == size:
                yield rows
                rows = []
        if rows:
            yield rows

    def _from(self, seed: int, start: int) -> Iterator[Row]:
        """Yields the endless stream of a seed, epoch after epoch, from a row on."""
        epoch = 0
        if self._length:
            epoch, start = divmod(start, self._length)
        while True:
            count = 0
            for row in self._epoch(seed, epoch):
                count += 1
                if count > start:
                    yield row
            if not count:
                raise DiffScalerError("the stream is empty")
            self._length, start, epoch = count, max(start - count, 0), epoch + 1

    def _epoch(self, seed: int, epoch: int) -> Any:
        if not self.shuffle:
            return self.dataset
        own = mixed(seed, "stream", epoch) % 2**32  # what numpy's generators take
        return self.dataset.shuffle(seed=own, buffer_size=self.shuffle)

    @torch.no_grad()
    def _batch(self, rows: Sequence[Row], mirrored: Sequence[bool]) -> Batch:
        read = [self._read(row, View(mirror)) for row, mirror in zip(rows, mirrored, strict=True)]
        good = [i for i, row in enumerate(read) if row is not None]
        if not good:
            why = first_names(self.skipped[-len(rows) :])
            raise DiffScalerError(f"no row of a batch of {len(rows)} can be used: {why}")
        # A bad row's place is taken by the next good one, the last ones' by the first.
        places = [next((i for i in good if i >= at), good[0]) for at in range(len(rows))]
        chosen = [row for row in (read[i] for i in places) if row is not None]
        pixels, controls, texts = zip(*chosen, strict=True)
        if self.encode_text is not None:
            index = torch.zeros(len(rows), dtype=torch.long)
            condition = self.encode_text(list(texts))
        else:
            index, condition = torch.tensor([self._number(text) for text in texts]), None
        given = [control for control in controls if control is not None]
        control = self._encoded(given) if given else None
        return Batch(self._encoded(pixels), index, control, condition)

    def _encoded(self, pixels: Sequence[Tensor]) -> Tensor:
        latents = self.encode(torch.stack(list(pixels))).float().cpu()
        if not bool(torch.isfinite(latents).all()):
            raise DiffScalerError("the VAE gave NaN or Inf; load it in float32")
        return latents

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            raise unknown("prompt of the stream", text, self.prompts[:10])
        return self._numbers[text]

    def _read(self, row: Row, view: View) -> tuple[Tensor, Tensor | None, str] | None:
        """Returns a row's pixels, its control's, and its prompt; None if it cannot be used."""
        columns = self.columns
        try:
            said = row[columns.prompt] if columns.prompt is not None else None
            text = columns.prompt_of(said, self.prompts[0])
            pixels, control = self._pixels(row[columns.image], view), None
            if self.make_control is not None:
                control = made(self.make_control, pixels)
            elif columns.control is not None:
                control = self._pixels(row[columns.control], view)
            return pixels, control, text
        except DiffScalerError:  # not the row's fault
            raise
        except (ValueError, OSError) as error:
            name = str(row.get("__key__", "a row"))
            if not self.skipped:
                logger.warning("skipped %s of the stream: %s; more are not reported", name, error)
            if len(self.skipped) < 100:
                self.skipped += (f"{name} ({error})",)
            return None

    def _pixels(self, cell: Any, view: View) -> Tensor:
        image = decode_picture(cell_bytes(cell), self.channels)
        target = (self.size, self.size)
        check_size((image.height, image.width), target)
        return cut(image, target, view)


class HeldOut(StreamedData):
    """The first rows of a stream, encoded when they are first looked at, and then kept."""

    _kept: tuple[int, list[Batch]] = (0, [])

    def whole(self, size: int) -> Iterator[Batch]:
        """Yields every picture once, as is, in order."""
        if size != self._kept[0]:
            self._kept = (size, list(super().whole(size)))
            self._length = sum(len(batch.x0) for batch in self._kept[1])
        yield from self._kept[1]


def stream(
    where: Any,
    size: int,
    encode: Encode,
    *,
    prompts: Sequence[str] | None = None,
    encode_text: EncodeText | None = None,
    name: str = "task",
    split: str = "train",
    image: str | None = None,
    prompt: str | None = None,
    control: str | bool = False,
    control_from: str | MakeControl | None = None,
    flip: bool = False,
    channels: int = 3,
    shuffle: int = 1000,
    validation: int = 0,
) -> StreamedData:
    """Returns a data set that is read while it is trained on.

    Args:
        where: "datasets:<name or path>", a `datasets.IterableDataset`, a tar file, a folder of tar
            files, or a list of them (paths or addresses).
        size: Side of the square the pictures are cropped to, in pixels.
        encode: Pixels (B, channels, size, size) in −1..1 -> latents (B, C, h, w).
        prompts: All prompts there are; default: the class names of a column of labels. Numbers in
            a column (webdataset's "cls") count through them.
        encode_text: Texts -> their condition, one row each: for captions, which nobody can list.
        name: The prompt of all pictures, if no column says anything.
        split: Of a data set.
        image: Column of the pictures; default: the first that holds pictures.
        prompt: Column of the prompts; default: as in `sources.find_examples`, or "cls".
        control: Column of control pictures; True: it has one of CONTROL_KEYS as its name.
        control_from: Make them of the pictures instead, as in `prepare.encode_folder`.
        flip: Mirror half of the pictures.
        channels: 3, or 1 for grey pictures.
        shuffle: Rows that are held, undecoded, to draw from; 0: the stream's own order.
        validation: How many of the first rows are kept back for `split`.

    Raises:
        DiffScalerError: The library `datasets` is missing, the data cannot be found, or nobody
            says what the prompts are.
    """
    if control_from is not None and control is not False:
        raise DiffScalerError("control pictures are either found (control) or made (control_from)")
    dataset = _open(where, split)
    features = dataset.features
    if features is None:
        raise DiffScalerError("the data set does not say what its columns hold (features)")
    if prompt is None and prompts is not None and "cls" in features:
        prompt = "cls"
    columns = find_columns(features, image, prompt, control)
    if columns.prompt is not None and columns.labels is None and prompts is not None:
        columns = columns.counting(prompts, features)
    known = prompts or columns.labels
    if known is None and columns.prompt is not None and encode_text is None:
        raise DiffScalerError(
            f"column {columns.prompt!r} holds captions, which are not known beforehand; give the "
            f"list of prompts, or a text encoder"
        )
    return StreamedData(
        dataset.decode(False),
        columns,
        size,
        encode,
        known if known is not None and encode_text is None else (name,),
        encode_text=encode_text if columns.prompt is not None else None,
        flip=flip,
        channels=channels,
        shuffle=shuffle,
        validation=validation,
        make_control=None if control_from is None else maker_of(control_from)[0],
    )


def _open(where: Any, split: str) -> Any:
    if isinstance(where, str) and where.startswith(DATASETS):
        return load_dataset(where[len(DATASETS) :], split, streaming=True)
    if not isinstance(where, (str, Path)) and hasattr(where, "shuffle"):
        return where.to_iterable_dataset() if hasattr(where, "to_iterable_dataset") else where
    files = [where] if isinstance(where, (str, Path)) else list(where)
    if len(files) == 1 and Path(files[0]).is_dir():
        folder = Path(files[0])
        files = sorted(folder.rglob("*.tar"))
        if not files:
            raise DiffScalerError(f"{str(folder)!r} holds no tar file")
    for file in files:
        if "://" not in str(file) and not Path(file).is_file():
            raise DiffScalerError(f"no tar file {str(file)!r}")
    return load_tars([str(file) for file in files])
