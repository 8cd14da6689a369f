"""`make demo`: one base, several tasks, in a real ComfyUI and in diffusers, side by side.

Starts ComfyUI's own server with this pack, queues `workflows/api/contact_sheet.json` over HTTP,
then draws the same cells with diffusers, and says how far the two hosts' pictures are apart.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import comfy_host
from comfy_http import HostError
from contact_sheet import CELLS, GUIDANCE, STEPS, WORDS, WORKFLOW, Cell, compose, picture
from PIL import Image, ImageChops

OUT = comfy_host.ROOT / "out"
TASKS = comfy_host.POCKET / "diffscaler"
BATCH = 21  # cells that diffusers draws in one batch, each row with its own tasks


def main() -> None:
    """Draws both sheets and compares them."""
    try:
        OUT.mkdir(exist_ok=True)
        with _step("ComfyUI: starting the server and queueing the workflow"):
            in_comfyui = draw_in_comfyui()
        path = _save(
            in_comfyui, "ComfyUI: one frozen base, many tasks", "contact_sheet_comfyui.png"
        )
        print(f"demo: ComfyUI's pictures   {path}")
        with _step(f"diffusers: the same {len(CELLS)} pictures, {BATCH} mixed rows to a batch"):
            in_diffusers = draw_in_diffusers()
        path = _save(
            in_diffusers, "diffusers: one frozen base, many tasks", "contact_sheet_diffusers.png"
        )
        print(f"demo: diffusers' pictures  {path}")
        apart = difference(in_comfyui, in_diffusers)
        print(f"demo: largest difference between the two hosts: {apart}/255")
    except (HostError, OSError, ValueError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; nothing is left running")


def draw_in_comfyui() -> list[Image.Image]:
    """Returns the cells as ComfyUI draws them, in order."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    with comfy_host.running_server(comfy_host.CACHE / "demo") as server:
        entry = server.run(workflow, timeout=300)
        saved = sorted(node for node in entry["outputs"] if node.endswith("-save"))
        outputs = [{"outputs": {node: entry["outputs"][node]}} for node in saved]
        return [picture(server.images(output)[0]) for output in outputs]


def draw_in_diffusers() -> list[Image.Image]:
    """Returns the same cells from diffusers, many tasks in each batch."""
    import diffscaler_core.pipelines  # noqa: F401 (gives the pipeline its methods)
    from diffscaler_core import load_task
    from diffscaler_core.pocket import load_pipeline

    pipe = load_pipeline(comfy_host.POCKET)
    pipe.set_progress_bar_config(disable=True)
    used = dict.fromkeys(name for cell in CELLS for name in (*cell.tasks, cell.prompt_task))
    tasks = {name: load_task(TASKS / f"{name}.safetensors") for name in used}
    for name in dict.fromkeys(name for cell in CELLS for name in cell.tasks):
        pipe.load_diffscaler(tasks[name], adapter_name=name)
    pictures: list[Image.Image] = []
    for cells in _batches(CELLS, BATCH):
        with pipe.diffscaler_rows([dict(cell.tasks) or None for cell in cells]):
            pictures += pipe(**_inputs(cells, tasks)).images
    return pictures


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


def _save(pictures: Sequence[Image.Image], title: str, name: str) -> Path:
    path = OUT / name
    compose(pictures, title).save(path)
    return path


@contextmanager
def _step(text: str) -> Iterator[None]:
    print(f"demo: {text} …", flush=True)
    started = time.monotonic()
    yield
    print(f"demo:   done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
