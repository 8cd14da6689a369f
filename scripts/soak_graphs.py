"""Random workflows of the pack's nodes, each with what its answers must be equal to.

A graph follows from its seed and number alone. To add a kind, write a function and a line in KINDS;
to add a way to be wrong, a line in `_WRONG`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Graph = dict[str, Any]
Link = list[Any]

#: Tasks by the base they fit.
TASKS = {"pocket": ("ink", "neon", "fruits", "smileys"), "tiny": ("tiny_a", "tiny_b")}
WORDS = ("cat", "fox", "house", "rocket", "star")
LORA = "ink_lora.safetensors"
#: Largest difference, as a share of the largest value, of sums that are made in another order.
ROUNDING = 5e-5


def node(kind: str, **inputs: Any) -> Graph:
    """Returns a node in API format."""
    return {"class_type": kind, "inputs": inputs}


def loaders() -> Graph:
    """Returns what every graph holds, used or not, so that ComfyUI keeps the models it has."""
    tasks = (*TASKS["pocket"], *TASKS["tiny"], "words", "silhouette", "edges")
    files = {"pocket": "diffscaler_pocket.safetensors", "tiny": "tiny.safetensors"}
    return {
        **{n: node("UNETLoader", unet_name=f, weight_dtype="default") for n, f in files.items()},
        "vae": node("VAELoader", vae_name="diffscaler_pocket_vae.safetensors"),
        **{n: node("DiffScalerLoadTask", task_name=f"{n}.safetensors") for n in tasks},
    }


@dataclass
class Recipe:
    """A workflow and its answers.

    Attributes:
        kind: Which of KINDS drew it.
        graph: In API format; `prepared` makes it ready to send.
        wanted: Node -> how its answer is read: latent, tensors, digest, picture or text.
        same: Pairs of answers that must be equal, with the tolerance.
        error: What the server must say; empty: it must succeed.
    """

    kind: str
    graph: Graph
    wanted: dict[str, str] = field(default_factory=dict)
    same: list[tuple[str, str, float]] = field(default_factory=list)
    error: str = ""

    def prepared(self, folder: str, number: int) -> Graph:
        """Returns the graph with outputs of its own.

        Args:
            folder: Where its files go, below the output folder.
            number: Another one makes samplers and training run again instead of answering out of
                ComfyUI's cache; the result is the same.
        """
        graph = copy.deepcopy(self.graph)
        graph["start"]["inputs"]["multiplier"] = 1e-9 * (1 + number)  # of zeros
        for name in self.wanted:
            if "filename_prefix" in graph[name]["inputs"]:
                graph[name]["inputs"]["filename_prefix"] = f"{folder}/{name}"
        for one in graph.values():
            if one["class_type"] == "DiffScalerTrainTask":
                one["inputs"]["name"] = self.run_name(number)
        return graph

    @staticmethod
    def run_name(number: int) -> str:
        """Returns the name of what the graph trains, if it does."""
        return f"soak{number}"


class Sheet:
    """A graph that is being drawn.

    Args:
        rng: Everything random about it.
        base: The name of the base, or none for any.
        batch: Number of latents; 0: any.
    """

    def __init__(self, kind: str, rng: random.Random, base: str = "", batch: int = 0) -> None:
        self.rng = rng
        self.base = base or rng.choices(("pocket", "tiny"), (3, 1))[0]
        self.recipe = Recipe(kind, loaders())
        self.size = rng.choice((64, 64, 96))
        self.graph = self.recipe.graph
        self._sampling = {
            "seed": rng.randrange(2**32),
            "steps": rng.choice((1, 2, 2, 3)),
            "cfg": rng.choice((1.0, 2.5, 4.0)),
            "sampler_name": rng.choice(("euler", "euler", "heun", "dpmpp_2m", "euler_ancestral")),
            "scheduler": rng.choice(("normal", "simple")),
            "denoise": 1.0,
        }
        self.batch = batch or rng.choice((1, 1, 2, 3, 4))
        sizes = {"width": self.size, "height": self.size, "batch_size": self.batch}
        self.graph["latent"] = node("EmptySD3LatentImage", **sizes)
        self.graph["start"] = node("LatentMultiply", samples=["latent", 0], multiplier=1.0)
        self.model: Link = [self.base, 0]
        self.positive, self.negative = self.prompt(rng.choice(WORDS)), self.prompt("")

    def add(self, kind: str, **inputs: Any) -> str:
        """Adds a node; returns its name."""
        name = f"{kind} {sum(one['class_type'] == kind for one in self.graph.values())}"
        self.graph[name] = node(kind, **inputs)
        return name

    def want(self, how: str, kind: str, **inputs: Any) -> str:
        """Adds an output node whose answer is compared; returns its name."""
        name = self.add(kind, **inputs)
        self.recipe.wanted[name] = how
        return name

    def prompt(self, word: str) -> Link:
        """Returns one of the stored prompts."""
        return [self.add("DiffScalerTaskConditioning", task=["words", 0], prompt=word), 0]

    def sample(self, model: Link, **other: Any) -> str:
        """Adds a sampler and what saves its latents; returns the saving node's name."""
        given = {"positive": self.positive, "negative": self.negative, "latent_image": ["start", 0]}
        name = self.add("KSampler", model=model, **{**given, **self._sampling, **other})
        return self.want("latent", "SaveLatent", samples=[name, 0], filename_prefix="")

    def strength(self) -> float:
        """Returns a strength."""
        return self.rng.choice((1.0, 0.5, 0.7, 1.3, -0.5, round(self.rng.uniform(0, 1.5), 3)))

    def apply(self, model: Link, task: Link, strength: float = 1.0, **more: Any) -> Link:
        """Returns a model with one task on it."""
        kind = "DiffScalerApplyTask"
        return [self.add(kind, model=model, task=task, strength=strength, **more), 0]

    def task(self, depth: int = 2) -> Link:
        """Returns a loaded task, or what nodes make of some."""
        plain: Link = [self.rng.choice(TASKS[self.base]), 0]
        choice = self.rng.random()
        if depth == 0 or choice < 0.4:
            return plain
        if choice < 0.5 and self.base == "pocket":
            return [self.add("DiffScalerImportLoRA", lora_name=LORA), 0]
        if choice < 0.75:
            parts = {part: self.rng.choice((1.0, 0.0, 0.5)) for part in ("scale", "subspace")}
            blocks = self.rng.choice(("", "0-1: 0.5", "attn: 1.2\n.*: 0.3"))
            scaled = {"strength": self.strength(), "blocks": blocks, **parts}
            return [self.add("DiffScalerScaleTask", task=self.task(depth - 1), **scaled), 0]
        both = [self.task(depth - 1) for _ in range(2)]
        return [self.add("DiffScalerCombineTasks", **slots(both), strengths="1, 0.5", name="x"), 0]

    def scheduled(self, task: Link) -> Link:
        """Returns the task with a strength over time."""
        points = self.rng.choice(("", "0: 0\n1: 1", "0: 1\n0.5: 0.2\nscale 0.3: 1"))
        fade = {"start": 0.2, "end": 0.9, "fade": self.rng.choice((0.0, 0.3))}
        way = self.rng.choice(("linear", "step", "smooth"))
        schedule = {"points": points, "interpolation": way, **fade}
        return [self.add("DiffScalerScheduleTask", task=task, **schedule), 0]

    def mask(self) -> Link:
        """Returns a mask of the left half."""
        nothing = self.add("SolidMask", value=0.0, width=64, height=64)
        half = self.add("SolidMask", value=1.0, width=32, height=64)
        both = {"destination": [nothing, 0], "source": [half, 0]}
        return [self.add("MaskComposite", **both, x=0, y=0, operation="add"), 0]

    def lora(self, model: Link) -> Link:
        """Returns a model with a LoRA by ComfyUI's own loader."""
        how = {"lora_name": LORA, "strength_model": self.strength()}
        return [self.add("LoraLoaderModelOnly", model=model, **how), 0]

    def changed(self, model: Link, length: int) -> Link:
        """Returns a model with a random chain of nodes on it."""
        for _ in range(length):
            choice = self.rng.random()
            if choice < 0.2 and self.base == "pocket":
                model = self.lora(model)
            elif choice < 0.45:
                tasks = [self.task() for _ in range(self.rng.randint(1, 3))]
                numbers = ", ".join(str(self.strength()) for _ in tasks)
                stack = {"model": model, **slots(tasks), "strengths": numbers}
                model = [self.add("DiffScalerStackTasks", **stack), 0]
            else:
                task = self.task()
                task = self.scheduled(task) if self.rng.random() < 0.3 else task
                more: dict[str, Any] = {}
                if self.rng.random() < 0.3:
                    more = {"start_percent": 0.2, "end_percent": self.rng.choice((0.6, 1.0))}
                if self.rng.random() < 0.3:
                    more["region"] = self.mask()
                model = self.apply(model, task, self.strength(), **more)
        return model


