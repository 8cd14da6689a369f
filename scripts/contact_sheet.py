"""The demo's contact sheet: what each cell shows, as data; the workflow that draws it; the picture.

    python scripts/contact_sheet.py        writes workflows/api/contact_sheet.json anew

Both hosts draw from the same table `ROWS`, so their pictures can be compared cell by cell.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "workflows" / "api" / "contact_sheet.json"

SIZE, STEPS, GUIDANCE, SEED = 128, 20, 3.0, 7
#: The task that stores the base's own words as prompts.
WORDS = "words"


@dataclass(frozen=True)
class Cell:
    """One picture.

    Attributes:
        label: What stands under it.
        prompt_task: The task whose stored prompt is used.
        prompt: The stored prompt's name.
        tasks: Task -> strength; empty: the base.
        seed: Seed of the noise.
    """

    label: str
    prompt_task: str
    prompt: str
    tasks: Mapping[str, float]
    seed: int


def _row(words: Sequence[str], source: str, tasks: Mapping[str, float]) -> list[Cell]:
    return [Cell(word, source, word, tasks, SEED + i) for i, word in enumerate(words)]


SUBJECTS = ("cat", "bear", "chick", "house", "sailboat", "heart")
FRUITS = ("apple", "banana", "strawberry", "grapes", "watermelon", "cherries")
SMILEYS = ("smile", "love", "cool", "cry", "angry", "sick")
STRENGTHS = (0.0, 0.3, 0.6, 0.9, 1.2, 1.5)

ROWS: dict[str, list[Cell]] = {
    "base, no task": _row(SUBJECTS, WORDS, {}),
    "task: fruits": _row(FRUITS, "fruits", {"fruits": 1.0}),
    "task: smileys": _row(SMILEYS, "smileys", {"smileys": 1.0}),
    "task: ink": _row(SUBJECTS, WORDS, {"ink": 1.0}),
    "task: neon": _row(SUBJECTS, WORDS, {"neon": 1.0}),
    "fruits + ink, stacked": _row(FRUITS, "fruits", {"fruits": 1.0, "ink": 1.0}),
    "ink at strength …": [Cell(f"{w:g}", WORDS, "cat", {"ink": w}, SEED) for w in STRENGTHS],
}
CELLS = [cell for row in ROWS.values() for cell in row]


def workflow() -> dict[str, Any]:
    """Returns the workflow in ComfyUI's API format; each cell's last node saves its picture."""
    nodes: dict[str, dict[str, Any]] = {}

    def node(key: str, kind: str, title: str = "", **inputs: Any) -> list[Any]:
        if key not in nodes:
            meta = {"_meta": {"title": title}} if title else {}
            nodes[key] = {"class_type": kind, "inputs": inputs, **meta}
        return [key, 0]

    def task(name: str) -> list[Any]:
        return node(f"task-{name}", "DiffScalerLoadTask", name, task_name=f"{name}.safetensors")

    def prompt(source: str, word: str) -> list[Any]:
        key = f"prompt-{source}-{word or 'empty'}"
        title = word or "empty prompt"
        return node(key, "DiffScalerTaskConditioning", title, task=task(source), prompt=word)

    base = node(
        "base",
        "UNETLoader",
        "pocket base",
        unet_name="diffscaler_pocket.safetensors",
        weight_dtype="default",
    )
    vae = node("vae", "VAELoader", vae_name="diffscaler_pocket_vae.safetensors")
    latent = node("latent", "EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1)
    for i, cell in enumerate(CELLS):
        model = base
        if len(cell.tasks) > 1:
            model = node(
                "model-" + "+".join(cell.tasks),
                "DiffScalerStackTasks",
                " + ".join(cell.tasks),
                model=base,
                strengths=", ".join(f"{w:g}" for w in cell.tasks.values()),
                **{f"tasks.task{k}": task(name) for k, name in enumerate(cell.tasks)},
            )
        for name, strength in cell.tasks.items() if len(cell.tasks) == 1 else ():
            key = f"model-{name}-{strength:g}"
            title = f"{name} at {strength:g}"
            model = node(
                key, "DiffScalerApplyTask", title, model=base, task=task(name), strength=strength
            )
        samples = node(
            f"{i:02d}-sample",
            "KSampler",
            model=model,
            positive=prompt(cell.prompt_task, cell.prompt),
            negative=prompt(WORDS, ""),
            latent_image=latent,
            seed=cell.seed,
            steps=STEPS,
            cfg=GUIDANCE,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        decoded = node(f"{i:02d}-decode", "VAEDecode", samples=samples, vae=vae)
        node(f"{i:02d}-save", "SaveImage", images=decoded, filename_prefix=f"demo/{i:02d}")
    return nodes


def compose(pictures: Sequence[Image.Image], title: str) -> Image.Image:
    """Returns the labelled sheet of one picture per cell, in order."""
    columns, left, top, cell_height = max(map(len, ROWS.values())), 190, 54, SIZE + 26
    sheet = Image.new("RGB", (left + columns * (SIZE + 8), top + len(ROWS) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    big, small = (ImageFont.load_default(size) for size in (20, 14))
    draw.text((12, 16), title, "black", big)
    remaining = iter(pictures)
    for y, (label, cells) in enumerate(ROWS.items()):
        above = top + y * cell_height
        draw.text((12, above + SIZE // 2 - 8), label, "black", small)
        for x, cell in enumerate(cells):
            at = left + x * (SIZE + 8)
            sheet.paste(next(remaining).convert("RGB").resize((SIZE, SIZE)), (at, above))
            width = draw.textlength(cell.label, small)
            draw.text((at + (SIZE - width) / 2, above + SIZE + 3), cell.label, "#555", small)
    return sheet


def picture(data: bytes) -> Image.Image:
    """Returns the picture in an image file's bytes."""
    return Image.open(io.BytesIO(data)).convert("RGB")


if __name__ == "__main__":
    WORKFLOW.parent.mkdir(parents=True, exist_ok=True)
    WORKFLOW.write_text(json.dumps(workflow(), indent=1) + "\n")
