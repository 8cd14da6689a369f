"""Tells ComfyUI where task files live."""

import contextlib
import os

import folder_paths

from ..diffscaler_core import DiffScalerError
from ..diffscaler_core.errors import reason_of, shown
from ..diffscaler_core.file_names import problem_of

FOLDER = "diffscaler"


def register_folder(folder: str = FOLDER) -> None:
    """Registers models/<folder> and output/<folder>, for `.safetensors` files only.

    The output folder is listed too, so that a task trained or saved here can be loaded at once.
    Entries that extra_model_paths.yaml made under the same name stay in front.
    """
    models = os.path.join(folder_paths.models_dir, folder)
    with contextlib.suppress(OSError):  # a read-only model store only has no place to put files
        os.makedirs(models, exist_ok=True)
    for path in (models, os.path.join(folder_paths.get_output_directory(), folder)):
        folder_paths.add_model_folder_path(folder, path)
    paths, _ = folder_paths.folder_names_and_paths[folder]
    folder_paths.folder_names_and_paths[folder] = (paths, {".safetensors"})


def stamp_of(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Returns what changes when a file does, also under a clock that was set back.

    A copy may keep its source's time, so the size, the place on the disk and the time of the last
    change of any kind count as well.
    """
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def task_files() -> list[str]:
    """Returns the task files there are; what training runs keep to go on from is none."""
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return [name for name in names if "checkpoints" not in name.replace("\\", "/").split("/")]


def new_task_path(filename_prefix: str) -> tuple[str, str]:
    """Returns the next free file for a name below the output folder: its path, and how to show it.

    Raises:
        DiffScalerError: The prefix names no file, or one outside the output folder.
    """
    output = folder_paths.get_output_directory()
    prefix = filename_prefix.strip().replace("\\", "/").removesuffix(".safetensors")
    target = os.path.normpath(os.path.join(output, prefix))
    wrong = next((f": {shown(p)} {w}" for p in _parts(prefix) if (w := problem_of(p))), "")
    if wrong or not _parts(prefix) or not folder_paths.is_within_directory(output, target):
        raise DiffScalerError(
            f"filename_prefix {shown(filename_prefix)} names no file below ComfyUI's output "
            f"folder{wrong}; write a name such as 'diffscaler/flowers'"
        )
    try:
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise DiffScalerError(f"could not use {shown(target)}: {reason_of(error)}") from error
    file = f"{name}_{number:05}_.safetensors"
    return os.path.join(folder, file), os.path.join(subfolder, file)


def _parts(prefix: str) -> list[str]:
    """Returns the folders and the name of a prefix, without those that say "here"."""
    own = prefix.split("/")
    return [*(part for part in own[:-1] if part not in ("", ".")), own[-1]]
