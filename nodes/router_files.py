"""Tells ComfyUI where router files live: in a folder of their own, as a router is no task.

Load DiffScaler Task lists whatever lies in models/diffscaler, and could load none of them.
"""

import contextlib
import os

import folder_paths

FOLDER = "diffscaler_routers"


def router_files() -> list[str]:
    """Returns the router files in models/diffscaler_routers and output/diffscaler_routers."""
    _register()
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return names


def router_path(name: str) -> str:
    """Returns a router file's path.

    Raises:
        FileNotFoundError: There is none of that name in the folders.
    """
    _register()
    path: str = folder_paths.get_full_path_or_raise(FOLDER, name)
    return path


def _register() -> None:
    models = os.path.join(folder_paths.models_dir, FOLDER)
    with contextlib.suppress(OSError):  # a read-only model store only has no place to put files
        os.makedirs(models, exist_ok=True)
    for path in (models, os.path.join(folder_paths.get_output_directory(), FOLDER)):
        folder_paths.add_model_folder_path(FOLDER, path)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
