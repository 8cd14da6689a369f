"""Many tasks resident in ComfyUI, and many random mixed batches of them: does memory grow?

    python benchmarks/resident_tasks.py [--tasks 64] [--batches 1000] [--rows 8] [--server]

Random tasks of ranks 4 to 8 on the pocket base, each loaded by its own node; every batch routes a
random task to each of its pictures. Workflows run in ComfyUI's executor in this process, where
tensors can be counted, or with `--server` in its server over HTTP, where the process's memory alone
can be seen. Of some batches every picture is compared with a run of its task alone. ComfyUI keeps
the nodes' results of the last workflow only (`--cache-classic`), and its history is cleared: by
default both grow, with or without tasks. Prints a Markdown table for RESULTS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_both_hosts import POCKET, script
from variants import random_task

from diffscaler_core import save_task
from diffscaler_core.pocket import load_pipeline

Graph = dict[str, Any]
CFG, STEPS = 3.5, 2


class Desk(Protocol):
    """Where workflows run."""

    process: psutil.Process

    def run(self, graph: Graph) -> None:
        """Runs a workflow whose output is the node "save"."""
        ...


class Executor:
    """ComfyUI's executor in this process, as its server's worker has it."""

    def __init__(self, base: Path) -> None:
        from in_comfyui import Host

        Host(base)
        import execution

        quiet = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
        limits = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self._executor = execution.PromptExecutor(
            quiet, cache_type=execution.CacheType.CLASSIC, cache_args=limits
        )
        self.process = psutil.Process()

    def run(self, graph: Graph) -> None:
        """Runs a workflow whose output is the node "save"."""
        self._executor.execute(graph, "prompt", {}, ["save"])
        for kind, message in self._executor.status_messages:
            if kind == "execution_error":
                raise SystemExit(f"{message['node_type']}: {message['exception_message']}")


class OverHttp:
    """A server of ComfyUI's."""

    def __init__(self, server: Any) -> None:
        self._server = server
        children = psutil.Process().children(recursive=True)
        (self.process,) = [c for c in children if any("comfy_launch" in a for a in c.cmdline())]

    def run(self, graph: Graph) -> None:
        """Runs a workflow whose output is the node "save"."""
        self._server.run(graph)
        self._server.request("/history", {"clear": True})


@contextlib.contextmanager
def desk(base: Path, over_http: bool) -> Iterator[Desk]:
    """Starts ComfyUI, in this process or as a server."""
    if not over_http:
        yield Executor(base)
        return
    script("comfy_http")
    with script("comfy_host").running_server(base, flags=("--cpu", "--cache-classic")) as server:
        yield OverHttp(server)


class Workflows:
    """Workflows over the same loaders.

    Args:
        where: What runs them.
        output: ComfyUI's output folder.
        tasks: How many tasks there are.
        rows: Pictures in a batch.
    """

    def __init__(self, where: Desk, output: Path, tasks: int, rows: int) -> None:
        self._where, self._output = where, output
        self._base: Graph = {
            "model": node(
                "UNETLoader", unet_name="diffscaler_pocket.safetensors", weight_dtype="default"
            ),
            "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=rows),
            "words": node("DiffScalerLoadTask", task_name="words.safetensors"),
            "positive": node("DiffScalerTaskConditioning", task=["words", 0], prompt="cat"),
            "negative": node("DiffScalerTaskConditioning", task=["words", 0], prompt=""),
        }
        for i in range(tasks):
            name = f"resident_{i}.safetensors"
            self._base[str(i)] = node("DiffScalerLoadTask", task_name=name)

    def _sampled(self, source: Graph, conds: tuple[Any, Any], seed: int) -> Tensor:
        sample = node(
            "KSampler", model=["tasks", 0], positive=conds[0], negative=conds[1], seed=seed,
            latent_image=["latent", 0], steps=STEPS, cfg=CFG, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        )  # fmt: skip
        save = node("SaveLatent", samples=["sample", 0], filename_prefix="resident")
        self._where.run({**self._base, "tasks": source, "sample": sample, "save": save})
        (file,) = self._output.glob("resident_*.latent")
        latents = load_file(file)["latent_tensor"]
        file.unlink()
        return latents

    def mixed(self, chosen: list[int], seed: int) -> Tensor:
        """Draws a batch whose pictures run these tasks."""
        inputs = {f"tasks.task{row}": [str(i), 0] for row, i in enumerate(chosen)}
        route = node(
            "DiffScalerRouteTasks", model=["model", 0], positive=["positive", 0],
            negative=["negative", 0], strengths="", mode="one task per latent", component="auto",
            **inputs,
        )  # fmt: skip
        return self._sampled(route, (["tasks", 1], ["tasks", 2]), seed)

    def alone(self, chosen: int, seed: int) -> Tensor:
        """Draws a batch of one task."""
        apply = node("DiffScalerApplyTask", model=["model", 0], task=[str(chosen), 0], strength=1.0)
        return self._sampled(apply, (["positive", 0], ["negative", 0]), seed)


