"""What a run will be, before it is: layers, parameters, file, memory, time."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...auto_rank import RankChoice
from ...families import FAMILIES
from ...task import CONTROL, TaskAdapter
from ..conditioning import Prompts, new_classes
from ..config import TrainingConfig
from ..data.batches import Batches
from ..denoiser import Denoiser
from ..learner import TaskRun
from ..loop import fresh_task, train_tasks
from ..picture_encoders import PictureEncoder
from ..progress import Progress

#: Optimiser -> bytes it keeps per parameter beside the float32 parameter and its gradient.
_OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
_TIMED = 2  # steps that are timed, after one that is not
#: Share of all activations that checkpointing keeps beside one block's: the blocks' inputs.
_INPUTS = 1 / 16


@dataclass(frozen=True)
class Plan:
    """The figures of one task's run.

    Attributes:
        name: The task's.
        method: A name in METHODS, with its rank where it has one.
        base: The base's family and class.
        base_parameters: Numbers in the base's denoiser.
        base_bytes: Bytes they take.
        layers: Layers that get an affiner.
        parts: Part -> how many numbers are trained ("prompts" among them).
        control: What its control pictures show, and how they are embedded; "": none.
        ranks: Which ranks were chosen, in short; "": one rank for all layers.
        file_bytes: Of the task file, roughly.
        pictures: How many there are.
        shape: Of one clean sample, (C, h, w).
        steps, batch: As in the config.
        optimizer_bytes: Parameters, gradients, the optimiser's state, the running mean.
        activation_bytes: What one step keeps for its backward pass: an estimate.
        step_seconds: Measured; None: it was not.
        peak_bytes: Measured on an accelerator; None: it was not.
        device: Where it runs.
    """

    name: str
    method: str
    base: str
    base_parameters: int
    base_bytes: int
    layers: int
    parts: Mapping[str, int]
    file_bytes: int
    pictures: int
    shape: tuple[int, ...]
    steps: int
    batch: int
    optimizer_bytes: int
    activation_bytes: int = 0
    step_seconds: float | None = None
    peak_bytes: int | None = None
    device: str = "cpu"
    control: str = ""
    ranks: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """The same, as a share of the base's."""
        return self.trained / max(1, self.base_parameters)

    @property
    def epochs(self) -> float:
        """How often each picture is shown."""
        return self.steps * self.batch / max(1, self.pictures)

    @property
    def memory(self) -> int:
        """Bytes on the device, estimated."""
        return self.base_bytes + self.optimizer_bytes + self.activation_bytes


def plan_task(
    denoiser: Denoiser,
    config: TrainingConfig,
    data: Batches,
    prompts: Prompts,
    *,
    ranks: RankChoice | None = None,
    save_bytes: int = 4,
    processes: int = 1,
) -> Plan:
    """Returns the plan of a run; one prediction of one picture is computed for it.

    Args:
        denoiser: The base.
        config: The run's settings.
        data: Its pictures.
        prompts: What the base is told about them.
        ranks: For rank "auto", from `choose_ranks`.
        save_bytes: Bytes per number in the file: 4, or 2.
        processes: Devices that share a batch.
    """
    task = fresh_task(denoiser, config, new_classes(denoiser, prompts), ranks)
    learned = sum(p.numel() for p in prompts.parameters() if p.requires_grad)
    parts = {**_parts(task), **({"prompts": learned} if learned else {})}
    trained = sum(parts.values())
    weights = list(denoiser.model.parameters())
    facts = task.info["base"]
    known = FAMILIES.get(str(facts["family"]))
    per_parameter = 8 + _OPTIMIZER_BYTES[config.optimizer] + (4 if config.ema else 0)
    own = -(-config.batch // (processes * config.accumulate))
    return Plan(
        name=config.name,
        method=f"{config.method}, rank {config.rank}" if "subspace" in parts else config.method,
        base=f"{known.title} ({facts['class']})" if known else str(facts["class"]),
        base_parameters=sum(p.numel() for p in weights),
        base_bytes=sum(p.numel() * p.element_size() for p in weights),
        layers=len(task.layers),
        parts=parts,
        file_bytes=trained * save_bytes + 200 * len(task.tensors),
        pictures=len(data),
        shape=data.shape,
        steps=config.steps,
        batch=config.batch,
        optimizer_bytes=trained * per_parameter,
        activation_bytes=activation_bytes(denoiser, config, task, data, prompts) * own,
        device=str(denoiser.device),
        control=_control(task),
        ranks="" if ranks is None else ranks.summary(),
    )


def activation_bytes(
    denoiser: Denoiser,
    config: TrainingConfig,
    task: TaskAdapter,
    data: Batches,
    prompts: Prompts,
) -> int:
    """Returns how many bytes autograd keeps of one picture's prediction, roughly.

    They are counted as they are saved (`torch.autograd.graph.saved_tensors_hooks`) and let go at
    once, so counting takes no more memory than sampling does. With checkpointing it is one block's
    share, and a sixteenth for the inputs of all blocks: a guess, not a measurement.
    """
    device = denoiser.device
    first = next(iter(data.whole(1)))
    x0, index = first.x0.to(device), first.index.to(device)
    own = {t.untyped_storage().data_ptr() for t in denoiser.model.state_dict().values()}
    seen: dict[StorageWeakRef, int] = {}  # a weak reference keeps an address from being reused

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[StorageWeakRef(storage)] = storage.nbytes()

    with (
        denoiser.held(resolution=config.at_resolution),
        denoiser.attached({task.name: task}) as trainable,
    ):
        trainable.requires_grad_(True)
        noise = torch.zeros_like(x0)
        t = torch.full((1,), 0.5, device=device)
        timestep, x_t = denoiser.objective.noisy(x0, noise, t)
        told = prompts.to(device)(index)
        if first.control is not None:
            told["control"] = first.control.to(device)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept),
            denoiser.autocast(config.precision),
        ):
            denoiser.objective.loss(denoiser(x_t, timestep, told), x0, noise, t)
    total = sum(seen.values())
    return round(total * (1 / _blocks(task) + _INPUTS)) if config.checkpointing else total


