"""Writes the workflows of ComfyUI's template browser, and proves them in the real frontend.

    python scripts/make_workflows.py               writes workflows/*.json and their API twins anew,
                                                   then opens and queues each; pictures of the
                                                   canvas go to .cache/workflows
    python scripts/make_workflows.py --check       the second half only
    python scripts/make_workflows.py --thumbnails  draws workflows/*.jpg, each from the workflow's
                                                   own pictures (needs no browser)

The browser is described in `frontend.py`. `--only NAME …` takes some workflows, `--models FOLDER`
another folder than assets/pocket.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy_host
import workflow_graphs
from comfy_http import HostError, Server
from frontend import in_frontend
from PIL import Image

FOLDER = comfy_host.ROOT / "workflows"
SCREENSHOTS = comfy_host.CACHE / "workflows"
THUMBNAIL_BYTES, THUMBNAIL_SIDE, GAP = 60_000, 256, 6


def main() -> None:
    """Does what the arguments ask for."""
    args = _arguments()
    flows = [make() for make in workflow_graphs.ALL]
    flows = [flow for flow in flows if not args.only or flow.name in args.only]
    names = [flow.name for flow in flows]
    try:
        with comfy_host.running_server(
            comfy_host.CACHE / "workflows", models=args.models
        ) as server:
            if args.thumbnails:
                for name in names:
                    print(f"{draw_thumbnail(server, name)}")
                return
            if not args.check:
                write(server, flows)
            check(server, names)
    except (HostError, OSError) as error:
        sys.exit(f"make_workflows: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--thumbnails", action="store_true", help="draw workflows/*.jpg")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--models", type=Path, default=comfy_host.POCKET, metavar="FOLDER")
    return parser.parse_args()


def write(server: Server, flows: Sequence[workflow_graphs.Workflow]) -> None:
    """Lets the frontend arrange the graphs, and writes what it serialises."""
    jobs = [{"kind": "arrange", "api": flow.nodes, "layout": flow.layout} for flow in flows]
    for flow, made in zip(flows, in_frontend(server, jobs), strict=True):
        if lost := lost_inputs(flow.nodes, made["api"]):
            raise HostError(f"{flow.name}: the frontend lost {'; '.join(lost)}")
        _write(ui_path(flow.name), _stable(flow.name, made["ui"]))
        _write(api_path(flow.name), made["api"])
        print(f"{flow.name}: {len(flow.nodes)} nodes written")


def check(server: Server, names: Sequence[str]) -> None:
    """Opens and queues the shipped workflows; raises HostError at the first that fails."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    jobs = [open_job(name, SCREENSHOTS / f"{name}.png") for name in names]
    for name, result in zip(names, in_frontend(server, jobs), strict=True):
        if problems := problems_of(name, result):
            raise HostError(f"{name}: {'; '.join(problems)}")
        pictures = server.images(server.wait(result["prompt_id"], timeout=900))
        print(f"{name}: opens, gives its API twin, drew {len(pictures)} pictures")
        if not pictures:
            raise HostError(f"{name}: no picture came out")


def ui_path(name: str) -> Path:
    """Returns the file that the template browser opens."""
    return FOLDER / f"{name}.json"


def api_path(name: str) -> Path:
    """Returns its twin in API format."""
    return FOLDER / "api" / f"{name}.json"


def open_job(name: str, screenshot: Path | None = None) -> dict[str, Any]:
    """Returns the frontend's job that opens and queues a shipped workflow."""
    shown = str(screenshot) if screenshot else None
    return {"kind": "open", "ui": _read(ui_path(name)), "queue": True, "screenshot": shown}


def problems_of(name: str, result: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with a workflow as the frontend opened it."""
    problems = [f"unknown node {kind}" for kind in result["missing"]]
    problems += [f"error on {kind}" for kind in result["errors"]]
    if result["api"] != _read(api_path(name)):
        problems.append("the graph on the canvas is not its API twin")
    if refused := result.get("refused"):
        problems.append(f"refused: {refused[:500]}")
    return problems


def lost_inputs(
    wanted: Mapping[str, Mapping[str, Any]], got: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Returns the nodes and inputs of one API graph that another lacks or has otherwise."""
    lost = [f"node {key} {node['class_type']}" for key, node in wanted.items() if key not in got]
    for key, node in wanted.items():
        there = got.get(key, {"class_type": node["class_type"], "inputs": node["inputs"]})
        if there["class_type"] != node["class_type"]:
            lost.append(f"node {key}'s class")
        inputs = there["inputs"]
        lost += [f"{key}.{k}" for k, v in node["inputs"].items() if inputs.get(k) != v]
    return lost


def draw_thumbnail(server: Server, name: str) -> Path:
    """Draws a workflow's pictures side by side as its thumbnail; returns the file."""
    graph = _read(api_path(name))
    outputs = server.run(graph, timeout=900)["outputs"]
    ordered = {key: outputs[key] for key in sorted(outputs, key=int)}
    files = server.images({"outputs": ordered})
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    shown = [_tall(picture) for picture in pictures]
    half = 2 if len(shown) == 4 else len(shown)
    rows = [shown[at : at + half] for at in range(0, len(shown), half)]
    width = max(sum(one.width + GAP for one in row) for row in rows) - GAP
    down = THUMBNAIL_SIDE + GAP
    sheet = Image.new("RGB", (width, len(rows) * down - GAP), "white")
    for i, row in enumerate(rows):
        x = 0
        for one in row:
            sheet.paste(one, (x, i * down))
            x += one.width + GAP
    path = ui_path(name).with_suffix(".jpg")
    path.write_bytes(_jpeg(sheet))
    return path


def _tall(picture: Image.Image) -> Image.Image:
    """Returns a picture as tall as the thumbnail."""
    width = round(THUMBNAIL_SIDE * picture.width / picture.height)
    return picture.resize((width, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)


def _jpeg(picture: Image.Image) -> bytes:
    for quality in range(92, 10, -6):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


def _stable(name: str, ui: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the graph without what differs from one run to the next."""
    kept = {**ui, "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"diffscaler/workflows/{name}"))}
    kept["extra"] = {}
    return kept


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
