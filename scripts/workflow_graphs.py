"""The workflows of ComfyUI's template browser, as data: nodes, links, places, a note each.

`make_workflows.py` turns them into files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workflow_parts import (
    BLUE,
    GREEN,
    GREY,
    GUIDANCE,
    PALE,
    PICTURE,
    ROW,
    SEED,
    SIZE,
    STEPS,
    TALL,
    WIDTH,
    Link,
    Workflow,
    three,
)


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


def compare_tasks() -> Workflow:
    """One prompt and seed under several tasks, in one batch."""
    flow = Workflow(
        "compare_tasks",
        "**The same prompt and seed under four tasks, in one batch.** *Compare* makes a batch with "
        "one latent per task and the base first, all from the same noise; *Task Grid* puts the "
        "pictures side by side. One sampling run, one call of the model a step.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "cat", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    names = ("ink", "neon", "fruits", "smileys")
    tasks = [flow.task(name, (1, 470 + 130 * i)) for i, name in enumerate(names)]
    flow.frame("four tasks", GREEN, *tasks)
    compared = flow.add(
        "DiffScalerCompareTasks",
        (2, 0),
        color="green",
        model=model,
        positive=positive,
        negative=negative,
        latent=latent,
        strengths="",
        include_base=True,
        **{f"tasks.task{i}": task for i, task in enumerate(tasks)},
    )
    key = compared[0]
    samples = flow.sampler("all in one batch", (2, 390), [[key, i] for i in range(4)])
    pictures = flow.add("VAEDecode", (3, 0), samples=samples, vae=vae)
    grid = flow.add(
        "DiffScalerTaskGrid",
        (3, 100),
        color="green",
        images=pictures,
        names=[key, 4],
        columns=3,
    )
    shown = flow.add("PreviewImage", (4, 0), "side by side", (2 * WIDTH, 490), images=grid)
    flow.frame("one batch", GREY, compared, samples, pictures, grid, shown)
    return flow


def regions() -> Workflow:
    """Two tasks, each in its own half of one picture."""
    flow = Workflow(
        "regions",
        "**Each task in its own part of the picture.** From above: *fruits* everywhere, *ink* "
        "everywhere, *fruits* left and *ink* right. *region* takes any mask, of any size; all "
        "tasks run in the same call of the model.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "heart", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    names = ("fruits", "ink")
    fruits, ink = (flow.task(name, (1, 470 + 130 * i)) for i, name in enumerate(names))
    flow.frame("two tasks", GREEN, fruits, ink)
    nothing = flow.add("SolidMask", (1, 790), "nowhere", value=0.0, width=SIZE, height=SIZE)
    half = flow.add("SolidMask", (1, 970), "a half", value=1.0, width=SIZE // 2, height=SIZE)
    left = flow.add(
        "MaskComposite",
        (1, 1150),
        "left half",
        destination=nothing,
        source=half,
        x=0,
        y=0,
        operation="add",
    )
    right = flow.add("InvertMask", (1, 1360), "right half", mask=left)
    flow.frame("two masks; any mask will do", BLUE, nothing, half, left, right)
    for i, (name, task) in enumerate(zip(names, (fruits, ink), strict=True)):
        applied = flow.apply(model, task, (2, ROW * i))
        title = f"{name} everywhere"
        flow.picture(title, (3, ROW * i), (applied, positive, negative, latent, vae), applied)
    first = flow.apply(model, fruits, (2, 2 * ROW), region=left)
    both = flow.apply(first, ink, (2, 3 * ROW), region=right)
    parts = (both, positive, negative, latent, vae)
    flow.picture("fruits left, ink right", (3, 2 * ROW), parts, first, both)
    return flow


def _trained_on_ink(
    flow: Workflow, word: str, settings: dict[str, Any], **told: Any
) -> tuple[Link, tuple[Link, Link, Link, Link], Link]:
    """Adds a base, its prompts and a training on the pack's ink drawings.

    Returns the model, (positive, negative, latent, VAE), and the training.
    """
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, word, (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    chosen = flow.add("DiffScalerTrainingSettings", (1, 470), color="green", **settings)
    trained = flow.add(
        "DiffScalerTrainTask",
        (2, 0),
        color="green",
        model=model,
        folder="example: ink drawings",
        resolution=SIZE,
        method="diffscaler",
        batch_size=8,
        learning_rate=0.005,
        seed=0,
        resume="auto",
        vae=vae,
        words=words,
        settings=chosen,
        **told,
    )
    flow.frame("settings", GREEN, chosen)
    flow.frame("training", GREEN, trained)
    return model, (positive, negative, latent, vae), trained


def train_task() -> Workflow:
    """A task trained on the pack's own pictures, and put to use."""
    flow = Workflow(
        "train_task",
        "**Train a task, then use it.** 20 ink drawings that come with the pack, 200 steps, about "
        "two minutes on a CPU; samples appear on the node. Then a word that was not among them, "
        "before and after. For your own pictures choose a folder of ComfyUI's *input*.",
    )
    model, others, trained = _trained_on_ink(
        flow,
        "bear",
        {"sample_every": 50, "guidance": GUIDANCE},
        name="ink_example",
        rank=8,
        steps=200,
    )
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
    flow.picture("before", (4, 0), (model, *others))
    flow.picture("after", (4, ROW), (applied, *others), applied)
    return flow


