"""What `mkdocs.yml` needs beside mkdocs: pages also read well on GitHub, where docs/ is a folder.

There a link may lead out of docs/. On the site a picture out there is brought along, a page of the
site that has another home (`HOMES`) is linked to, and anything else is linked to on GitHub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Page or file of the site -> where it lies in the repository.
HOMES = {"changelog.md": "CHANGELOG.md", "icon.svg": "assets/icon.svg"}
#: A picture or a link whose target leads out of docs/: text, path, rest.
OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
PICTURES = "beside"  # the site's folder of pictures from outside of docs/


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of HOMES and every picture that a page shows from outside of docs/."""
    for name, home in HOMES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / home)))
    for page in sorted((ROOT / "docs").glob("*.md")):
        for shown, _, path, _ in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            where = f"{PICTURES}/{path}"
            if shown and files.get_file_from_path(where) is None:
                files.append(File.generated(config, where, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites links that lead out of docs/; one to a file that does not exist is an error."""
    pages = {home: name for name, home in HOMES.items()}

    def rewrite(match: re.Match[str]) -> str:
        shown, text, path, anchor = match.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {path}, which does not exist")
        if shown:
            target = f"{PICTURES}/{path}"
        elif path in pages:
            target = pages[path]
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            target = f"{config.extra['repository']}/{kind}/main/{path}"
        return f"{shown}[{text}]({target}{anchor or ''})"

    return OUTSIDE.sub(rewrite, markdown)
