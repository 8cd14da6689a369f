"""Which names a file may have on every system, as tasks are passed from one to another."""

from __future__ import annotations

import re

#: Bytes that a name may have: 255 on most file systems, less what is put behind it.
MOST_BYTES = 200
_DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]|conin\$|conout\$)\s*(\..*)?", re.I)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\/\ud800-\udfff]')


def problem_of(name: str) -> str | None:
    """Returns why one part of a path is no name for a file or folder everywhere, or None."""
    if not name.strip(". ") or name != name.rstrip(". "):
        return "is empty or ends in a dot or a space"
    if _DEVICES.fullmatch(name):
        return "is a device's name on Windows"
    if _FORBIDDEN.search(name):
        return "holds a character that names cannot have everywhere"
    if len(name.encode()) > MOST_BYTES:
        return f"has more than {MOST_BYTES} bytes"
    return None


def harmless(name: str) -> str:
    """Returns a name as one part of a path: it can neither leave a folder nor hide."""
    kept = "".join(c if c.isalnum() or c in "-_.+ " else "_" for c in name)[:80]
    kept = kept.encode()[: MOST_BYTES - 40].decode(errors="ignore").strip(". ") or "task"
    return f"_{kept}" if _DEVICES.fullmatch(kept) else kept
