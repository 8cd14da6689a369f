"""Tells ComfyUI where router files live: in a folder of their own, as a router is no task.

Load DiffScaler Task lists whatever lies in models/diffscaler, and could load none of them.
"""

import folder_paths

from .folders import register_folder

FOLDER = "diffscaler_routers"


def router_files() -> list[str]:
    """Returns the router files in models/diffscaler_routers and output/diffscaler_routers."""
    register_folder(FOLDER)
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return names


def router_path(name: str) -> str:
    """Returns a router file's path.

    Raises:
        FileNotFoundError: There is none of that name in the folders.
    """
    register_folder(FOLDER)
    path: str = folder_paths.get_full_path_or_raise(FOLDER, name)
    return path
