"""A task on the Hugging Face Hub: the card people read, and the folder that is uploaded.

`huggingface_hub` writes the card's head and does the upload. (diffusers' own card functions first
ask the Hub for a card that is there, need Jinja, and call the weights a LoRA.)
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...describe import describe
from ...errors import DiffScalerError
from ...families import FAMILIES
from ...hub import FILE_NAME
from ...task import TaskAdapter

TAGS = ("diffscaler", "adapter", "diffusers", "comfyui")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def check_repository(name: str) -> str:
    """Returns the name, if it can be one.

    Raises:
        DiffScalerError: It cannot, or `huggingface_hub` is not installed.
    """
    if not _REPOSITORY.fullmatch(name):
        raise DiffScalerError(f"push_to_hub {name!r} is no repository; write it 'owner/name'")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise DiffScalerError(
            "push_to_hub needs huggingface_hub; run: pip install huggingface_hub"
        ) from None
    return name


def card_text(
    repository: str, tasks: Mapping[str, TaskAdapter], base: str, samples: Sequence[str] = ()
) -> str:
    """Returns a model card: YAML head, what it is, how it is used, how it was trained.

    Args:
        repository: "owner/name".
        tasks: File name in the repository -> task.
        base: What the run was told as its base; only the name of a repository goes into the card,
            never a path of somebody's machine.
        samples: Names of pictures in the repository.
    """
    from huggingface_hub import ModelCardData

    first = next(iter(tasks.values()))
    on_hub = base if _REPOSITORY.fullmatch(base) and not Path(base).exists() else None
    licence = first.info.get("license")
    head = ModelCardData(
        base_model=on_hub,
        library_name="diffusers",
        license=str(licence) if licence else None,
        tags=list(TAGS),
    )
    names = ", ".join(task.name for task in tasks.values())
    pictures = "\n".join(f"![Samples]({name})" for name in samples)
    facts = "\n\n".join(f"`{file}`\n\n```\n{describe(task)}\n```" for file, task in tasks.items())
    return "\n\n".join(
        part
        for part in (
            f"---\n{head.to_yaml()}\n---",
            f"# {names}",
            f"{_what(tasks, on_hub, first)} The base itself is not changed and not part of this.",
            pictures,
            "## Use",
            _use(repository, list(tasks)),
            "In ComfyUI: put the file into `models/diffscaler`, then *Load DiffScaler Task*.",
            _control(tasks),
            _prompts(tasks),
            "## Facts",
            facts,
        )
        if part
    )


def write_card_folder(
    folder: Path,
    repository: str,
    tasks: Mapping[Path, TaskAdapter],
    base: str,
    pictures: Sequence[Path] = (),
) -> Path:
    """Fills a folder with what is uploaded: task files, samples, and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {FILE_NAME if len(tasks) == 1 else file.name: file for file in tasks}
    for name, file in named.items():
        shutil.copyfile(file, folder / name)
    shown = [picture for picture in pictures if picture.is_file()]
    for picture in shown:
        shutil.copyfile(picture, folder / picture.name)
    own = {name: tasks[file] for name, file in named.items()}
    text = card_text(repository, own, base, [picture.name for picture in shown])
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")
    return folder


def push(
    repository: str,
    tasks: Mapping[Path, TaskAdapter],
    base: str,
    pictures: Sequence[Path] = (),
    api: Any = None,
) -> str:
    """Uploads tasks and their card; returns where they are.

    Args:
        repository: "owner/name"; made, as a private one, if it is not there.
        tasks: File -> what is in it.
        base: As in `card_text`.
        pictures: PNGs to show in the card.
        api: A `huggingface_hub.HfApi`; default: with the stored token.

    Raises:
        DiffScalerError: The Hub refuses, or cannot be reached. The files here stay as they are.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = api or HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_card_folder(Path(scratch), repository, tasks, base, pictures)
        try:
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=str(folder), commit_message="Task trained"
            )
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DiffScalerError(
                f"the upload to {repository!r} failed ({reason}); the files are saved here, and "
                f"nothing was lost: try again with `hf upload`"
            ) from error
    return f"https://huggingface.co/{repository}"


def _what(tasks: Mapping[str, TaskAdapter], on_hub: str | None, first: TaskAdapter) -> str:
    family = FAMILIES.get(str((first.info.get("base") or {}).get("family")))
    base = f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else "one frozen base"
    kind = f" ({family.title})" if family else ""
    many = "A [DiffScaler](https://arxiv.org/abs/2404.09976) task adapter"
    many = many if len(tasks) == 1 else f"{len(tasks)} {many[2:]}s"
    return f"{many} for {base}{kind}."


def _use(repository: str, files: Sequence[str]) -> str:
    named = "" if files == [FILE_NAME] else f', weight_name="{files[0]}"'
    return (
        "```python\n"
        "import diffscaler_core.pipelines  # pip install diffscaler\n\n"
        f'pipe.load_diffscaler("{repository}"{named})\n'
        "```"
    )


def _control(tasks: Mapping[str, TaskAdapter]) -> str:
    """Returns what the control pictures show and how they are given."""
    taking = {task.name: task for task in tasks.values() if task.is_control}
    if not taking:
        return ""
    shown = "\n".join(
        f"- `{name}` takes a control picture that shows: {_kind(task)}."
        for name, task in taking.items()
    )
    return (
        f"## Control\n\n{shown}\n\n"
        "```python\n"
        "with pipe.diffscaler_control(picture, strength=1.0):  # of any size; PIL or tensor\n"
        "    image = pipe(prompt).images[0]\n"
        "```\n\n"
        "In ComfyUI: *DiffScaler Control* takes the task, the picture and the VAE. Without a "
        "control picture, and at strength 0, the base runs as it is. In the samples each control "
        "picture stands before what became of it."
    )


def _kind(task: TaskAdapter) -> str:
    kind = str((task.info.get("control") or {}).get("kind") or "a picture")
    return _HOW.get(kind, kind)


#: Kind of a control that the trainer can make -> how it makes it.
_HOW = {
    "edges": "edges (the trainer makes them white on black, by Canny with thresholds 0.1 and 0.2, "
    "as ComfyUI's *Detect Edges (Canny)* does)",
    "blur": "a blurred picture",
    "mask": "a picture with a hole in mid-grey, which is filled",
    "grey": "a picture without its colours",
    "low_resolution": "a picture of low resolution, scaled up to full size",
}


def _prompts(tasks: Mapping[str, TaskAdapter]) -> str:
    known = [name for task in tasks.values() for name in task.prompts]
    if not known:
        return ""
    listed = ", ".join(f"`{name}`" for name in known[:50])
    return f"It brings its own prompts, so that it runs without a text encoder: {listed}."
