"""`make demo`: one base, several tasks and controls, in a real ComfyUI and in diffusers.

Starts ComfyUI's own server with this pack, queues the contact sheets of `workflows/api` over HTTP,
then draws the same cells with diffusers, and says how far the two hosts' pictures are apart.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy_host
import numpy as np
from comfy_http import HostError
from contact_sheet import (
    GUIDANCE,
    SHEETS,
    STEPS,
    WORDS,
    WORKFLOWS,
    Cell,
    cells_of,
    compose,
    picture,
    source_of,
)
from PIL import Image, ImageChops

OUT = comfy_host.ROOT / "out"
TASKS = comfy_host.POCKET / "diffscaler"
BATCH = 21  # cells that diffusers draws in one batch, each row with its own tasks


def main() -> None:
    """Draws the sheets and compares them."""
    try:
        OUT.mkdir(exist_ok=True)
        with _step("ComfyUI: starting the server and queueing the workflows"):
            in_comfyui = draw_in_comfyui()
        _save("ComfyUI", in_comfyui)
        count = sum(map(len, in_comfyui.values()))
        with _step(f"diffusers: the same {count} pictures, {BATCH} mixed rows to a batch"):
            in_diffusers = draw_in_diffusers()
        _save("diffusers", in_diffusers)
        apart = max(difference(in_comfyui[sheet], in_diffusers[sheet]) for sheet in SHEETS)
        print(f"demo: largest difference between the two hosts: {apart}/255")
    except (HostError, OSError, ValueError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; nothing is left running")


def draw_in_comfyui() -> dict[str, list[Image.Image]]:
    """Returns each sheet's cells as ComfyUI draws them, in order."""
    drawn = {}
    with comfy_host.running_server(comfy_host.CACHE / "demo") as server:
        for sheet in SHEETS:
            workflow = json.loads((WORKFLOWS / f"{sheet}.json").read_text(encoding="utf-8"))
            entry = server.run(workflow, timeout=1200)
            saved = sorted(node for node in entry["outputs"] if node.endswith("-save"))
            outputs = [{"outputs": {node: entry["outputs"][node]}} for node in saved]
            drawn[sheet] = [picture(server.images(output)[0]) for output in outputs]
    return drawn


def draw_in_diffusers() -> dict[str, list[Image.Image]]:
    """Returns the same cells from diffusers, many tasks and controls in each batch."""
    import diffscaler_core.pipelines  # noqa: F401 (gives the pipeline its methods)
    from diffscaler_core import load_task
    from diffscaler_core.pocket import load_pipeline

    pipe = load_pipeline(comfy_host.POCKET)
    pipe.set_progress_bar_config(disable=True)
    cells = {sheet: cells_of(sheet) for sheet in SHEETS}
    every = [cell for own in cells.values() for cell in own]
    used = dict.fromkeys(
        name for cell in every for name in (*cell.tasks, *cell.controls, cell.prompt_task)
    )
    tasks = {name: load_task(TASKS / f"{name}.safetensors") for name in used}
    for name in dict.fromkeys(name for cell in every for name in (*cell.tasks, *cell.controls)):
        pipe.load_diffscaler(tasks[name], adapter_name=name)
    drawn: dict[str, list[Image.Image]] = {}
    for sheet, own in cells.items():
        results = iter(_drawn(pipe, [cell for cell in own if not cell.shows], tasks))
        drawn[sheet] = [
            control_picture(cell.shows, cell.source) if cell.shows else next(results)
            for cell in own
        ]
    return drawn


def _drawn(pipe: Any, cells: Sequence[Cell], tasks: dict) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for part in _batches(cells, BATCH):
        with ExitStack() as rows:
            mixes = [{**cell.tasks, **cell.controls} or None for cell in part]
            rows.enter_context(pipe.diffscaler_rows(mixes))
            for kind in dict.fromkeys(kind for cell in part for kind in cell.controls):
                images = [
                    control_picture(kind, cell.source) if kind in cell.controls else None
                    for cell in part
                ]
                rows.enter_context(pipe.diffscaler_control(images, adapter_name=kind))
            pictures += pipe(**_inputs(part, tasks)).images
    return pictures


def control_picture(kind: str, name: str) -> Image.Image:
    """Returns a control picture: a file's, or the edges in it."""
    image = Image.open(source_of(kind, name)).convert("RGB")
    if kind != "edges":
        return image
    import torch

    from diffscaler_core.training.data.controls import edges
    from diffscaler_core.training.preview import to_image

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return to_image(edges(pixels / 127.5 - 1, 0))


def _inputs(cells: Sequence[Cell], tasks: dict) -> dict:
    """Returns a pipeline call's arguments for some cells, one row each."""
    import torch

    prompts = [tasks[cell.prompt_task].prompt(cell.prompt) for cell in cells]
    empty, empty_pooled = tasks[WORDS].prompt("")
    return {
        "prompt_embeds": torch.cat([context.float() for context, _ in prompts]),
        "pooled_prompt_embeds": torch.cat([pooled.float() for _, pooled in prompts]),
        "negative_prompt_embeds": empty.float().expand(len(cells), -1, -1),
        "negative_pooled_prompt_embeds": empty_pooled.float().expand(len(cells), -1),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": [torch.Generator().manual_seed(cell.seed) for cell in cells],
    }


def difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> int:
    """Returns the largest difference of any pixel's channel, of 255."""
    pairs = zip(one, other, strict=True)
    extrema = [
        ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema() for a, b in pairs
    ]
    return max(high for channels in extrema for _, high in channels)


def _batches(cells: Sequence[Cell], size: int) -> Iterator[list[Cell]]:
    remaining = iter(cells)
    while batch := list(itertools.islice(remaining, size)):
        yield batch


def _save(host: str, drawn: dict[str, list[Image.Image]]) -> None:
    for sheet, pictures in drawn.items():
        path = OUT / f"{sheet}_{host.lower()}.png"
        compose(sheet, host, pictures).save(path)
        print(f"demo: {host}'s pictures   {path}")


@contextmanager
def _step(text: str) -> Iterator[None]:
    print(f"demo: {text} …", flush=True)
    started = time.monotonic()
    yield
    print(f"demo:   done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
