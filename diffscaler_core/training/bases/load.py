"""Finding and loading a base for training, by what a user types: a folder or a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import DiffScalerError, unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Where a pocket base keeps its denoiser, and any base the prompts it was trained with.
POCKET = "diffusion_models/diffscaler_pocket.safetensors"
WORDS = "diffscaler/words.safetensors"


def load_base(name: str, dtype: str = "float32", device: str = "auto") -> Any:
    """Returns a pipeline, in that dtype and on that device.

    Args:
        name: A diffusers folder, a folder laid out like the pocket base, or a repository on the
            Hub ("owner/name").
        dtype: A name in DTYPES; the base stays in it. A VAE stays in float32.
        device: "auto" (an accelerator if there is one), or torch's name of a device.

    Raises:
        DiffScalerError: No such base, or it cannot be loaded; one line.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder = Path(name).expanduser()
    if is_pocket(folder):
        from ...pocket import load_pipeline

        pipe = load_pipeline(folder)
    elif folder.is_dir() and not (folder / "model_index.json").is_file():
        raise DiffScalerError(
            f"{name!r} is no base: it holds neither model_index.json (a diffusers pipeline) nor "
            f"{POCKET} (a pocket base)"
        )
    else:
        pipe = _from_pretrained(name, folder)
    model = getattr(pipe, "transformer", None) or pipe.unet
    if model.dtype != DTYPES[dtype]:
        model.to(DTYPES[dtype])
    return pipe.to(_device(device))


def default_words(name: str) -> Path | None:
    """Returns the file of stored prompts that lies in a base's own folder, or None."""
    words = Path(name).expanduser() / WORDS
    return words if words.is_file() else None


def is_pocket(folder: Path) -> bool:
    """Says whether a folder is laid out like the pocket base."""
    return (folder / POCKET).is_file()


def _from_pretrained(name: str, folder: Path) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise DiffScalerError(
            "training on the command line needs diffusers; run: pip install 'diffscaler[train]'"
        ) from error
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise DiffScalerError(
            f"no folder {name!r}; a repository on the Hub is written 'owner/name'"
        )
    try:
        return DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DiffScalerError(f"base {name!r} could not be loaded: {reason}") from error


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    try:  # accelerate knows every kind of accelerator, and which one a launch gave this process
        from accelerate import Accelerator
    except ImportError:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(Accelerator().device)
