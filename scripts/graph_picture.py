"""Makes docs/images/first_graph.jpg: a shipped workflow in ComfyUI's real frontend, after a run.

    .venv/bin/python scripts/graph_picture.py

What it needs stands in `frontend.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import comfy_host
from comfy_http import HostError
from frontend import in_frontend
from make_workflows import open_job, problems_of
from PIL import Image

NAME = "apply_task"
OUT = comfy_host.ROOT / "docs" / "images" / "first_graph.jpg"
BARS = (60, 85, 1790, 930)  # of the frontend's window: the graph without the bars beside it


def main() -> None:
    """Opens the workflow, queues it, and keeps what the canvas shows then."""
    folder = comfy_host.CACHE / "graph_picture"
    folder.mkdir(parents=True, exist_ok=True)
    shot = folder / f"{NAME}.png"
    try:
        with comfy_host.running_server(folder) as server:
            (result,) = in_frontend(server, [open_job(NAME, shot)])
        if problems := problems_of(NAME, result):
            raise HostError("; ".join(problems))
        print(_cut(shot))
    except (HostError, OSError) as error:
        sys.exit(f"graph_picture: {error}")


def _cut(shot: Path) -> Path:
    Image.open(shot).convert("RGB").crop(BARS).save(OUT, quality=85, optimize=True)
    return OUT


if __name__ == "__main__":
    main()
