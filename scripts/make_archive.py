"""Builds the archive that the Comfy Registry serves: `dist/diffscaler-<version>.zip`.

    python scripts/make_archive.py [--out folder]

It holds what `comfy node publish` uploads: the files git tracks, less what `.comfyignore` names.
Two runs on one commit give the same bytes. Unpacked into a folder of ComfyUI's `custom_nodes`, it
is the pack.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = ".comfyignore"
#: What a file in a zip is dated, the format's first moment: no date of a checkout gets in.
EPOCH = (1980, 1, 1, 0, 0, 0)


class ArchiveError(RuntimeError):
    """The archive could not be built; the message says what to do."""


def packed_files(root: Path) -> list[str]:
    """Returns the paths of the archive's files, relative to a checkout's root.

    Raises:
        ArchiveError: The folder is no git checkout, or a tracked file is not there.
    """
    tracked = _listed(root)
    # git reads the file as it reads .gitignore, which is what the registry's own tool does too.
    ignored = set(_listed(root, "--ignored", f"--exclude-from={root / IGNORED}"))
    kept = sorted(name for name in tracked if name not in ignored)
    missing = [name for name in kept if not (root / name).is_file()]
    if missing:
        raise ArchiveError(f"{missing[0]} is tracked but not there; restore or remove it with git")
    return kept


def version_of(root: Path) -> str:
    """Returns the version in the file that [tool.comfy.version] names."""
    text = (root / "diffscaler_core" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', text, re.MULTILINE)
    if found is None:
        raise ArchiveError('diffscaler_core/version.py must say __version__ = "X.Y.Z"')
    return found[1]


def make_archive(root: Path, folder: Path) -> Path:
    """Writes the archive into a folder; returns its path."""
    files = packed_files(root)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"diffscaler-{version_of(root)}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in files:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes())
    return path


def _listed(root: Path, *options: str) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", *options]
    try:
        result = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ArchiveError(f"{root} is no git checkout, or git is not installed") from error
    return [name for name in result.stdout.decode().split("\0") if name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the archive and says where it is and how large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder; default: dist")
    try:
        path = make_archive(ROOT, parser.parse_args(arguments).out)
    except ArchiveError as error:
        sys.exit(f"make_archive: {error}")
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
    unpacked = sum(file.file_size for file in files)
    print(
        f"{path}: {len(files)} files, {path.stat().st_size / 1e6:.1f} MB, "
        f"unpacked {unpacked / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
