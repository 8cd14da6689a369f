"""`diffscaler translate`: a picture of one task drawn anew as another's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic import write_whole
from ..errors import DiffScalerError, reason_of
from ..files import load_task
from .base_options import Base, Device, Dtype, Size, words_for
from .console import AsJson, check_device, check_folder, say, say_json

EXAMPLES = {
    "translate": (
        "diffscaler translate pictures/ink-kept/cat.png cat_neon.png --base assets/pocket "
        "--from ink.safetensors --to neon.safetensors --prompt cat",
        "Without --from the picture is the base's own. What the figures do: docs/translate.md.",
    )
}
#: Endings of files that can be written -> Pillow's formats.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def translate(
    picture: Annotated[Path, typer.Argument(help="The picture.")],
    target: Annotated[Path, typer.Argument(help="The picture to write (.png, .jpg, .webp).")],
    base: Base,
    source: Annotated[
        Path | None, typer.Option("--from", help="The task that the picture is of.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The task that it becomes one of.")] = None,
    prompt: Annotated[str, typer.Option(help="What the picture shows.")] = "",
    target_prompt: Annotated[
        str | None, typer.Option(help="What it is to show; default: the same.")
    ] = None,
    words: Annotated[Path | None, typer.Option(help="File of stored prompts.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where it may change.")] = None,
    strength: Annotated[float, typer.Option(help="How far back into noise, up to 1.")] = 0.8,
    steps: Annotated[int, typer.Option(help="There, and as many back.")] = 30,
    eta: Annotated[float, typer.Option(help="Share of noise in a step, 0 to 1.")] = 1.0,
    guidance: Annotated[float, typer.Option(help="Of the target; 1: none.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    size: Size = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw a picture anew under another task, from its own noise."""
    kind = FORMATS.get(target.suffix.lower())
    if kind is None:
        raise DiffScalerError(f"{target.name!r} must end in one of {', '.join(FORMATS)}")
    if source is None and to is None and target_prompt is None:
        raise DiffScalerError("nothing to translate to: say --to, --from or --target-prompt")
    check_device(device)
    check_folder(target.parent)
    found = _image(picture)
    where = None if mask is None else _image(mask)
    old, new = (None if file is None else load_task(file) for file in (source, to))

    from ..systems.pictures import translate_picture
    from ..training.bases.load import load_base

    image = translate_picture(
        load_base(base, dtype, device), found, old, new,
        prompt=prompt, target_prompt=target_prompt,
        words=words_for(base, words), mask=where, size=size,
        strength=strength, steps=steps, eta=eta, guidance=guidance, seed=seed,
    )  # fmt: skip
    buffer = io.BytesIO()
    image.save(buffer, kind)
    write_whole(target, buffer.getvalue())
    if as_json:
        names = [None if task is None else task.name for task in (old, new)]
        say_json({"file": str(target), "size": list(image.size), "from": names[0], "to": names[1]})
        return
    say(f"{target}: {image.width} × {image.height} pixels")


def _image(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        raise DiffScalerError(f"picture {str(path)!r} cannot be read: {reason_of(error)}") from None
