"""What a workflow may give the nodes: texts, numbers, masks, names of files and folders.

ComfyUI checks what is typed into a node, not what comes along an edge.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

from .good import layers, task_files
from .harness import Target
from .mutations import number, spoiled_text, word
from .slices import check_slice, check_with_hypothesis
from .test_texts import BLOCKS, SCHEDULES, STRENGTHS

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket" / "diffscaler"
FILES = ("ink.safetensors", "edges.safetensors", "words.safetensors")
SHAPES = ((8, 8), (1, 8, 8), (2, 8, 8), (1, 1, 8, 8), (1, 2, 8, 8), (8,), (), (0, 8, 8), (1, 0, 0),
          (1, 1, 1), (3, 5, 7), (1, 8, 8, 3), (2, 2, 2, 2, 2))  # fmt: skip
#: They take models and pictures and nothing else that a check could refuse at once, or they run the
#: model.
LEFT_OUT = {"Control", "ExtractTask", "PickTask", "TrainingSettings", "Translate"}


class Desk:
    """The nodes, and what they are given beside the hostile part."""

    def __init__(self, pack: ModuleType) -> None:
        import folder_paths
        import nodes

        self.nodes = {node.__name__.removeprefix("DiffScaler"): node for node in pack.nodes.NODES}
        self.core, self.pack = pack.diffscaler_core, pack.nodes
        self.output = Path(folder_paths.get_output_directory())
        if not folder_paths.folder_names_and_paths.get("diffscaler"):
            pack.nodes.folders.register_folder()
        name = "diffscaler_pocket.safetensors"
        self.model = nodes.UNETLoader().load_unet(name, "default")[0]
        self.tasks = [self.core.load_task(POCKET / name) for name in FILES]
        info = {"name": "small", "method": "diffscaler", "activation": "relu"}
        self.small = self.core.TaskAdapter(layers(), info)
        blue = {"kind": "colour", "weight": 1.0, "colour": "#2060e0"}
        self.losses = self.nodes["GuidanceLoss"].execute(**blue).result[0]
        self.prompt = [[torch.zeros(1, 4, 8), {"pooled_output": torch.zeros(1, 8)}]]

    def some_tasks(self, rng: Random) -> dict[str, Any]:
        """Returns what a growing list of slots holds."""
        found = [rng.choice((*self.tasks, self.small, None)) for _ in range(rng.randrange(4))]
        return {f"task{i}": task for i, task in enumerate(found)}


def _text(rng: Random, good: tuple[str, ...]) -> str:
    return spoiled_text(rng, rng.choice(good)) if rng.random() < 0.7 else rng.choice(good)


def _number(rng: Random) -> float:
    return float(rng.choice((1.0, 0.5, 0.0))) if rng.random() < 0.5 else _as_float(number(rng))


def _as_float(value: float) -> float:
    return float(value) if abs(value) < 1e308 or value != value else float("inf")


def _tensor(rng: Random, *more: tuple[int, ...]) -> torch.Tensor:
    values = torch.full(rng.choice((*SHAPES, *more)), 0.5)
    if values.numel() and rng.random() < 0.3:
        values.view(-1)[0] = _number(rng)
    return values.to(rng.choice((torch.float32, torch.float32, torch.float16, torch.int32)))


def _strengths(rng: Random) -> dict[str, Any]:
    parts = {name: _number(rng) for name in ("scale", "shift", "subspace")}
    return {"strength": _number(rng), **parts}


def _component(rng: Random) -> str:
    known = ("auto", "auto", "transformer", "transformer_2", "unet")
    return rng.choice(known) if rng.random() < 0.9 else word(rng)


def inputs(desk: Desk, rng: Random) -> tuple[str, dict[str, Any]]:
    """Returns a node's name and what it is given."""
    name = rng.choice((*sorted(set(desk.nodes) - LEFT_OUT), "SaveTask", "TrainTask"))
    listed = {"tasks": desk.some_tasks(rng), "strengths": _text(rng, STRENGTHS)}
    if name == "ApplyTask":
        given = {"model": desk.model, "task": rng.choice((*desk.tasks, desk.small))}
        given |= _strengths(rng)
        given |= {"start_percent": _number(rng), "end_percent": _number(rng)}
        given["region"] = _tensor(rng) if rng.random() < 0.7 else None
        return name, {**given, "component": _component(rng)}
    if name == "StackTasks":
        return name, {"model": desk.model, **listed, "component": _component(rng)}
    if name == "RouteTasks":
        mode = rng.choice(("all tasks together", "one task per latent", word(rng)))
        given = {"model": desk.model, "positive": desk.prompt, **listed, "mode": mode}
        return name, {**given, "negative": rng.choice((None, desk.prompt))}
    if name == "CompareTasks":
        latent = {"samples": _tensor(rng, (1, 16, 8, 8), (1, 16, 8, 8))}
        given = {"model": desk.model, "positive": desk.prompt, "negative": desk.prompt}
        return name, {**given, "latent": latent, **listed, "include_base": rng.random() < 0.5}
    if name == "ScaleTask":
        blocks = _text(rng, BLOCKS) if rng.random() < 0.6 else ""
        return name, {"task": rng.choice(desk.tasks), **_strengths(rng), "blocks": blocks}
    if name == "CombineTasks":
        return name, {**listed, "name": word(rng)}
    if name == "ScheduleTask":
        given = {"points": _text(rng, SCHEDULES) if rng.random() < 0.7 else ""}
        given["interpolation"] = rng.choice(("linear", "step", "smooth", word(rng)))
        times = {key: _number(rng) for key in ("start", "end", "fade")}
        return name, {"task": desk.small, **given, **times}
    if name == "TaskConditioning":
        return name, {"task": rng.choice((*desk.tasks, desk.small)), "prompt": word(rng)}
    if name == "TaskGrid":
        names = "\n".join(word(rng)[:200] for _ in range(rng.randrange(3)))
        columns = rng.choice((0, 1, 2, -1, 64, 10**9))
        pictures = _tensor(rng, (1, 8, 8, 3), (2, 8, 8, 3), (2, 8, 8, 1), (2, 8, 8, 4))
        return name, {"images": pictures, "names": names, "columns": columns}
    if name == "SaveTask":
        prefix = rng.choice(("diffscaler/x", word(rng)[:300], f"a/{word(rng)[:300]}", "%date%/%x%"))
        given = {"task": desk.small, "filename_prefix": prefix, "title": word(rng)[:3000]}
        given["dtype"] = rng.choice(("keep", "fp16", word(rng)))
        given["thumbnail"] = _tensor(rng, (1, 8, 8, 3)) if rng.random() < 0.3 else None
        return name, {**given, "author": word(rng)[:50], "description": word(rng)[:50]}
    if name == "LoadTask":
        return name, {"task_name": rng.choice((*FILES, word(rng), f"../{word(rng)}"))}
    if name == "ImportLoRA":
        chosen = rng.choice(("ink_lora.safetensors", word(rng), f"../{word(rng)}"))
        return name, {"lora_name": chosen, "text_encoder": word(rng)}
    if name == "RouteExperts":
        chosen = rng.choice(("fruits_smileys.safetensors", word(rng), f"../{word(rng)}"))
        given = {"model": desk.model, "tasks": desk.some_tasks(rng), "router_name": chosen}
        given |= {"mode": rng.choice(("top1", "full", word(rng))), "strength": _number(rng)}
        return name, {**given, "component": _component(rng)}
    if name == "GuidanceLoss":
        given = {"kind": rng.choice(("colour", "edges", word(rng))), "weight": _number(rng)}
        given["colour"] = rng.choice(("#2060e0", word(rng)))
        given["image"] = _tensor(rng, (1, 8, 8, 3)) if rng.random() < 0.7 else None
        return name, {**given, "mask": _tensor(rng) if rng.random() < 0.5 else None}
    if name == "GuideModel":
        given = {"model": desk.model, "losses": desk.losses, "strength": _number(rng)}
        given |= {"start_percent": _number(rng), "end_percent": _number(rng)}
        return name, {**given, "gradient": rng.choice(("at the prediction", word(rng)))}
    if name == "TaskInfo":
        return name, {"task": rng.choice((*desk.tasks, desk.small)), "raw": None}
    if name == "TrainTask":
        return name, _training(rng)
    raise AssertionError(f"no inputs for {name}")


