"""The workflows of ComfyUI's template browser, as data: nodes, links, places, a note each.

`make_workflows.py` turns them into files. Node ids are numbers, as the frontend gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def apply(self, model: Link, task: Link, at: At) -> Link:
        """Adds a task to a model, as trained."""
        return self.add(
            "DiffScalerApplyTask", at, color="green", model=model, task=task, strength=1.0
        )

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
        model, positive, negative, latent, vae = parts
        samples = self.add(
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
        column, y = at
        pictures = self.add("VAEDecode", (column + 1, y), samples=samples, vae=vae)
        shown = self.add("PreviewImage", (column + 2, y), title, PICTURE, images=pictures)
        self.frame(title, GREY, *framed, samples, pictures, shown)
        return pictures


def apply_task() -> Workflow:
    """One task on the base, and the base beside it."""
    flow = Workflow(
        "apply_task",
        "**One task on a frozen base.** Above the base alone, below the same seed and prompt with "
        "the task *ink*. Change *strength*: 0 is exactly the base, 1 as trained.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "cat", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    ink = flow.task("ink", (1, 470))
    with_ink = flow.apply(model, ink, (1, 600))
    flow.frame("task", GREEN, ink, with_ink)
    flow.picture("the base", (2, 0), (model, positive, negative, latent, vae))
    flow.picture("with the task", (2, ROW), (with_ink, positive, negative, latent, vae))
    return flow


def stack_tasks() -> Workflow:
    """Two tasks, alone and together."""
    flow = Workflow(
        "stack_tasks",
        "**Two tasks at once.** From above: the base, the task *ink*, the task *neon*, both. Tasks "
        "add up, their order does not matter, and *strengths* takes one number for each.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "house", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    names = ("ink", "neon")
    tasks = [flow.task(name, (1, 470 + 130 * i)) for i, name in enumerate(names)]
    flow.frame("two tasks", GREEN, *tasks)
    flow.picture("the base", (3, 0), (model, positive, negative, latent, vae))
    for i, (name, task) in enumerate(zip(names, tasks, strict=True), start=1):
        title = f"with {name}"
        applied = flow.apply(model, task, (2, ROW * i))
        flow.picture(title, (3, ROW * i), (applied, positive, negative, latent, vae), applied)
    both = flow.add(
        "DiffScalerStackTasks",
        (2, ROW * 3),
        color="green",
        model=model,
        strengths="0.5, 0.5",
        **{f"tasks.task{i}": task for i, task in enumerate(tasks)},
    )
    flow.picture("with both", (3, ROW * 3), (both, positive, negative, latent, vae), both)
    return flow


def task_prompts() -> Workflow:
    """Prompts that a task learned and stores."""
    flow = Workflow(
        "task_prompts",
        "**A task with prompts of its own.** The task *fruits* brings three of the words it "
        "learned, already encoded; the task *words* brings the empty prompt for guidance.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    negative = flow.prompt(words, "", (1, 130))
    flow.frame("empty prompt, for guidance", PALE, words, negative)
    fruits = flow.task("fruits", (1, 330))
    names = ("apple", "grapes", "cherries")
    prompts = [flow.prompt(fruits, name, (1, 460 + 135 * i)) for i, name in enumerate(names)]
    applied = flow.apply(model, fruits, (1, 880))
    flow.frame("task and its prompts", GREEN, fruits, *prompts, applied)
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        flow.picture(name, (2, ROW * i), (applied, prompt, negative, latent, vae))
    return flow


def combine_and_save() -> Workflow:
    """Two tasks made into one file."""
    flow = Workflow(
        "combine_and_save",
        "**Two tasks become one file.** *ink* at 0.4 and *neon* are combined exactly, shown, and "
        "saved to `output/diffscaler` with the picture as thumbnail; *Load* lists it after `R`.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "house", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    ink = flow.task("ink", (1, 470))
    scaled = flow.add("DiffScalerScaleTask", (1, 600), color="green", task=ink, strength=0.4)
    neon = flow.task("neon", (1, 860))
    flow.frame("two tasks", GREEN, ink, scaled, neon)
    mix = flow.add(
        "DiffScalerCombineTasks",
        (2, 470),
        color="green",
        strengths="",
        name="ink+neon",
        **{"tasks.task0": scaled, "tasks.task1": neon},
    )
    applied = flow.apply(model, mix, (2, 690))
    info = flow.add("DiffScalerTaskInfo", (3, 470), color="green", task=mix)
    text = flow.add("PreviewAny", (4, 470), "facts", (WIDTH, 340), source=[info[0], 1])
    parts = (applied, positive, negative, latent, vae)
    saved = flow.add(
        "DiffScalerSaveTask",
        (3, 640),
        color="green",
        task=[info[0], 0],
        thumbnail=flow.picture("ink + neon in one task", (2, 0), parts),
        filename_prefix="diffscaler/ink_neon",
        dtype="bf16",
        title="Ink and neon",
    )
    flow.frame("one task", GREEN, mix, applied, info, text, saved)
    return flow


def train_task() -> Workflow:
    """A task trained on the pack's own pictures, and put to use."""
    flow = Workflow(
        "train_task",
        "**Train a task, then use it.** 20 ink drawings that come with the pack, 200 steps, about "
        "two minutes on a CPU; samples appear on the node. Then a word that was not among them, "
        "before and after. For your own pictures choose a folder of ComfyUI's *input*.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "bear", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    settings = flow.add(
        "DiffScalerTrainingSettings", (1, 470), color="green", sample_every=50, guidance=GUIDANCE
    )
    trained = flow.add(
        "DiffScalerTrainTask",
        (2, 0),
        color="green",
        model=model,
        name="ink_example",
        folder="example: ink drawings",
        resolution=SIZE,
        method="diffscaler",
        rank=8,
        steps=200,
        batch_size=8,
        learning_rate=0.005,
        seed=0,
        resume="auto",
        vae=vae,
        words=words,
        settings=settings,
    )
    flow.frame("settings", GREEN, settings)
    flow.frame("training", GREEN, trained)
    samples = flow.add(
        "PreviewImage", (2, 1060), "samples of the run", PICTURE, images=[trained[0], 2]
    )
    losses = flow.add(
        "LossGraphNode", (3, 1060), "losses", PICTURE, loss=[trained[0], 1], filename_prefix="loss"
    )
    saved = flow.add(
        "DiffScalerSaveTask",
        (4, 1060),
        color="green",
        task=trained,
        filename_prefix="diffscaler/ink_example",
        dtype="keep",
        title="Ink, from 20 drawings",
    )
    flow.frame("what came of it", GREY, samples, losses, saved)
    applied = flow.apply(model, trained, (3, ROW))
    flow.picture("before", (4, 0), (model, positive, negative, latent, vae))
    flow.picture("after", (4, ROW), (applied, positive, negative, latent, vae), applied)
    return flow