def slots(tasks: list[Link]) -> Graph:
    """Returns the inputs of a list of tasks that grows."""
    return {f"tasks.task{i}": task for i, task in enumerate(tasks)}


def _base(sheet: Sheet) -> None:
    sheet.sample(sheet.model)


def _chain(sheet: Sheet) -> None:
    sheet.sample(sheet.changed(sheet.model, sheet.rng.randint(1, 4)))


def _zero(sheet: Sheet) -> None:
    """Strength 0 is the model as it was, bit for bit, whatever is on it already."""
    before = sheet.changed(sheet.model, sheet.rng.randint(0, 2))
    after = sheet.apply(before, sheet.task(), 0.0)
    sheet.recipe.same.append((sheet.sample(before), sheet.sample(after), 0.0))


def _order(sheet: Sheet) -> None:
    one, other = ([name, 0] for name in sheet.rng.sample(TASKS[sheet.base], 2))
    a, b = sheet.strength(), sheet.strength()
    chain = sheet.apply(sheet.apply(sheet.model, one, a), other, b)
    back = sheet.apply(sheet.apply(sheet.model, other, b), one, a)
    numbers = {**slots([one, other]), "strengths": f"{a}, {b}"}
    stack = [sheet.add("DiffScalerStackTasks", model=sheet.model, **numbers), 0]
    mix = sheet.add("DiffScalerCombineTasks", **numbers, name="mix")
    first, *others = (
        sheet.sample(m) for m in (chain, back, stack, sheet.apply(sheet.model, [mix, 0]))
    )
    sheet.recipe.same += [(first, name, ROUNDING) for name in others]