def _training(rng: Random) -> dict[str, Any]:
    given: dict[str, Any] = {"name": word(rng), "folder": word(rng), "method": "diffscaler"}
    whole = (1, 8, 0, -1, 2**31, 2**63)
    given |= {key: rng.choice(whole) for key in ("rank", "steps", "batch_size", "seed")}
    given["learning_rate"] = _number(rng)
    if rng.random() < 0.3:
        given["method"] = word(rng)
    settings = {"rank_budget": rng.choice(("", "8", "0.4%", "20k", word(rng)))}
    for key in ("lr_scale_shift", "warmup", "beta1", "ema", "drop", "timestep_std", "guidance"):
        settings[key] = _number(rng) if rng.random() < 0.3 else 0.5
    given["settings"] = settings
    given["control"] = rng.choice(("", "", word(rng)))
    given["control_from"] = rng.choice(("(none)", "(none)", "edges", word(rng)))
    return given


def run_with(desk: Desk, case: tuple[str, dict[str, Any]]) -> None:
    """Runs a node as ComfyUI would; the training node as far as the first picture."""
    name, given = case
    if name == "TrainTask":
        desk.pack.training_job.config_of(given, desk.model)
        desk.pack.training_data.folder_of(given["folder"])
        return
    if name == "TaskInfo":
        given = {"task": given["task"]}
    node = desk.nodes[name]
    if name in ("LoadTask", "ImportLoRA"):
        node.fingerprint_inputs(**given)
    result = node.execute(**given).result
    if name == "SaveTask":
        path = desk.output / result[0]
        inside = os.path.realpath(path).startswith(os.path.realpath(desk.output) + os.sep)
        assert inside, f"{path} lies outside the output folder"
        assert path.is_file(), f"{path} is not there"
        path.unlink()


def target(pack: ModuleType, base: Path) -> Target:
    """Returns the target for a pack that ComfyUI has loaded."""
    desk = Desk(pack)

    def run(case: tuple[str, dict[str, Any]], folder: Path) -> None:
        try:
            run_with(desk, case)
        except FileNotFoundError:  # ComfyUI's own words for a file that is not in the list
            if case[0] not in ("LoadTask", "ImportLoRA", "RouteExperts"):
                raise

    return Target("nodes", lambda rng: inputs(desk, rng), run, examples=15)


@pytest.fixture(scope="module")
def nodes_target(pack: ModuleType, comfy_base: Path) -> Target:
    return target(pack, comfy_base)


def test_the_good_files_are_good():
    assert task_files()


def test_a_slice_of_the_cases(nodes_target, tmp_path):
    check_slice(nodes_target, tmp_path, 300)


def test_what_hypothesis_finds(nodes_target, tmp_path):
    check_with_hypothesis(nodes_target, tmp_path)