def control() -> Workflow:
    """One picture's edges and silhouette as controls, alone and together."""
    flow = Workflow(
        "control",
        "**Control without a ControlNet.** From above: no control, the picture's edges (ComfyUI's "
        "own *Canny*), its silhouette, both at once. Each control is a task of half a megabyte. "
        "Copy the pictures of the pack's `assets/examples/control` into `input` first.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "sailboat", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    photo = flow.add("LoadImage", (1, 470), "a picture", (WIDTH, 330), image="sailboat.png")
    edges = flow.add("Canny", (1, 860), image=photo, low_threshold=0.1, high_threshold=0.2)
    shown = flow.add("PreviewImage", (1, 1010), "its edges", PICTURE, images=edges)
    mask = flow.add(
        "LoadImage",
        (1, 1340),
        "its silhouette",
        (WIDTH, 330),
        image="silhouette_sailboat.png",
    )
    flow.frame("control pictures", BLUE, photo, edges, shown, mask)
    flow.picture("no control", (3, 0), (model, positive, negative, latent, vae))

    pictures = {"edges": edges, "silhouette": mask}
    plain, tasks, y = (model, positive, negative), {}, ROW + 30
    for name, image in pictures.items():
        tasks[name] = flow.task(name, (2, y))
        node = flow.controlled((2, y + 130), plain, tasks[name], vae, image, 1.0)
        parts = (*_three(node), latent, vae)
        flow.picture(f"with its {name}", (3, y), parts, tasks[name], node)
        y += TALL
    both, nodes = plain, []
    for i, (name, image) in enumerate(pictures.items()):
        nodes.append(flow.controlled((2, y + 390 * i), both, tasks[name], vae, image, 0.6))
        both = _three(nodes[-1])
    flow.picture("with both", (3, y), (*both, latent, vae), *nodes)
    return flow


def _three(node: Link) -> Parts:
    """Returns a node's first three outputs."""
    return [node[0], 0], [node[0], 1], [node[0], 2]


ALL: Sequence[Callable[[], Workflow]] = (
    apply_task,
    stack_tasks,
    task_prompts,
    combine_and_save,
    control,
    train_task,
)