def node(kind: str, **inputs: Any) -> Graph:
    """Returns a node in API format."""
    return {"class_type": kind, "inputs": inputs}


def save_tasks(folder: Path, count: int, draw: random.Random) -> int:
    """Writes random tasks of ranks 4 to 8; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model, total = load_pipeline(POCKET).transformer, 0
    for i in range(count):
        task = random_task(model, rank=draw.randint(4, 8), seed=i)
        save_task(task, folder / f"resident_{i}.safetensors")
        total += task.nbytes
    return total


def tensor_bytes() -> int:
    """Returns the bytes of all tensors that Python knows, each storage once."""
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def main() -> None:
    """Runs the batches and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--every", type=int, default=100, help="batches from look to look")
    parser.add_argument("--server", action="store_true", help="over HTTP; tensors are not counted")
    args = parser.parse_args()
    base, draw = Path(tempfile.mkdtemp(prefix="diffscaler-")), random.Random(0)
    total = save_tasks(base / "models" / "diffscaler", args.tasks, draw)
    with desk(base, args.server) as where:
        workflows = Workflows(where, base / "output", args.tasks, args.rows)
        worst, looks, start = 0.0, [], time.perf_counter()
        print("\n| batches | process, MiB | tensors, MiB | s per batch |\n|---|---|---|---|")
        for batch in range(1, args.batches + 1):
            chosen = [draw.randrange(args.tasks) for _ in range(args.rows)]
            together = workflows.mixed(chosen, seed=batch)
            if batch % args.every:
                continue
            seconds = (time.perf_counter() - start) / args.every
            gc.collect()
            resident = where.process.memory_info().rss
            tensors = 0 if args.server else tensor_bytes()
            looks.append((resident, tensors))
            counted = "–" if args.server else f"{tensors / 2**20:.1f}"
            print(f"| {batch} | {resident / 2**20:.0f} | {counted} | {seconds:.3f} |", flush=True)
            own = {task: workflows.alone(task, seed=batch) for task in set(chosen)}
            for row, task in enumerate(chosen):
                error = (together[row] - own[task][row]).abs().max() / own[task].abs().max()
                worst = max(worst, float(error))
            start = time.perf_counter()
    (first, first_tensors), (last, last_tensors) = looks[0], looks[-1]
    print(
        f"\n{args.tasks} tasks, {total / 2**20:.1f} MiB in all, {args.rows} pictures to a batch, "
        f"{STEPS} steps; from batch {args.every} to {args.batches} the process grew by "
        f"{(last - first) / 2**20:.1f} MiB, its tensors by "
        f"{(last_tensors - first_tensors) / 2**20:.1f} MiB; largest difference to a task's own "
        f"run: {worst:.1e} of the largest value"
    )


if __name__ == "__main__":
    main()
