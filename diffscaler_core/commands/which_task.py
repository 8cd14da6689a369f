"""`diffscaler which-task`: which of several tasks made a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from ..errors import DiffScalerError
from ..files import load_task
from ..systems.ranking import NONE, Ranking
from ..systems.which_task import ProbeSettings, Stage, which_tasks
from ..task import TaskAdapter
from ..training.data.pixels import load_picture
from ..training.data.sources import SUFFIXES
from ..training.denoiser import Denoiser
from .base_options import Base, Device, Dtype, Size, opened
from .console import AsJson, check_device, say, say_json

_DEFAULTS = ProbeSettings()
EXAMPLES = {
    "which-task": (
        "diffscaler which-task pictures/ink-kept/cat.png --base assets/pocket "
        "--task ink.safetensors --task neon.safetensors",
        "diffscaler which-task pictures/ink-kept --base assets/pocket --task ink.safetensors "
        "--task glow=neon.safetensors --probes 8 --json",
        "diffscaler which-task pictures/ink-kept/cat.png --base assets/pocket "
        "--prompts cat,dog,house --stages 4:2,32:1 --chart ranking.png",
        "How it is found out, and when it is none of them: docs/which_task.md.",
    )
}


def which_task(
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    base: Base,
    task: Annotated[
        list[str] | None, typer.Option(help="A task file, or name=file; may be repeated.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts as candidates, as cat,dog: with the base alone, or task=cat,dog: with a "
            "task; may be repeated."
        ),
    ] = None,
    words: Annotated[Path | None, typer.Option(help="File of stored prompts.")] = None,
    probes: Annotated[int, typer.Option(help="Of the candidates that stay.")] = _DEFAULTS.probes,
    stages: Annotated[
        str | None,
        typer.Option(help="probes:kept, as 4:3,16:1; 16:1 drops nothing early; default: halving."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Standard errors by which a task must beat the base.")
    ] = _DEFAULTS.threshold,
    least: Annotated[
        float, typer.Option(help="Share of the base's error by which it must, 0 to 1.")
    ] = _DEFAULTS.least,
    error: Annotated[
        str, typer.Option(help="own: of what the base predicts; noise: of the noise.")
    ] = _DEFAULTS.error,
    batch: Annotated[int, typer.Option(help="Rows of one forward pass.")] = _DEFAULTS.batch,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = _DEFAULTS.seed,
    chart: Annotated[Path | None, typer.Option(help="PNG of one picture's ranking.")] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which of several tasks made a picture, or that none did."""
    settings = ProbeSettings(
        probes=probes, stages=_stages(stages), threshold=threshold, least=least, error=error,
        batch=batch, seed=seed,
    )  # fmt: skip
    files = _files(pictures)
    if chart is not None and len(files) > 1:
        raise DiffScalerError(f"--chart draws one picture's ranking, but {len(files)} are given")
    tasks = _tasks(task or ())
    asked = _prompts(prompts or ())
    check_device(device)
    denoiser, table = opened(base, words, dtype, device)
    side = _side(denoiser, size)
    read: list[Tensor] = []
    shown: list[dict[str, Any]] = []
    found = which_tasks(
        denoiser, _pictures(files, side, denoiser.channels, read), tasks, asked, settings,
        words=table,
    )  # fmt: skip
    for file, ranking in zip(files, found, strict=True):
        shown.append({"picture": str(file), **ranking.plain()})
        if not as_json:
            _print(file, ranking, alone=len(files) == 1)
        if chart is not None:
            _draw(chart, ranking, read[0])
    if as_json:
        say_json(shown[0] if len(files) == 1 else shown)


def _print(file: Path, ranking: Ranking, alone: bool) -> None:
    if alone:
        say(ranking.table())
        return
    best = ranking.best
    closest = "" if ranking.answer else f"; closest {best.name}"
    margin = "" if ranking.margin is None else f", margin {ranking.margin[0]:.5f}"
    by = f"{best.sigmas:+.1f} std. errors, {best.share:+.1%}"
    say(f"{file}: {ranking.answer or NONE} ({by}{margin}{closest})")


def _draw(file: Path, ranking: Ranking, picture: Tensor) -> None:
    import io

    from ..atomic import write_whole
    from ..systems.ranking_chart import draw_ranking

    buffer = io.BytesIO()
    draw_ranking(ranking, picture).save(buffer, "PNG")
    write_whole(file, buffer.getvalue())


def _files(given: Sequence[Path]) -> list[Path]:
    """Returns the pictures of all files and folders, a folder's in the order of their names."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            own = sorted(inside)
            if not own:
                raise DiffScalerError(f"no picture in {str(path)!r} ({', '.join(SUFFIXES)})")
            found += own
        else:
            found.append(path)
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise DiffScalerError(f"no file {str(missing)!r}")
    return found


def _pictures(
    files: Sequence[Path], side: int, channels: int, read: list[Tensor]
) -> Iterator[Tensor]:
    """Yields each picture, (channels, side, side) in −1..1; the last one stays in `read`."""
    for file in files:
        try:
            picture = load_picture(file, side, channels)
        except ValueError as error:
            raise DiffScalerError(f"{str(file)!r} {error}") from error
        read[:] = [picture]
        yield picture


def _side(denoiser: Denoiser, size: int | None) -> int:
    side = size or denoiser.size
    if side is None:
        raise DiffScalerError("this base does not say its size; give --size in pixels")
    if side % denoiser.factor:
        raise DiffScalerError(f"size {side} must be a multiple of {denoiser.factor} for this base")
    return side


def _tasks(said: Sequence[str]) -> dict[str, TaskAdapter]:
    tasks: dict[str, TaskAdapter] = {}
    for text in said:
        name, equals, file = text.partition("=")
        if not equals or not name or Path(text).exists():
            name, file = Path(text).stem, text
        if name in tasks:
            raise DiffScalerError(f"two tasks would be called {name!r}; write --task other={file}")
        tasks[name] = load_task(file)
    return tasks


def _prompts(said: Sequence[str]) -> dict[str | None, Sequence[str]]:
    """Returns {task or None: prompts} of texts such as "cat,dog" and "ink=cat,dog"."""
    found: dict[str | None, list[str]] = {}
    for text in said:
        name, equals, rest = text.partition("=")
        listed = [part.strip() for part in (rest if equals else text).split(",") if part.strip()]
        found.setdefault(name.strip() if equals else None, []).extend(listed)
    return dict(found)


def _stages(text: str | None) -> tuple[Stage, ...] | None:
    """Returns the stages of a text such as "4:3,16:1"."""
    if text is None:
        return None
    stages: list[Stage] = []
    for part in text.replace(",", " ").split():
        probes, colon, kept = part.partition(":")
        if not colon or not probes.isdecimal() or not kept.isdecimal():
            raise DiffScalerError(f"stages {text!r}: write them as probes:kept, such as 4:3,16:1")
        stages.append((int(probes), int(kept)))
    return tuple(stages)
