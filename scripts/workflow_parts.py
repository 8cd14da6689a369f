"""What the workflows of the template browser are made of: a graph, its places, and its branches.

Node ids are numbers, as the frontend gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SIZE, STEPS, GUIDANCE, SEED = 128, 20, 3.0, 7
WIDTH = 320  # of every node
COLUMN = 380  # from one column's left edge to the next
PICTURE = (WIDTH, 270)  # of the previews
ROW = 400  # from one branch to the next
TALL = 560  # the same, where a branch has a control of its own
BLUE, GREEN, PALE, GREY = "#3f789e", "#3f7a4a", "#8A8", "#777"

Link = list[Any]
Parts = tuple[Link, Link, Link]
At = tuple[float, float]

SWAP = (
    "**For SD3.5 or Flux:** change *Load Diffusion Model*, *Load VAE*, the size in *Empty Latent* "
    "(Flux: cfg 1) and the task files; put *Load CLIP* and *CLIP Text Encode* in the place of the "
    "stored prompts. **For SDXL:** the same, with *Load Checkpoint* and *Empty Latent Image*."
)
FILES = (
    "**Without any download:** copy the folders of the pack's `assets/pocket` into `models`, then "
    "press *Run*."
)


@dataclass
class Workflow:
    """One workflow and where its nodes lie.

    Attributes:
        name: The files' name.
        about: The note's first line.
        nodes: The graph in API format.
        places: Node id -> its place, least size and colour.
        groups: Frames around nodes: title, node ids, colour.
    """

    name: str
    about: str
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        kind: str,
        at: At,
        /,
        called: str = "",
        size: tuple[float, float] = (WIDTH, 0),
        color: str = "",
        **inputs: Any,
    ) -> Link:
        """Adds a node; returns its first output.

        Args:
            kind: The node's class.
            at: Column, and y within it.
            called: Another title than the class's.
            size: Width and least height.
            color: A name in the frontend's palette.
            inputs: Widget values and links.
        """
        key = str(len(self.nodes) + 1)
        meta = {"_meta": {"title": called}} if called else {}
        self.nodes[key] = {"class_type": kind, "inputs": inputs, **meta}
        pos = [round(at[0] * COLUMN), at[1]]
        self.places[key] = {"pos": pos, "size": list(size), "color": color}
        return [key, 0]

    def frame(self, title: str, color: str, *links: Link) -> None:
        """Draws a frame around nodes."""
        self.groups.append({"title": title, "color": color, "nodes": [link[0] for link in links]})

    @property
    def layout(self) -> dict[str, Any]:
        """What the frontend needs besides the graph."""
        text = "\n\n".join((self.about, FILES, SWAP))
        note = {"title": "Note", "pos": [0, 0], "size": [WIDTH, 270], "text": text}
        return {"nodes": self.places, "groups": self.groups, "note": note}

    # What all the workflows are made of.

    def base(self) -> tuple[Link, Link, Link]:
        """Adds the pocket base below the note: model, VAE, latent."""
        model = self.add(
            "UNETLoader",
            (0, 370),
            "Load Diffusion Model: pocket base",
            unet_name="diffscaler_pocket.safetensors",
            weight_dtype="default",
        )
        vae = self.add("VAELoader", (0, 530), vae_name="diffscaler_pocket_vae.safetensors")
        latent = self.add(
            "EmptySD3LatentImage",
            (0, 665),
            "Empty Latent",
            width=SIZE,
            height=SIZE,
            batch_size=1,
        )
        self.frame("base", BLUE, model, vae, latent)
        return model, vae, latent

    def task(self, name: str, at: At) -> Link:
        """Adds a task file."""
        return self.add(
            "DiffScalerLoadTask",
            at,
            f"Load DiffScaler Task: {name}",
            color="green",
            task_name=f"{name}.safetensors",
        )

    def prompt(self, task: Link, word: str, at: At) -> Link:
        """Adds a stored prompt."""
        title = f"stored prompt: {word}" if word else "stored prompt: the empty one"
        return self.add("DiffScalerTaskConditioning", at, title, task=task, prompt=word)

    def apply(self, model: Link, task: Link, at: At, **more: Link) -> Link:
        """Adds a task to a model, as trained."""
        chosen = {"model": model, "task": task, "strength": 1.0, **more}
        return self.add("DiffScalerApplyTask", at, color="green", **chosen)

    def controlled(
        self, at: At, parts: Parts, task: Link, vae: Link, image: Link, strength: float
    ) -> Link:
        """Adds a control; its outputs are model, positive, negative, as are `parts`."""
        model, positive, negative = parts
        return self.add(
            "DiffScalerControl",
            at,
            color="green",
            model=model,
            positive=positive,
            negative=negative,
            task=task,
            vae=vae,
            image=image,
            strength=strength,
        )

    def sampler(self, title: str, at: At, parts: Sequence[Link]) -> Link:
        """Adds a sampler; `parts` are model, positive, negative, latent."""
        model, positive, negative, latent = parts
        return self.add(
            "KSampler",
            at,
            f"KSampler: {title}",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=SEED,
            steps=STEPS,
            cfg=GUIDANCE,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )

    def picture(
        self,
        title: str,
        at: At,
        parts: tuple[Link, Link, Link, Link, Link],
        *framed: Link,
    ) -> Link:
        """Adds sampler, decoder and preview in three columns; returns the decoded picture.

        Args:
            title: What the picture shows.
            at: The sampler's place.
            parts: Model, positive, negative, latent, VAE.
            framed: Further nodes inside the branch's frame.
        """
        *sampled, vae = parts
        samples = self.sampler(title, at, sampled)
        column, y = at
        pictures = self.add("VAEDecode", (column + 1, y), samples=samples, vae=vae)
        shown = self.add("PreviewImage", (column + 2, y), title, PICTURE, images=pictures)
        self.frame(title, GREY, *framed, samples, pictures, shown)
        return pictures


def three(node: Link) -> Parts:
    """Returns a node's first three outputs."""
    return [node[0], 0], [node[0], 1], [node[0], 2]