def _turn(sheet: Sheet) -> None:
    """A task at two strengths in one graph; each is what the scaled task is at strength 1."""
    task: Link = [sheet.rng.choice(TASKS[sheet.base]), 0]
    for strength in sheet.rng.sample((1.3, 0.8, 0.5, -0.5), 2):
        turned = sheet.sample(sheet.apply(sheet.model, task, strength))
        scaled = sheet.add("DiffScalerScaleTask", task=task, strength=strength)
        alike = sheet.sample(sheet.apply(sheet.model, [scaled, 0]))
        sheet.recipe.same.append((turned, alike, ROUNDING))


def _route(sheet: Sheet) -> None:
    by_row = sheet.rng.random() < 0.5
    count = sheet.batch if by_row else sheet.rng.randint(1, 3)
    tasks = [sheet.task(1) for _ in range(count)]
    if sheet.rng.random() < 0.3:
        tasks[0] = sheet.scheduled(tasks[0])
    route = sheet.add(
        "DiffScalerRouteTasks",
        model=sheet.changed(sheet.model, sheet.rng.randint(0, 1)),
        positive=sheet.positive,
        negative=sheet.negative,
        **slots(tasks),
        strengths=str(sheet.strength()),
        mode="one task per latent" if by_row else "all tasks together",
    )
    positive: Link = [route, 1]
    if sheet.rng.random() < 0.3:
        both = {"conditioning_1": positive, "conditioning_2": sheet.prompt("guitar")}
        positive = [sheet.add("ConditioningCombine", **both), 0]
    sheet.sample([route, 0], positive=positive, negative=[route, 2])


def _compare(sheet: Sheet) -> None:
    """The row of the base is the base; the grid has its labels."""
    tasks = [sheet.task(1) for _ in range(sheet.rng.randint(1, 3))]
    compare = sheet.add(
        "DiffScalerCompareTasks",
        model=sheet.model,
        positive=sheet.positive,
        negative=sheet.negative,
        latent=["start", 0],
        strengths="",
        include_base=sheet.rng.random() < 0.7,
        **slots(tasks),
    )
    places = ("model", "positive", "negative", "latent_image")
    used = {place: [compare, i] for i, place in enumerate(places)}
    sheet.sample(used.pop("model"), **used)
    pictures = sheet.add("VAEDecode", samples=["KSampler 0", 0], vae=["vae", 0])
    listed = {"images": [pictures, 0], "names": [compare, 4], "columns": 2}
    grid = sheet.add("DiffScalerTaskGrid", **listed)
    sheet.want("picture", "SaveImage", images=[grid, 0], filename_prefix="")


