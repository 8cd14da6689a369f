"""Finding a task's file: a path, a folder, or a repository on the Hugging Face Hub.

`huggingface_hub` is imported only for a repository; nothing local ever touches the network.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import TaskFileError, first_names

FILE_NAME = "diffscaler.safetensors"
SUFFIX = ".safetensors"


def find_task_file(
    source: str | Path,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """Returns the path of one task file, downloading it if `source` is a repository.

    Args:
        source: A `.safetensors` file, a folder, or a repository "owner/name".
        weight_name: The file's name in the folder or repository; default `diffscaler.safetensors`,
            or in a local folder its only `.safetensors`.
        subfolder: Folder below `source`.
        revision: Branch, tag or commit of the repository.
        token: Access token of the Hub, or True for the stored one.
        cache_dir: Where downloads are kept.
        local_files_only: True: never download, use what is cached.

    Raises:
        TaskFileError: There is no such file, folder or repository, or it cannot be told which file
            is meant; one line that says what to do.
    """
    if weight_name is not None and not weight_name.endswith(SUFFIX):
        raise TaskFileError(f"weight_name {weight_name!r} must end in {SUFFIX}")
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path / subfolder if subfolder else path, weight_name)
    if _is_path(str(source)):
        raise TaskFileError(
            f"no file or folder {str(source)!r}; a repository on the Hub is written 'owner/name'"
        )
    return _from_hub(
        str(source), weight_name, subfolder, revision, token, cache_dir, bool(local_files_only)
    )


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    if weight_name is not None or (folder / FILE_NAME).is_file():
        path = folder / (weight_name or FILE_NAME)
        if not path.is_file():
            raise TaskFileError(f"no file {path.name!r} in {str(folder)!r}")
        return path
    found = sorted(folder.glob("*" + SUFFIX))
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} files {first_names(p.name for p in found)}" if found else "none"
    raise TaskFileError(
        f"{str(folder)!r} should hold {FILE_NAME!r} or one single {SUFFIX} file, but holds {what}; "
        f"say which with weight_name="
    )


def _is_path(source: str) -> bool:
    """Says whether a name that does not exist was meant as a path, not as owner/name."""
    return (
        source.endswith(SUFFIX)
        or source.count("/") != 1
        or source.startswith((".", "/", "~"))
        or (os.sep != "/" and os.sep in source)
    )


def _from_hub(
    repository: str,
    weight_name: str | None,
    subfolder: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise TaskFileError(
            f"{repository!r} is no local path, and downloading it needs huggingface_hub; "
            f"run: pip install huggingface_hub"
        ) from error
    name = weight_name or FILE_NAME
    try:
        return Path(
            hf_hub_download(
                repository,
                name,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise TaskFileError(
            f"repository {repository!r}, file {name!r}: it {_problem(error)}"
        ) from error


def _problem(error: Exception) -> str:
    from huggingface_hub import errors

    known = (  # the first is an EntryNotFoundError too
        (errors.LocalEntryNotFoundError, "is not in the cache, and the Hub could not be asked"),
        (errors.RepositoryNotFoundError, "is not on the Hub, or is private (pass token=)"),
        (errors.RevisionNotFoundError, "has no such revision"),
        (errors.EntryNotFoundError, "has no such file; name another with weight_name="),
        (errors.HFValidationError, "is neither a local path nor a repository 'owner/name'"),
    )
    for kind, problem in known:
        if isinstance(error, kind):
            return problem
    return f"could not be downloaded: {' '.join(str(error).split())[:200]}"
