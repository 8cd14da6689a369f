"""Draws the pictures of the nodes' help pages: the node in a shipped workflow, and what that draws.

    python scripts/make_help_pictures.py     writes web/docs/images/*.jpg anew

The browser is described in `frontend.py`. `--only NAME …` takes some nodes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy_host
from comfy_http import HostError, Server
from frontend import in_frontend
from PIL import Image

ACT = Path(__file__).with_name("node_picture.mjs")
WORKFLOWS = comfy_host.ROOT / "workflows"
PICTURES = comfy_host.ROOT / "web" / "docs" / "images"
#: Node -> the workflow that shows it.
SHOWN: Mapping[str, str] = {
    "DiffScalerLoadTask": "apply_task",
    "DiffScalerApplyTask": "apply_task",
    "DiffScalerStackTasks": "stack_tasks",
    "DiffScalerControl": "control",
    "DiffScalerRouteTasks": "many_tasks",
    "DiffScalerScheduleTask": "schedule",
    "DiffScalerCompareTasks": "compare_tasks",
    "DiffScalerTaskGrid": "compare_tasks",
    "DiffScalerScaleTask": "combine_and_save",
    "DiffScalerCombineTasks": "combine_and_save",
    "DiffScalerTaskInfo": "combine_and_save",
    "DiffScalerSaveTask": "combine_and_save",
    "DiffScalerImportLoRA": "import_lora",
    "DiffScalerTaskConditioning": "task_prompts",
    "DiffScalerTrainTask": "train_task",
    "DiffScalerTrainingSettings": "train_task",
    "DiffScalerExtractTask": "extract_task",
    "DiffScalerPickTask": "pick_task",
    "DiffScalerRouteExperts": "route_experts",
    "DiffScalerTranslate": "translate",
    "DiffScalerGuidanceLoss": "guided",
    "DiffScalerGuideModel": "guided",
}
#: The node whose second picture is its dialog.
WITH_DIALOG = "DiffScalerLoadTask"
BACKGROUND = "#1c1c1c"
GAP, LOW, LOW_DIALOG, WIDE, QUALITY = 14, 250, 430, 560, 84


def main() -> None:
    """Draws the pictures that the arguments ask for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=sorted(SHOWN), metavar="NAME")
    names = parser.parse_args().only
    try:
        with comfy_host.running_server(comfy_host.CACHE / "workflows") as server:
            draw(server, names)
    except (HostError, OSError) as error:
        sys.exit(f"make_help_pictures: {error}")


def draw(server: Server, names: Sequence[str]) -> None:
    """Draws some nodes' pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shots = {name: Path(folder, f"{name}.png") for name in names}
        dialog = Path(folder, "dialog.png")
        jobs = [_job(name, shots[name], dialog) for name in names]
        in_frontend(server, jobs)
        for name in names:
            effect = dialog if name == WITH_DIALOG else WORKFLOWS / f"{SHOWN[name]}.jpg"
            low = LOW_DIALOG if name == WITH_DIALOG else LOW
            with Image.open(shots[name]) as node, Image.open(effect) as other:
                sheet = side_by_side(node.convert("RGB"), other.convert("RGB"), low)
            path = PICTURES / f"{name}.jpg"
            sheet.save(path, "JPEG", quality=QUALITY, optimize=True)
            print(f"{path.name}: {sheet.width} × {sheet.height}, {path.stat().st_size // 1024} KiB")


def side_by_side(node: Image.Image, effect: Image.Image, low: int) -> Image.Image:
    """Returns both pictures next to each other, the second as high as the first, or `low`."""
    height = max(node.height - 2 * GAP, low)
    share = min(height / effect.height, WIDE / effect.width, 1.0)
    size = (round(effect.width * share), round(effect.height * share))
    effect = effect.resize(size, Image.Resampling.LANCZOS)
    whole = (node.width + effect.width + GAP, max(node.height, effect.height + 2 * GAP))
    sheet = Image.new("RGB", whole, BACKGROUND)
    sheet.paste(node, (0, (whole[1] - node.height) // 2))
    sheet.paste(effect, (node.width, (whole[1] - effect.height) // 2))
    return sheet


def _job(name: str, path: Path, dialog: Path) -> dict[str, Any]:
    ui = json.loads((WORKFLOWS / f"{SHOWN[name]}.json").read_text(encoding="utf-8"))
    shown = str(dialog) if name == WITH_DIALOG else None
    given = {"ui": ui, "type": name, "path": str(path), "dialog": shown}
    return {"kind": "act", "module": str(ACT), "given": given}


if __name__ == "__main__":
    main()
