"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

#: Ending of a file that is being written; one left behind by a crash may be deleted.
PART = ".part"


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it, and returns once it is on the disk.

    Whatever happens on the way (a full disk, a crash, kill -9), the file that was there before
    stays as it was.

    Raises:
        OSError: What the disk says; the temporary file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{PART}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