def time_ranges() -> Workflow:
    """A task whose units are shared out among ranges of noise, trained and put to use."""
    flow = Workflow(
        "time_ranges",
        "**Experts for ranges of noise.** As in *train_task*, but *experts* on the settings shares "
        "out the 16 units of each layer's new subspace: 4 act at each of 4 ranges of noise, one "
        "after the other while a picture is drawn. Everything else about the task is as usual. "
        "100 steps, about two minutes on a CPU.",
    )
    model, others, trained = _trained_on_ink(
        flow, "rocket", {"experts": 4}, name="ink_by_noise", rank=16, steps=100
    )
    told = flow.add("DiffScalerTaskInfo", (3, 1060), task=trained)
    applied = flow.apply(model, trained, (3, ROW))
    flow.picture("before", (4, 0), (model, *others))
    flow.picture("after", (4, ROW), (applied, *others), applied)
    flow.frame("the task", GREY, told)
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
        parts = (*three(node), latent, vae)
        flow.picture(f"with its {name}", (3, y), parts, tasks[name], node)
        y += TALL
    both, nodes = plain, []
    for i, (name, image) in enumerate(pictures.items()):
        nodes.append(flow.controlled((2, y + 390 * i), both, tasks[name], vae, image, 0.6))
        both = three(nodes[-1])
    flow.picture("with both", (3, y), (*both, latent, vae), *nodes)
    return flow


