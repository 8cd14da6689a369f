"""Commands that look at pictures with a base: the options that name it, and opening it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import load_task

if TYPE_CHECKING:
    from ..task import TaskAdapter
    from ..training.denoiser import Denoiser

Base = Annotated[str, typer.Option(help="A diffusers folder, or owner/name on the Hub.")]
Size = Annotated[int | None, typer.Option(help="Side in pixels; default: the base's.")]
Dtype = Annotated[str, typer.Option(help="Of the base.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]


def words_for(base: str, words: Path | None) -> TaskAdapter | None:
    """Returns the stored prompts of a file, else those beside the base, None if there are none."""
    from ..training.bases.load import default_words

    own = words or default_words(base)
    return None if own is None else load_task(own)


def opened(
    base: str, words: Path | None, dtype: str, device: str
) -> tuple[Denoiser, TaskAdapter | None]:
    """Returns the base, and its stored prompts if there are any.

    Raises:
        DiffScalerError: The base or the prompts cannot be read.
    """
    from ..training.bases.load import load_base
    from ..training.bases.pipelines import as_denoiser

    table = words_for(base, words)
    return as_denoiser(load_base(base, dtype, device)), table
