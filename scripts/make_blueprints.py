"""Writes the subgraph blueprints: groups of nodes that ComfyUI offers as one node to add.

    python scripts/make_blueprints.py     writes subgraphs/*.json anew, in the real frontend

They appear in the node library under "Subgraph Blueprints", each by its file's name. The browser is
described in `frontend.py`.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy_host
from comfy_http import HostError
from frontend import in_frontend
from workflow_parts import GUIDANCE, SIZE, STEPS, Link, Workflow

FOLDER = comfy_host.ROOT / "subgraphs"
ACT = Path(__file__).with_name("blueprint.mjs")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")


@dataclass
class Blueprint:
    """A group of nodes and its ends.

    Attributes:
        name: The file's name, and the node's title.
        about: What the node library says.
        aliases: Words it is found by.
        flow: The nodes inside.
        inputs: Name -> the inputs inside that it goes to: (node, input).
        outputs: Name -> the output inside that it comes from.
    """

    name: str
    about: str
    aliases: tuple[str, ...]
    flow: Workflow = field(init=False)
    inputs: dict[str, list[tuple[Link, str]]] = field(default_factory=dict)
    outputs: dict[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begins with no nodes."""
        self.flow = Workflow(self.name, self.about)

    def ends(self, node: Link, *names: str, **renamed: str) -> None:
        """Makes a node's inputs the blueprint's, by their own names or others."""
        for outer, inner in {**{name: name for name in names}, **renamed}.items():
            self.inputs.setdefault(outer, []).append((node, inner))

    @property
    def job(self) -> dict[str, Any]:
        """What the frontend makes the blueprint of."""
        given = {
            "name": self.name,
            "about": self.about,
            "aliases": ["diffscaler", *self.aliases],
            "api": self.flow.nodes,
            "places": self.flow.places,
            "inputs": [
                {"name": name, "to": [[node[0], own] for node, own in to]}
                for name, to in self.inputs.items()
            ],
            "outputs": [{"name": name, "from": link} for name, link in self.outputs.items()],
        }
        return {"kind": "act", "module": str(ACT), "given": given}


def apply_a_task() -> Blueprint:
    """A task file on a model."""
    made = Blueprint(
        "Load and Apply DiffScaler Task",
        "A task file, loaded and applied to a model.",
        ("lora", "adapter", "style"),
    )
    task = made.flow.task("ink", (0, 0))
    applied = made.flow.add("DiffScalerApplyTask", (1, 0), color="green", task=task, strength=1.0)
    made.ends(applied, "model")
    made.ends(task, "task_name")
    made.ends(applied, "strength")
    made.outputs = {"model": applied, "task": task}
    return made


def train_and_use() -> Blueprint:
    """A task trained, saved, and applied."""
    made = Blueprint(
        "Train, Save and Apply DiffScaler Task",
        "Trains a task on a folder of pictures, saves it, and applies it to the model.",
        ("train", "fine-tune", "lora"),
    )
    trained = made.flow.add(
        "DiffScalerTrainTask",
        (0, 0),
        color="green",
        name="my_task",
        folder="example: ink drawings",
        resolution=SIZE,
        method="diffscaler",
        rank=8,
        steps=200,
        batch_size=8,
        learning_rate=0.005,
        seed=0,
        resume="auto",
    )
    applied = made.flow.add(
        "DiffScalerApplyTask", (1, 0), color="green", task=trained, strength=1.0
    )
    saved = made.flow.add(
        "DiffScalerSaveTask",
        (1, 400),
        color="green",
        task=trained,
        filename_prefix="diffscaler/my_task",
        dtype="keep",
        title="",
    )
    made.ends(trained, "model")
    made.ends(applied, "model")
    made.ends(trained, "vae", "words", "name", "folder", "resolution", "rank", "steps")
    made.ends(trained, "learning_rate")
    made.ends(applied, "strength")
    made.ends(saved, "filename_prefix")
    made.outputs = {"model": applied, "task": trained, "samples": [trained[0], 2]}
    return made


def control() -> Blueprint:
    """A control picture, and the picture drawn along it."""
    made = Blueprint(
        "Draw from DiffScaler Control Picture",
        "Draws a picture along a control picture (edges, silhouette, …) with a control task.",
        ("controlnet", "canny", "control"),
    )
    task = made.flow.task("edges", (0, 0))
    node = made.flow.add("DiffScalerControl", (1, 0), color="green", task=task, strength=1.0)
    samples = made.flow.add(
        "KSampler",
        (2, 0),
        model=node,
        positive=[node[0], 1],
        negative=[node[0], 2],
        seed=7,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    picture = made.flow.add("VAEDecode", (3, 0), samples=samples)
    made.ends(node, "model", "positive", "negative", "vae", "image")
    made.ends(samples, "latent_image")
    made.ends(picture, "vae")
    made.ends(task, "task_name")
    made.ends(node, "strength")
    made.ends(samples, "seed", "steps", "cfg")
    made.outputs = {"image": picture}
    return made


ALL = (apply_a_task, train_and_use, control)


def main() -> None:
    """Writes all blueprints."""
    blueprints = [make() for make in ALL]
    try:
        with comfy_host.running_server(comfy_host.CACHE / "workflows") as server:
            made = in_frontend(server, [one.job for one in blueprints])
    except (HostError, OSError) as error:
        sys.exit(f"make_blueprints: {error}")
    FOLDER.mkdir(exist_ok=True)
    for blueprint, content in zip(blueprints, made, strict=True):
        path = FOLDER / f"{blueprint.name}.json"
        path.write_text(stable(blueprint.name, content), encoding="utf-8")
        print(path.name)


def stable(name: str, content: Any) -> str:
    """Returns the file's text, with ids that do not change from one run to the next."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    for i, found in enumerate(dict.fromkeys(_UUID.findall(text))):
        own = uuid.uuid5(uuid.NAMESPACE_URL, f"diffscaler/subgraphs/{name}/{i}")
        text = text.replace(found, str(own))
    return text


if __name__ == "__main__":
    main()