def _control(sheet: Sheet) -> None:
    model, positive, negative = sheet.model, sheet.positive, sheet.negative
    for _ in range(sheet.rng.choice((1, 1, 2))):
        kind = sheet.rng.choice(("silhouette", "edges"))
        file = sheet.rng.choice(("cat", "star"))
        file = f"silhouette_{file}.png" if kind == "silhouette" else f"{file}.png"
        more: dict[str, Any] = {"mask": sheet.mask()} if sheet.rng.random() < 0.3 else {}
        control = sheet.add(
            "DiffScalerControl",
            model=model,
            positive=positive,
            negative=negative,
            task=[kind, 0],
            vae=["vae", 0],
            image=[sheet.add("LoadImage", image=file), 0],
            strength=sheet.rng.choice((1.0, 0.6, 0.0)),
            end_percent=sheet.rng.choice((1.0, 0.5)),
            control_in_uncond=sheet.rng.random() < 0.7,
            **more,
        )
        model, positive, negative = ([control, i] for i in range(3))
    model = sheet.changed(model, sheet.rng.randint(0, 1))
    sheet.sample(model, positive=positive, negative=negative)


def _save(sheet: Sheet) -> None:
    task = sheet.task()
    dtype = sheet.rng.choice(("keep", "bf16", "fp16"))
    save = {"task": task, "filename_prefix": "", "dtype": dtype, "title": "soak"}
    sheet.want("tensors", "DiffScalerSaveTask", **save)
    sheet.want("text", "DiffScalerTaskInfo", task=task)
    sheet.sample(sheet.apply(sheet.model, task))


def _extract(sheet: Sheet) -> None:
    """A LoRA of ComfyUI's own loader, as a task of small rank."""
    models = {"tuned": sheet.lora(sheet.model), "base": sheet.model}
    settings = {"name": "extracted", "rank": sheet.rng.choice((1, 2)), "targets": "attention"}
    task = sheet.add("DiffScalerExtractTask", **models, **settings)
    sheet.sample(sheet.apply(sheet.model, [task, 0]))
    sheet.sample(sheet.model)


def _train(sheet: Sheet) -> None:
    """Two steps, then the task and the base in one graph."""
    picture = sheet.add("LoadImage", image="cat.png")
    small = sheet.add(
        "ImageScale",
        image=[picture, 0],
        upscale_method="bilinear",
        width=64,
        height=64,
        crop="disabled",
    )
    latents = sheet.add("VAEEncode", pixels=[small, 0], vae=["vae", 0])
    few = dict(sample_every=0, sample_steps=1, warmup=0, save_every=0, validation_share=0.0)
    settings = sheet.add("DiffScalerTrainingSettings", **few)
    train = sheet.add(
        "DiffScalerTrainTask",
        model=sheet.model,
        name="soak",
        latents=[latents, 0],
        positive=sheet.positive,
        settings=[settings, 0],
        folder="(none)",
        resolution=64,
        method=sheet.rng.choice(("diffscaler", "lora", "bitfit")),
        rank=2,
        steps=2,
        batch_size=1,
        learning_rate=0.01,
        seed=sheet.rng.randrange(100),
        resume="never",
    )
    sheet.sample(sheet.apply(sheet.model, [train, 0]))
    sheet.sample(sheet.model)


def _weights(sheet: Sheet) -> None:
    """The base's weights as the server holds them now."""
    sheet.want("digest", "ModelSave", model=sheet.model, filename_prefix="")
    sheet.sample(sheet.changed(sheet.model, 1))


def _misfit(sheet: Sheet) -> None:
    sheet.sample(sheet.apply(["pocket", 0], ["tiny_a", 0]))


def _count(sheet: Sheet) -> None:
    tasks = {**slots([["ink", 0], ["neon", 0]]), "strengths": "1, 2, 3"}
    sheet.sample([sheet.add("DiffScalerStackTasks", model=["pocket", 0], **tasks), 0])


def _points(sheet: Sheet) -> None:
    wrong = {"task": ["ink", 0], "points": "0: 1\n2: 0", "interpolation": "linear"}
    sheet.sample(sheet.apply(["pocket", 0], [sheet.add("DiffScalerScheduleTask", **wrong), 0]))


def _rows(sheet: Sheet) -> None:
    tasks = slots([["ink", 0], ["neon", 0]])
    kind = {"mode": "one task per latent", "strengths": ""}
    prompts = {"positive": sheet.positive, "negative": sheet.negative}
    route = sheet.add("DiffScalerRouteTasks", model=["pocket", 0], **tasks, **kind, **prompts)
    more = sheet.add("RepeatLatentBatch", samples=["start", 0], amount=3)
    used = {"positive": [route, 1], "negative": [route, 2], "latent_image": [more, 0]}
    sheet.sample([route, 0], **used)


