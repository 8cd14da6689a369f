"""The demo's contact sheets: what each cell shows, as data; the workflows; the pictures.

    python scripts/contact_sheet.py        writes workflows/api/{contact,control}_sheet.json

Both hosts draw from the same table `SHEETS`, so their pictures can be compared cell by cell.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows" / "api"
#: Pictures whose edges are controls, and silhouettes, by name.
SOURCES = ROOT / "assets" / "examples" / "control"

SIZE, STEPS, GUIDANCE, SEED = 128, 20, 3.0, 7
#: Canny's thresholds.
LOW, HIGH = 0.1, 0.2
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
        controls: Control task -> strength; its picture is that of `source`.
        source: The control's picture.
        shows: The control task whose control picture is shown in place of a drawn one.
    """

    label: str
    prompt_task: str
    prompt: str
    tasks: Mapping[str, float]
    seed: int
    controls: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    shows: str = ""


def _row(words: Sequence[str], source: str, tasks: Mapping[str, float]) -> list[Cell]:
    return [Cell(word, source, word, tasks, SEED + i) for i, word in enumerate(words)]


def _controlled(
    controls: Mapping[str, float], tasks: Mapping[str, float] | None = None, shows: str = ""
) -> list[Cell]:
    return [
        Cell(word, WORDS, word, tasks or {}, SEED + i, controls, word, shows)
        for i, word in enumerate(POSED)
    ]


SUBJECTS = ("cat", "bear", "chick", "house", "sailboat", "heart")
FRUITS = ("apple", "banana", "strawberry", "grapes", "watermelon", "cherries")
SMILEYS = ("smile", "love", "cool", "cry", "angry", "sick")
STRENGTHS = (0.0, 0.3, 0.6, 0.9, 1.2, 1.5)
POSED = ("cat", "penguin", "sailboat", "rocket", "guitar", "star")

#: File -> title, and label of a row -> its cells.
SHEETS: dict[str, tuple[str, dict[str, list[Cell]]]] = {
    "contact_sheet": (
        "one frozen base, many tasks",
        {
            "base, no task": _row(SUBJECTS, WORDS, {}),
            "task: fruits": _row(FRUITS, "fruits", {"fruits": 1.0}),
            "task: smileys": _row(SMILEYS, "smileys", {"smileys": 1.0}),
            "task: ink": _row(SUBJECTS, WORDS, {"ink": 1.0}),
            "task: neon": _row(SUBJECTS, WORDS, {"neon": 1.0}),
            "fruits + ink, stacked": _row(FRUITS, "fruits", {"fruits": 1.0, "ink": 1.0}),
            "ink at strength …": [
                Cell(f"{w:g}", WORDS, "cat", {"ink": w}, SEED) for w in STRENGTHS
            ],
        },
    ),
    "control_sheet": (
        "control through the base's own eyes",
        {
            "no control": _controlled({}),
            "control: silhouettes": _controlled({}, shows="silhouette"),
            "task: silhouette": _controlled({"silhouette": 1.0}),
            "control: edges (Canny)": _controlled({}, shows="edges"),
            "task: edges": _controlled({"edges": 1.0}),
            "both controls at once": _controlled({"silhouette": 0.6, "edges": 0.6}),
            "silhouette, and ink": _controlled({"silhouette": 1.0}, {"ink": 1.0}),
            "silhouette at strength …": [
                Cell(f"{w:g}", WORDS, "cat", {}, SEED, {"silhouette": w}, "cat") for w in STRENGTHS
            ],
        },
    ),
}


def cells_of(sheet: str) -> list[Cell]:
    """Returns a sheet's cells, row by row."""
    return [cell for row in SHEETS[sheet][1].values() for cell in row]


def source_of(kind: str, name: str) -> Path:
    """Returns the picture file that a control is, or is made from (edges)."""
    return SOURCES / (f"{name}.png" if kind == "edges" else f"{kind}_{name}.png")


def workflow(sheet: str = "contact_sheet") -> dict[str, Any]:
    """Returns the workflow in ComfyUI's API format; each cell's last node saves its picture."""
    graph = _Graph()
    for i, cell in enumerate(cells_of(sheet)):
        shown = graph.control(cell.shows, cell.source) if cell.shows else graph.drawn(i, cell)
        graph.node(f"{i:02d}-save", "SaveImage", images=shown, filename_prefix=f"{sheet}/{i:02d}")
    return graph.nodes


