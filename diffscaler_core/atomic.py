"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

#: Ending of a file that is being written; one left behind by a crash may be deleted.
PART = ".part"


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Writes a file by way of a temporary one beside it, and returns once it is on the disk.

    Whatever happens on the way (a full disk, a crash, kill -9), the file that was there before
    stays as it was.

    Args:
        path: Where to.
        data: All of it.
        replace: False: a file that is there stays, also if it came a moment ago.

    Raises:
        FileExistsError: It may not be replaced.
        OSError: What the disk says; the temporary file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{PART}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _put(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _put(temporary: Path, path: Path) -> None:
    """Gives a file its name unless somebody has it: of two that try at once, one gets it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (AttributeError, NotImplementedError, OSError):  # a file system without links
        with path.open("xb"):
            pass
        os.replace(temporary, path)
        return
    temporary.unlink()