def _file(name: str) -> Callable[[Sheet], None]:
    def wrong(sheet: Sheet) -> None:
        task = sheet.add("DiffScalerLoadTask", task_name=name)
        sheet.sample(sheet.apply(["pocket", 0], [task, 0]))

    return wrong


def _uncontrolled(sheet: Sheet) -> None:
    sheet.sample(sheet.apply(["pocket", 0], ["edges", 0]))


def _escape(sheet: Sheet) -> None:
    sheet.add("DiffScalerSaveTask", task=["ink", 0], filename_prefix="../../soak", dtype="keep")


def _loha(sheet: Sheet) -> None:
    task = sheet.add("DiffScalerImportLoRA", lora_name="loha.safetensors")
    sheet.sample(sheet.apply(["pocket", 0], [task, 0]))


def _unlike(sheet: Sheet) -> None:
    both = {"tuned": ["tiny", 0], "base": ["pocket", 0], "name": "wrong", "rank": 2}
    task = sheet.add("DiffScalerExtractTask", **both)
    sheet.sample(sheet.apply(["pocket", 0], [task, 0]))


def _word(sheet: Sheet) -> None:
    sheet.sample(sheet.model, positive=sheet.prompt("no such prompt"))


def _pattern(sheet: Sheet) -> None:
    wrong = {"task": ["ink", 0], "strength": 1.0, "blocks": "(((: 1"}
    sheet.sample(sheet.apply(["pocket", 0], [sheet.add("DiffScalerScaleTask", **wrong), 0]))


def _pictures(sheet: Sheet) -> None:
    pair = sheet.add("EmptyImage", width=64, height=64, batch_size=2, color=0)
    prompts = {"positive": sheet.positive, "negative": sheet.negative}
    given = {"task": ["edges", 0], "vae": ["vae", 0], "image": [pair, 0], "strength": 1.0}
    control = sheet.add("DiffScalerControl", model=["pocket", 0], **prompts, **given)
    used = {"positive": [control, 1], "negative": [control, 2]}
    sheet.sample([control, 0], **used)


#: What is wrong, and a pattern of what the server must say.
_WRONG: list[tuple[Callable[[Sheet], None], str]] = [
    (_misfit, r"DiffScalerApplyTask failed.*'tiny_a'.*does not fit"),
    (_count, r"3 strengths for 2 tasks"),
    (_points, r"DiffScalerScheduleTask failed.*line 2"),
    (_rows, r"KSampler failed.*for 2 latents, but the latent batch has 3"),
    (_file("missing.safetensors"), r"400.*value_not_in_list"),
    (_file("broken.safetensors"), r"no safetensors file or is cut short"),
    (_uncontrolled, r"takes a control picture"),
    (_escape, r"DiffScalerSaveTask failed.*output folder"),
    (_loha, r"DiffScalerImportLoRA failed.*LoHa"),
    (_unlike, r"DiffScalerExtractTask failed.*no fine-tune of the base"),
    (_word, r"DiffScalerTaskConditioning failed.*no such prompt"),
    (_pattern, r"DiffScalerScaleTask failed.*\(\(\("),
    (_pictures, r"2 control images of 'edges' for a latent batch"),
]

#: Kind -> how it is drawn, how often, the base and the batch it needs.
KINDS: dict[str, tuple[Callable[[Sheet], None], float, str, int]] = {
    "base": (_base, 3, "", 0),
    "chain": (_chain, 8, "", 0),
    "zero": (_zero, 2, "", 0),
    "order": (_order, 2, "", 0),
    "turn": (_turn, 2, "", 0),
    "route": (_route, 3, "", 0),
    "compare": (_compare, 2, "pocket", 1),
    "control": (_control, 3, "pocket", 0),
    "save": (_save, 1.5, "", 0),
    "extract": (_extract, 1, "pocket", 1),
    "train": (_train, 0.6, "", 1),
    "weights": (_weights, 1.5, "", 1),
    "wrong": (_escape, 4, "pocket", 1),
}


def draw(seed: int, number: int) -> Recipe:
    """Returns one workflow; the first ones are one of each kind."""
    rng = random.Random(f"{seed}/{number}")
    shares = [share for _, share, _, _ in KINDS.values()]
    kind = rng.choices(list(KINDS), shares)[0] if number >= len(KINDS) else list(KINDS)[number]
    make, _, base, batch = KINDS[kind]
    sheet = Sheet(kind, rng, base, batch)
    if kind == "wrong":
        make, sheet.recipe.error = rng.choice(_WRONG)
    make(sheet)
    return sheet.recipe