class _Graph:
    """A workflow under construction; what two cells have in common is one node."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def node(self, key: str, kind: str, title: str = "", **inputs: Any) -> list[Any]:
        """Adds a node, unless it is there; returns its first output."""
        if key not in self.nodes:
            meta = {"_meta": {"title": title}} if title else {}
            self.nodes[key] = {"class_type": kind, "inputs": inputs, **meta}
        return [key, 0]

    def task(self, name: str) -> list[Any]:
        """Adds a task file."""
        return self.node(
            f"task-{name}", "DiffScalerLoadTask", name, task_name=f"{name}.safetensors"
        )

    def prompt(self, source: str, word: str) -> list[Any]:
        """Adds a stored prompt."""
        key = f"prompt-{source}-{word or 'empty'}"
        title = word or "empty prompt"
        return self.node(
            key, "DiffScalerTaskConditioning", title, task=self.task(source), prompt=word
        )

    def control(self, kind: str, name: str) -> list[Any]:
        """Adds a control picture; edges come from ComfyUI's own node."""
        file = source_of(kind, name).name
        image = self.node(f"load-{file}", "LoadImage", file, image=file)
        if kind != "edges":
            return image
        return self.node(
            f"edges-{name}",
            "Canny",
            f"edges of {name}",
            image=image,
            low_threshold=LOW,
            high_threshold=HIGH,
        )

    def model(self, tasks: Mapping[str, float]) -> list[Any]:
        """Adds the base with these tasks."""
        base = self.node(
            "base",
            "UNETLoader",
            "pocket base",
            unet_name="diffscaler_pocket.safetensors",
            weight_dtype="default",
        )
        if not tasks:
            return base
        if len(tasks) > 1:
            return self.node(
                "model-" + "+".join(tasks),
                "DiffScalerStackTasks",
                " + ".join(tasks),
                model=base,
                strengths=", ".join(f"{w:g}" for w in tasks.values()),
                **{f"tasks.task{k}": self.task(name) for k, name in enumerate(tasks)},
            )
        ((name, strength),) = tasks.items()
        return self.node(
            f"model-{name}-{strength:g}",
            "DiffScalerApplyTask",
            f"{name} at {strength:g}",
            model=base,
            task=self.task(name),
            strength=strength,
        )

    def drawn(self, number: int, cell: Cell) -> list[Any]:
        """Adds all it takes to draw a cell."""
        key = f"{number:02d}"
        vae = self.node("vae", "VAELoader", vae_name="diffscaler_pocket_vae.safetensors")
        latent = self.node("latent", "EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1)
        model = self.model(cell.tasks)
        positive, negative = self.prompt(cell.prompt_task, cell.prompt), self.prompt(WORDS, "")
        for kind, strength in cell.controls.items():
            name, _ = self.node(
                f"{key}-control-{kind}",
                "DiffScalerControl",
                f"{kind} at {strength:g}",
                model=model,
                positive=positive,
                negative=negative,
                task=self.task(kind),
                vae=vae,
                image=self.control(kind, cell.source),
                strength=strength,
            )
            model, positive, negative = ([name, output] for output in range(3))
        samples = self.node(
            f"{key}-sample",
            "KSampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=cell.seed,
            steps=STEPS,
            cfg=GUIDANCE,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        return self.node(f"{key}-decode", "VAEDecode", samples=samples, vae=vae)


def corner(row: int, column: int) -> tuple[int, int]:
    """Returns where a cell's picture begins on a sheet: (x, y) in pixels."""
    return 190 + column * (SIZE + 8), 54 + row * (SIZE + 26)


def compose(sheet: str, host: str, pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns the labelled sheet of one picture per cell, in order."""
    title, rows = SHEETS[sheet]
    columns = max(map(len, rows.values()))
    page = Image.new("RGB", corner(len(rows), columns), "white")
    draw = ImageDraw.Draw(page)
    big, small = (ImageFont.load_default(size) for size in (20, 14))
    draw.text((12, 16), f"{host}: {title}", "black", big)
    remaining = iter(pictures)
    for y, (label, cells) in enumerate(rows.items()):
        _, above = corner(y, 0)
        draw.text((12, above + SIZE // 2 - 8), label, "black", small)
        for x, cell in enumerate(cells):
            at, _ = corner(y, x)
            page.paste(next(remaining).convert("RGB").resize((SIZE, SIZE)), (at, above))
            width = draw.textlength(cell.label, small)
            draw.text((at + (SIZE - width) / 2, above + SIZE + 3), cell.label, "#555", small)
    return page


def picture(data: bytes) -> Image.Image:
    """Returns the picture in an image file's bytes."""
    return Image.open(io.BytesIO(data)).convert("RGB")


if __name__ == "__main__":
    WORKFLOWS.mkdir(parents=True, exist_ok=True)
    for name in SHEETS:
        path = WORKFLOWS / f"{name}.json"
        path.write_text(json.dumps(workflow(name), indent=1) + "\n")