def refine() -> Workflow:
    """A blurred picture and a tiny one, made sharp by the task *refine*."""
    flow = Workflow(
        "refine",
        "**A coarse picture becomes a sharp one.** A picture is blurred, and shrunk to 12 pixels a "
        "side; the task *refine* reads either as its control. Any coarse picture will do: connect "
        "yours in place of *blurred*. Copy the pictures of the pack's `assets/examples/control` "
        "into `input`, and those of `assets/tasks` into `models/diffscaler` first.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "penguin", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    photo = flow.add("LoadImage", (1, 470), "a picture", (WIDTH, 330), image="penguin.png")
    small = flow.add(
        *("ImageScale", (1, 860), "12 pixels a side"),
        image=photo, upscale_method="area", width=12, height=12, crop="disabled",
    )  # fmt: skip
    coarse = {
        "blurred": flow.add(
            "ImageBlur", (2, 0), "blurred", image=photo, blur_radius=19, sigma=6.4
        ),
        "shrunk": flow.add(
            *("ImageScale", (2, TALL), "shrunk"),
            image=small, upscale_method="bicubic", width=SIZE, height=SIZE, crop="disabled",
        ),
    }  # fmt: skip
    flow.frame("the true picture", BLUE, photo, small)
    task = flow.task("refine", (1, 1060))
    flow.frame("the task", GREEN, task)
    for i, (name, image) in enumerate(coarse.items()):
        y = TALL * i
        shown = flow.add("PreviewImage", (2, y + 180), name, PICTURE, images=image)
        node = flow.controlled((3, y), (model, positive, negative), task, vae, image, 1.0)
        flow.picture(
            f"refined, from {name}", (4, y), (*three(node), latent, vae), image, shown, node
        )
    return flow


def import_lora() -> Workflow:
    """A LoRA file by ComfyUI's own loader, and the same file as a task."""
    flow = Workflow(
        "import_lora",
        "**A LoRA as a task.** From above: the base, ComfyUI's own loader with a LoRA file, that "
        "file imported as a task (the same picture), and as one of two stacked tasks. As a task it "
        "switches without patching weights, and routes, schedules and regions work on it. Put "
        "*assets/examples/loras* into *models/loras*, or choose a LoRA of yours for your model.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "house", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    file = "ink_lora.safetensors"
    stock = flow.add(
        "LoraLoaderModelOnly", (1, 470), model=model, lora_name=file, strength_model=1.0
    )
    imported = flow.add("DiffScalerImportLoRA", (1, 640), color="green", lora_name=file)
    alone = flow.apply(model, imported, (1, 1010))
    neon = flow.task("neon", (1, 1300))
    both = flow.add(
        "DiffScalerStackTasks",
        (1, 1430),
        color="green",
        model=model,
        strengths="0.6, 0.6",
        **{"tasks.task0": imported, "tasks.task1": neon},
    )
    flow.frame("the LoRA", GREEN, stock, imported, alone, neon, both)
    rows = {"the base": model, "ComfyUI's loader": stock, "as a task": alone, "with neon": both}
    for i, (title, own) in enumerate(rows.items()):
        flow.picture(title, (2, ROW * i), (own, positive, negative, latent, vae))
    return flow


def many_tasks() -> Workflow:
    """A task for each latent of a batch, and a task for each prompt."""
    flow = Workflow(
        "many_tasks",
        "**Several tasks in one batch, in one call of the model.** Above, *one task per latent*: "
        "four latents, four tasks. Below, *all tasks together*: each prompt runs a task of its "
        "own, *ink* in the left half and *neon* in the right; the negative prompt runs the base.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "cat", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    second = flow.prompt(words, "house", (1, 410))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative, second)
    names = ("ink", "neon", "fruits", "smileys")
    tasks = [flow.task(name, (1, 610 + 130 * i)) for i, name in enumerate(names)]
    flow.frame("four tasks", GREEN, *tasks)
    four = flow.add("RepeatLatentBatch", (2, 330), samples=latent, amount=4)
    by_row = flow.add(
        "DiffScalerRouteTasks",
        (2, 0),
        "Route: one task per latent",
        color="green",
        model=model,
        positive=positive,
        strengths="",
        mode="one task per latent",
        **{f"tasks.task{i}": task for i, task in enumerate(tasks)},
    )
    parts = (by_row, [by_row[0], 1], negative, four, vae)
    flow.picture("four tasks", (4, 0), parts, by_row, four)
    y, routed, chosen = 500, [], model
    wide = flow.add(
        "EmptySD3LatentImage",
        (2, y + 2 * 360),
        "Empty Latent, twice as wide",
        width=2 * SIZE,
        height=SIZE,
        batch_size=1,
    )
    for i, (task, prompt) in enumerate(zip(tasks, (positive, second), strict=False)):
        area = flow.add(
            "ConditioningSetAreaPercentage",
            (2, y + 360 * i),
            ("left half", "right half")[i],
            conditioning=prompt,
            width=0.5,
            height=1.0,
            x=0.5 * i,
            y=0.0,
            strength=1.0,
        )
        own = flow.add(
            "DiffScalerRouteTasks",
            (3, y + 360 * i),
            f"Route: {names[i]}",
            color="green",
            model=chosen,
            positive=area,
            strengths="",
            mode="all tasks together",
            **{"tasks.task0": task},
        )
        chosen = own
        routed += [area, own]
    halves = flow.add(
        "ConditioningCombine",
        (3, y + 2 * 360),
        conditioning_1=[routed[1][0], 1],
        conditioning_2=[routed[3][0], 1],
    )
    parts = (chosen, halves, negative, wide, vae)
    flow.picture("a task for each prompt", (4, y), parts, *routed, halves, wide)
    return flow


def route_experts() -> Workflow:
    """Two tasks as one model, by a router."""
    flow = Workflow(
        "route_experts",
        "**Two experts and a router.** *fruits* and *smileys* were trained apart. At each step the "
        "router looks at each latent and says which of them it is for, so that four latents "
        "become fruits and smileys, in one call of the model a step. No prompt says which. Above, "
        "the base alone draws the same noise.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    empty = flow.prompt(words, "", (1, 130))
    flow.frame("empty prompt", PALE, words, empty)
    tasks = [flow.task(name, (1, 330 + 130 * i)) for i, name in enumerate(("fruits", "smileys"))]
    flow.frame("two experts", GREEN, *tasks)
    four = flow.add("RepeatLatentBatch", (2, 260), samples=latent, amount=4)
    routed = flow.add(
        "DiffScalerRouteExperts",
        (2, 400),
        color="green",
        model=model,
        router_name="fruits_smileys.safetensors",
        mode="top1",
        strength=1.0,
        **{f"tasks.task{i}": task for i, task in enumerate(tasks)},
    )
    flow.picture("the base", (3, 0), (model, empty, empty, four, vae), four)
    flow.picture("fruits and smileys", (3, ROW), (routed, empty, empty, four, vae), routed)
    return flow


def schedule() -> Workflow:
    """A task whose strength follows sampling time."""
    flow = Workflow(
        "schedule",
        "**A strength that changes while the picture is drawn.** From above: *neon* at full "
        "strength all the time, only in the first part, only in the last part, and coming in "
        "slowly. Percent 0 is pure noise, 1 the picture. Drag the curve, or write its points.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "rocket", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    neon = flow.task("neon", (1, 470))
    flow.frame("task", GREEN, neon)
    rows = {
        "all the time": "",
        "the first part": "0.25: 1\n0.35: 0",
        "the last part": "0.5: 0\n0.6: 1",
        "slowly": "0: 0\n1: 1",
    }
    for i, (title, points) in enumerate(rows.items()):
        task, framed = neon, []
        if points:
            task = flow.add(
                "DiffScalerScheduleTask",
                (2, TALL * i),
                f"Schedule: {title}",
                (WIDTH, 420),
                color="green",
                task=neon,
                points=points,
                interpolation="linear",
            )
            framed.append(task)
        applied = flow.apply(model, task, (3, TALL * i))
        parts = (applied, positive, negative, latent, vae)
        flow.picture(title, (4, TALL * i), parts, *framed, applied)
    return flow


def extract_task() -> Workflow:
    """A fine-tuned model minus its base, as a task."""
    flow = Workflow(
        "extract_task",
        "**What fine-tuning changed, as a task.** From above: the base, a tuned model, the task "
        "extracted at rank 16, at rank 1. The tuned model is the base with a LoRA here, which rank "
        "16 holds whole; put *Load Diffusion Model* with any fine-tune of your base in its place "
        "(rank 32 or more then). Put *assets/examples/loras* into *models/loras*.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "fox", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    tuned = flow.add(
        "LoraLoaderModelOnly",
        (1, 470),
        "stands for a fine-tuned model",
        model=model,
        lora_name="ink_lora.safetensors",
        strength_model=1.0,
    )
    flow.frame("the tuned model", BLUE, tuned)
    rows: list[tuple[str, Link, list[Link]]] = [
        ("the base", model, []),
        ("the tuned model", tuned, []),
    ]
    for i, rank in enumerate((16, 1), start=2):
        task = flow.add(
            "DiffScalerExtractTask",
            (2, TALL * i),
            f"Extract: rank {rank}",
            (WIDTH, 400),
            color="green",
            tuned=tuned,
            base=model,
            name=f"rank {rank}",
            rank=rank,
        )
        applied = flow.apply(model, task, (3, TALL * i))
        rows.append((f"the task, rank {rank}", applied, [task, applied]))
    for i, (title, own, framed) in enumerate(rows):
        parts = (own, positive, negative, latent, vae)
        flow.picture(title, (4, TALL * i), parts, *framed)
    return flow


def pick_task() -> Workflow:
    """Which of four tasks drew a picture, and another picture by that one."""
    flow = Workflow(
        "pick_task",
        "**Which task made this picture?** Above, a cat is drawn by *ink*. *Pick* gets the picture "
        "alone, and finds the task among four: the one under which the model removes noise from it "
        "best. What it found draws a house. Put *Load Image* in the place of the cat for a picture "
        "of yours, at the size your model draws; if none of your tasks fits, it says so.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    cat = flow.prompt(words, "cat", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    house = flow.prompt(words, "house", (1, 410))
    flow.frame("prompts, stored in a task file", PALE, words, cat, negative, house)
    names = ("fruits", "smileys", "ink", "neon")
    tasks = [flow.task(name, (1, 610 + 130 * i)) for i, name in enumerate(names)]
    flow.frame("four tasks", GREEN, *tasks)
    maker = flow.apply(model, tasks[names.index("ink")], (2, 0))
    shown = flow.picture("a picture", (3, 0), (maker, cat, negative, latent, vae), maker)
    picked = flow.add(
        "DiffScalerPickTask",
        (2, ROW),
        color="green",
        model=model,
        vae=vae,
        image=shown,
        probes=16,
        threshold=3.0,
        if_none="stop",
        seed=0,
        conditioning=negative,
        **{f"tasks.task{i}": task for i, task in enumerate(tasks)},
    )
    key = picked[0]
    chart = flow.add(
        "PreviewImage", (3, ROW), "how well each fits", (2 * WIDTH, 270), images=[key, 3]
    )
    flow.frame("which task?", GREEN, picked, chart)
    applied = flow.apply(model, picked, (2, 2 * TALL + 60))
    parts = (applied, house, negative, latent, vae)
    flow.picture("another by the same task", (3, 2 * TALL + 60), parts, applied)
    return flow


def translate() -> Workflow:
    """A picture of the base as ink and as neon, and the neon one as ink."""
    flow = Workflow(
        "translate",
        "**A picture under another task, from its own noise.** From above: a picture of the base; "
        "translated to *ink*, to *neon*; the neon one translated on to *ink*. *DiffScaler "
        "Translate* takes the place of the sampler. Put *Load Image* in the place of the picture "
        "for one of yours, at the size your model draws.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "house", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    names = ("ink", "neon")
    tasks = {name: flow.task(name, (1, 470 + 130 * i)) for i, name in enumerate(names)}
    applied = {
        name: flow.apply(model, task, (1, 760 + 300 * i))
        for i, (name, task) in enumerate(tasks.items())
    }
    flow.frame("two tasks", GREEN, *tasks.values(), *applied.values())
    parts = (model, positive, negative, latent, vae)
    pictures = {"base": flow.picture("a picture of the base", (3, 0), parts)}
    models = {"base": model, **applied}
    for i, (old, new) in enumerate((("base", "ink"), ("base", "neon"), ("neon", "ink")), start=1):
        y = TALL * i - 130
        encoded = flow.add("VAEEncode", (2, y), pixels=pictures[old], vae=vae)
        moved = flow.add(
            "DiffScalerTranslate",
            (3, y),
            f"Translate: {old} to {new}",
            color="green",
            source_model=models[old],
            target_model=models[new],
            source_positive=positive,
            target_positive=positive,
            negative=negative,
            latent=encoded,
            seed=SEED,
            steps=STEPS,
            cfg=GUIDANCE,
            scheduler="normal",
            strength=0.8,
        )
        drawn = flow.add("VAEDecode", (4, y), samples=moved, vae=vae)
        title = f"from {old} to {new}"
        shown = flow.add("PreviewImage", (5, y), title, PICTURE, images=drawn)
        flow.frame(title, GREY, encoded, moved, drawn, shown)
        pictures[new] = drawn
    return flow


def guided() -> Workflow:
    """A mean colour that a model is led to, everywhere and in a half."""
    flow = Workflow(
        "guided",
        "**Led by a loss, with nothing trained.** From above: the base; led to a blue mean colour; "
        "the same picture, of which only the right half may change, led to red. *Guidance Loss* "
        "also takes edges or features of a picture, and several in a row add up.",
    )
    model, vae, latent = flow.base()
    words = flow.task("words", (1, 0))
    positive = flow.prompt(words, "cat", (1, 130))
    negative = flow.prompt(words, "", (1, 270))
    flow.frame("prompts, stored in a task file", PALE, words, positive, negative)
    nothing = flow.add("SolidMask", (1, 470), "nowhere", value=0.0, width=SIZE, height=SIZE)
    half = flow.add("SolidMask", (1, 650), "a half", value=1.0, width=SIZE // 2, height=SIZE)
    right = flow.add(
        "MaskComposite",
        (1, 830),
        "right half",
        destination=nothing,
        source=half,
        x=SIZE // 2,
        y=0,
        operation="add",
    )
    flow.frame("where the last may change", BLUE, nothing, half, right)
    plain = flow.picture("not led", (4, 0), (model, positive, negative, latent, vae))
    encoded = flow.add("VAEEncode", (2, 2 * TALL + 60), pixels=plain, vae=vae)
    masked = flow.add("SetLatentNoiseMask", (2, 2 * TALL + 160), samples=encoded, mask=right)
    rows = (
        ("led to blue", "#3060d0", 0.5, latent, {}, ()),
        ("the right half, to red", "#d03030", 0.8, masked, {"mask": right}, (encoded, masked)),
    )
    for i, (title, colour, strength, start, where, framed) in enumerate(rows, start=1):
        y = TALL * i
        loss = flow.add(
            "DiffScalerGuidanceLoss",
            (2, y - 200 * (i == 2)),
            color="green",
            kind="colour",
            weight=1.0,
            colour=colour,
            **where,
        )
        led = flow.add(
            "DiffScalerGuideModel",
            (3, y),
            color="green",
            model=model,
            losses=loss,
            strength=strength,
            vae=vae,
        )
        parts = (led, positive, negative, start, vae)
        flow.picture(title, (4, y), parts, *framed, loss, led)
    return flow


ALL: Sequence[Callable[[], Workflow]] = (
    apply_task,
    stack_tasks,
    task_prompts,
    combine_and_save,
    control,
    refine,
    compare_tasks,
    many_tasks,
    route_experts,
    schedule,
    regions,
    train_task,
    time_ranges,
    import_lora,
    extract_task,
    pick_task,
    translate,
    guided,
)