def time_steps(
    denoiser: Denoiser,
    config: TrainingConfig,
    data: Batches,
    prompts: Prompts,
    accelerator: Any = None,
    ranks: RankChoice | None = None,
    encoder: PictureEncoder | None = None,
) -> tuple[float, int | None]:
    """Returns (seconds of one step, peak bytes or None): three real steps, on a task let go again.

    The first step is not timed. Memory is measured on CUDA only: a process on a CPU holds much more
    than the run.
    """
    cuda = denoiser.device.type == "cuda"
    ends: list[float] = []

    def on_step(now: Progress) -> bool:
        if cuda:
            torch.cuda.synchronize(denoiser.device)
        ends.append(time.perf_counter())
        return now.step > _TIMED

    if cuda:
        torch.cuda.reset_peak_memory_stats(denoiser.device)
    short = replace(
        config,
        steps=max(config.steps, _TIMED + 2),
        validate_every=0,
        sample_every=0,
        validation_share=0.0,
        debias=0.0,
    )
    own = copy.deepcopy(prompts)  # learned ones would move
    run = TaskRun(config.name, data, own, ranks=ranks)
    train_tasks(denoiser, [run], short, on_step=on_step, accelerator=accelerator, encoder=encoder)
    peak = torch.cuda.max_memory_allocated(denoiser.device) if cuda else None
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1), peak


def _count(pictures: int) -> str:
    return f"{pictures:,}" if pictures else "a stream of unknown length"


def _times(plan: Plan) -> str:
    return f": each picture {plan.epochs:,.0f} times" if plan.pictures else ""


def format_plan(plans: Sequence[Plan]) -> str:
    """Returns plans as a table, one fact a line."""
    return "\n\n".join(_table(_rows(plan)) for plan in plans)


def _rows(plan: Plan) -> list[tuple[str, str]]:
    trained = ", ".join(f"{part} {count:,}" for part, count in plan.parts.items() if count)
    height_width = "x".join(map(str, plan.shape[1:]))
    held = (
        f"base {size_of(plan.base_bytes)}, task and optimiser {size_of(plan.optimizer_bytes)}, "
        f"activations {size_of(plan.activation_bytes)}"
    )
    rows = [
        ("task", f"{plan.name!r}: {plan.method}"),
        ("base", f"{plan.base}, {plan.base_parameters:,} parameters"),
        ("layers", f"{plan.layers:,}"),
        *([("ranks", plan.ranks)] if plan.ranks else ()),
        *([("control", plan.control)] if plan.control else ()),
        ("trained", f"{plan.trained:,} parameters, {100 * plan.share:.2f} % of the base"),
        ("", trained),
        ("file", f"about {size_of(plan.file_bytes)}"),
        ("pictures", f"{_count(plan.pictures)}, as {plan.shape[0]} x {height_width}"),
        ("steps", f"{plan.steps:,} of {plan.batch}{_times(plan)}"),
        ("memory", f"about {size_of(plan.memory)} on {plan.device}, estimated"),
        ("", held),
    ]
    if plan.peak_bytes is not None:
        rows.append(("", f"peak of {_TIMED + 1} real steps: {size_of(plan.peak_bytes)}, measured"))
    if plan.step_seconds is None:
        return [*rows, ("time", "not measured")]
    total = duration(plan.step_seconds * plan.steps)
    how = f"{plan.step_seconds:.3g} s a step, measured over {_TIMED} steps on {plan.device}"
    return [*rows, ("time", f"about {total} ({how})"), ("", "validation and samples come on top")]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def size_of(count: int) -> str:
    """Returns a number of bytes as people say it."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Returns a time as people say it: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _parts(task: TaskAdapter) -> dict[str, int]:
    counts = {"scale": 0, "shift": 0, "subspace": 0}
    for layer in task.layers.values():
        for part, tensor in layer.items():
            counts[part if part in counts else "subspace"] += tensor.numel()
    for name, tensor in task.extras.items():
        kind = "control" if name.startswith(CONTROL) else "classes"
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    return {part: count for part, count in counts.items() if count}


def _control(task: TaskAdapter) -> str:
    if not task.is_control:
        return ""
    (embedding,) = {n.rpartition(".")[0] for n in task.extras if n.startswith(CONTROL)}
    facts, layer = task.info["control"], embedding.split(".", 2)[2]
    return f"{facts['kind']}, through {layer}, rank {facts['rank']}"


def _blocks(task: TaskAdapter) -> int:
    """Returns how many repeated blocks the task's layers lie in, at least 1."""
    found = (re.match(r"(.*?\.\d+)\.", name) for name in task.layers)
    return max(1, len({match[1] for match in found if match}))
