"""TaskAdapter: everything one task knows. Plain tensors and facts; no model, no file."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .affiner import ACTIVATIONS, PARTS, init_affiner
from .classes import CLASSES, ROWS, class_tables
from .errors import DiffScalerError, UnknownNameError, first_names, unknown
from .families import family_of
from .methods import METHODS, block_of, blocks_without_gamma
from .schedule import Schedule
from .targets import (
    Target,
    all_targets,
    as_target,
    component_of,
    find_targets,
    in_preset,
    pattern_value,
    resolve,
)
from .windows import TaskWindows, UnitWindows, WindowPlan, planned, read_windows

Layers = Mapping[str, Mapping[str, Tensor]]

#: Before the names of a control affiner's tensors.
CONTROL = "control."
#: How a control affiner starts: "affiner" sees the frozen embedding through a gain and a subspace;
#: "copy" is a trainable copy of the embedding that starts from zero.
CONTROL_EMBEDDINGS = ("affiner", "copy")


@dataclass(frozen=True, eq=False)
class TaskAdapter:
    """All affiners of one task, and the facts about it. Immutable; compare by identity.

    Attributes:
        layers: "<component>.<module>" -> {"scale", "shift", "down", "up"}, absent parts absent.
            Shapes: scale and shift (C_out,), down (R, C_in, *kernel), up (C_out, R).
        info: The facts that travel in the file's `diffscaler.config` (name, method, activation,
            gain, base, training, …).
        conditioning: Stored prompts, so that the task runs without a text encoder: "context"
            (N, L, D) and, where the family has one, "pooled" (N, P); `info["prompts"]` names the N.
        modelspec: Stability ModelSpec entries without their prefix (title, author, thumbnail, …).
        extras: The control affiner of a control task, "control.<component>.<embedding>.<part>"; the
            embedding is the base's own (see `control.py`). New classes of a class-conditional base,
            "classes.<component>.<table>.rows" (N, D); `info["classes"]` numbers them (see
            `classes.py`).
        schedule: How the task's strength goes over sampling time, None: it stays. It belongs to the
            running task and is not written to its file; what samples with the task applies it.
    """

    layers: Layers
    info: Mapping[str, Any] = field(default_factory=dict)
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    modelspec: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        """Freezes the mappings, so that a task shared by many models cannot change under them."""
        layers = {name: MappingProxyType(dict(t)) for name, t in self.layers.items()}
        object.__setattr__(self, "layers", MappingProxyType(layers))
        for part in ("info", "conditioning", "modelspec", "extras"):
            object.__setattr__(self, part, MappingProxyType(dict(getattr(self, part))))

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets a task be copied and pickled, which its read-only mappings alone cannot be."""
        layers = {name: dict(tensors) for name, tensors in self.layers.items()}
        facts = (self.info, self.conditioning, self.modelspec, self.extras)
        return TaskAdapter, (layers, *map(dict, facts), self.schedule)

    @property
    def name(self) -> str:
        """The task's own name."""
        return str(self.info.get("name", "task"))

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor the task holds."""
        layered = [t for layer in self.layers.values() for t in layer.values()]
        return layered + list(self.conditioning.values()) + list(self.extras.values())

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained: affiners, control affiner, new classes; not the prompts."""
        layered = [t for layer in self.layers.values() for t in layer.values()]
        return sum(t.numel() for t in (*layered, *self.extras.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, stored prompts included."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def components(self) -> tuple[str, ...]:
        """The pipeline components the task adapts, such as ("transformer",)."""
        own = (name.removeprefix(CONTROL).removeprefix(CLASSES) for name in self.extras)
        names = (*self.layers, *own)
        return tuple(dict.fromkeys(name.partition(".")[0] for name in names))

    @property
    def is_control(self) -> bool:
        """Says whether the task is given a control picture."""
        return any(name.startswith(CONTROL) for name in self.extras)

    @property
    def classes(self) -> dict[str, int]:
        """The classes it was trained on: name -> the number that the base is told."""
        return dict(self.info.get("classes") or {})

    @property
    def new_classes(self) -> tuple[str, ...]:
        """Names of the classes that the task brings, in the order of their numbers."""
        size = (self.info.get("class_table") or {}).get("size", math.inf)
        found = sorted((number, name) for name, number in self.classes.items() if number >= size)
        return tuple(name for _, name in found)

    def class_rows(self, component: str) -> dict[str, Tensor]:
        """Returns the new classes' rows in one component, table -> (N, D)."""
        prefix = f"{CLASSES}{component}."
        return {
            name[len(prefix) : -len(f".{ROWS}")]: tensor
            for name, tensor in self.extras.items()
            if name.startswith(prefix)
        }

    @cached_property
    def windows(self) -> TaskWindows | None:
        """When its hidden units act (see `windows.py`); None: at every noise level."""
        facts = self.info.get("windows")
        return None if facts is None else read_windows(facts)

    @property
    def is_timed(self) -> bool:
        """Says whether what it does depends on the noise level, so that it must be told."""
        return self.info.get("windows") is not None

    def component_windows(self, component: str) -> dict[str, UnitWindows]:
        """Returns when the units of one component's layers act, under their module names."""
        windows = self.windows
        if windows is None:
            return {}
        return {
            name: windows.of(f"{component}.{name}")
            for name, own in self.component_layers(component).items()
            if "down" in own
        }

    @property
    def prompts(self) -> tuple[str, ...]:
        """Names of the stored prompts, in order."""
        return tuple(self.info.get("prompts", ()))

    def component_layers(self, component: str) -> Layers:
        """Returns the layers of one component, under their module names."""
        prefix = component + "."
        return {n[len(prefix) :]: t for n, t in self.layers.items() if n.startswith(prefix)}

    def control_layers(self, component: str) -> Layers:
        """Returns the control affiner of one component, under its embedding's module name."""
        prefix = f"{CONTROL}{component}."
        layers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.extras.items():
            if name.startswith(prefix):
                layer, _, part = name[len(prefix) :].rpartition(".")
                layers.setdefault(layer, {})[part] = tensor
        return layers

    @property
    def control_facts(self) -> dict[str, Any]:
        """How the control affiner computes: {"activation", "gain"}."""
        facts = self.info.get("control") or {}
        return {name: facts[name] for name in ("activation", "gain") if name in facts}

    def prompt(self, name: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns one stored prompt as (context (1, L, D), pooled (1, P) or None).

        Args:
            name: One of `prompts`; None: the first.

        Raises:
            DiffScalerError: The task stores no prompts.
            UnknownNameError: It stores none of that name.
        """
        context = self.conditioning.get("context")
        if context is None:
            raise DiffScalerError(f"task {self.name!r} stores no prompt; use a text encoder")
        if name is not None and name not in self.prompts:
            raise unknown(f"stored prompt of task {self.name!r}:", name, map(repr, self.prompts))
        i = 0 if name is None else self.prompts.index(name)
        pooled = self.conditioning.get("pooled")
        return context[i : i + 1], None if pooled is None else pooled[i : i + 1]

    def replace(self, **changes: Any) -> TaskAdapter:
        """Returns a copy with other attributes."""
        return replace(self, **changes)

    def with_info(self, **facts: Any) -> TaskAdapter:
        """Returns a copy with some facts changed or added."""
        return replace(self, info={**self.info, **facts})


def new_task(
    model: nn.Module,
    method: str = "diffscaler",
    rank: int = 8,
    targets: str | Sequence[str] = "blocks",
    name: str = "task",
    *,
    exclude: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    gain: float = 1.0,
    activation: str | None = None,
    gamma_blocks: str = "first_half",
    component: str | None = None,
    control: str | None = None,
    control_rank: int | None = None,
    control_activation: str = "identity",
    control_embedding: str = "affiner",
    classes: Sequence[str] = (),
    class_start: int | None = None,
    windows: WindowPlan | None = None,
    seed: int = 0,
) -> TaskAdapter:
    """Returns a task that changes nothing yet: attach it, train it, save it.

    Args:
        model: The frozen denoiser (a diffusers model, or any module with such layers).
        method: A name in METHODS.
        rank: R of every subspace; capped per layer by the layer's smaller dimension.
        targets: A preset, a regular expression, or a list of names; see `find_targets`.
        name: The task's name.
        exclude: Targets to leave out; a regular expression or a list of names.
        rank_pattern: Other ranks for some targets: {pattern: rank}; rank 0 leaves the subspace out.
        gain: s, the subspace's stored constant.
        activation: Of the subspaces, a name in ACTIVATIONS; None: the method's own. With
            "identity" the task can become a LoRA file.
        gamma_blocks: For "difffit": which blocks have γ, "first_half" (as the paper) or "all".
        component: "transformer", "unet", …; default by the model's class.
        control: What its control pictures show ("edges", "depth", …, in your own words); None: the
            task takes no control.
        control_rank: R of the control affiner; None: as many as a patch has numbers, where it can
            express any linear map of the control's patch.
        control_activation: Of its subspace, a name in ACTIVATIONS.
        control_embedding: A name in CONTROL_EMBEDDINGS.
        classes: Names of classes that the task brings to a class-conditional base.
        class_start: The class that these start from; None: the base's "no class".
        windows: Which hidden units act at which noise level: `windows.expert_windows(N)` or
            `windows.sliding_windows()`; None: all at every one.
        seed: Seed of the random D.

    Raises:
        UnknownNameError: No such method or activation, or a patch embedding nobody knows.
        DiffScalerError: No layer matches, a rank is not positive, a pattern of `rank_pattern`
            matches nothing, classes for a base that is told none, or windows for a method without
            subspaces or for too few hidden units.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if rank < 1:
        raise DiffScalerError(f"rank must be at least 1, got {rank}")
    chosen = METHODS[method]
    activation = activation or chosen.activation
    for named in (activation, control_activation):
        if named not in ACTIVATIONS:
            raise unknown("activation", named, ACTIVATIONS)
    component = component or component_of(model)
    found = find_targets(model, targets, exclude=exclude) if chosen.parts else ()
    for pattern in rank_pattern or {}:
        if not any(pattern_value(target.name, {pattern: True}, False) for target in found):
            raise DiffScalerError(
                f"rank_pattern {pattern!r} matches none of the {len(found)} targets, for example "
                f"{', '.join(target.name for target in found[:2]) or 'none'}"
            )
    every = (target.name for target in all_targets(model) if chosen.only)
    every = (name for name in every if in_preset(model, name, "blocks"))
    plain = blocks_without_gamma(every, gamma_blocks)
    layers: dict[str, dict[str, Tensor]] = {}
    ranks: dict[str, int] = {}
    for target in found:
        own_rank = _rank_of(target, rank, rank_pattern)
        left_out = chosen.only if block_of(target.name) in plain else ()
        parts = [
            part
            for part in chosen.parts_for(target.name, target.has_bias)
            if part not in left_out and (part != "subspace" or own_rank)
        ]
        if parts:
            with torch.inference_mode(False):  # or it could never be trained
                layers[f"{component}.{target.name}"] = init_affiner(
                    parts,
                    target.out_features,
                    target.in_features,
                    target.kernel,
                    own_rank,
                    layer_generator(seed, target.name),
                )
            ranks[target.name] = own_rank if "subspace" in parts else 0
    info = {
        "name": name,
        "method": method,
        "parts": list(dict.fromkeys([*chosen.only, *chosen.parts])),
        "activation": activation,
        "gain": gain * (1.0 if windows is None else windows.gain),
        "scale_includes_bias": chosen.scale_includes_bias,
        "ranks": {"default": rank, **{n: r for n, r in ranks.items() if r not in (rank, 0)}},
        "base": base_facts(model, [t for t in found if f"{component}.{t.name}" in layers]),
        "naming": "diffusers",
        **({"gamma_blocks": gamma_blocks} if chosen.only else {}),
    }
    if windows is not None:
        units = {name: len(own["down"]) for name, own in layers.items() if "down" in own}
        if not units:
            raise DiffScalerError(
                f"method {method!r} has no hidden units to share out among noise levels: take one "
                f"with a subspace, such as diffscaler or lora"
            )
        info["windows"] = planned(windows, units).facts
    extras: dict[str, Tensor] = {}
    if control is not None:
        target = embedding_of(model)
        tensors = _control_affiner(
            target,
            control_embedding,
            control_rank,
            layer_generator(seed, f"{CONTROL}{target.name}"),
        )
        extras = {f"{CONTROL}{component}.{target.name}.{p}": t for p, t in tensors.items()}
        info["control"] = {
            "kind": control,
            "embedding": control_embedding,
            "activation": "identity" if control_embedding == "copy" else control_activation,
            "gain": 1.0,
            "rank": len(tensors["down"]),
        }
    task = TaskAdapter(layers, info, extras=extras)
    return with_classes(task, model, classes, component, class_start) if classes else task


def with_classes(
    task: TaskAdapter,
    model: nn.Module,
    names: Sequence[str],
    component: str | None = None,
    start: int | None = None,
) -> TaskAdapter:
    """Returns a task with more new classes, which are exactly the class they start from.

    Args:
        task: The task; stays as it is.
        model: Its base.
        names: What the classes are called. They get the numbers after the base's, and after those
            of the new classes that the task has.
        component: As in `new_task`.
        start: The class that they start from; None: the task's own, else the base's "no class".

    Raises:
        DiffScalerError: The base is told no classes, has no class to start from, or a name stands
            twice.
    """
    component, tables = component or component_of(model), class_tables(model)
    known = dict(task.info.get("class_table") or {})
    if not tables:
        raise DiffScalerError(
            f"{type(model).__name__} is told no class numbers, so it cannot have new classes: "
            f"leave out classes={list(names)!r}"
        )
    start = known.get("start", tables[0].null) if start is None else start
    size = tables[0].size
    if start is None or not 0 <= start < size:
        raise DiffScalerError(
            f"new classes start from one of the base's classes 0 to {size - 1}, got {start}: say "
            f"which with class_start (this {type(model).__name__} does not say which means 'none')"
        )
    old = task.new_classes
    doubled = {name for name in names if name in task.classes or list(names).count(name) > 1}
    if doubled or (old and known != {"size": size, "start": start}):
        raise DiffScalerError(
            f"task {task.name!r} has classes {first_names(doubled)} already"
            if doubled
            else f"task {task.name!r} has new classes of another base: {known}, not {size}, {start}"
        )
    extras = dict(task.extras)
    with torch.inference_mode(False):
        for table in tables:
            name = f"{CLASSES}{component}.{table.name}.{ROWS}"
            before = [extras[name].float()] if name in extras else []
            fresh = torch.zeros(len(names), table.width, dtype=torch.float32, device="cpu")
            extras[name] = torch.cat([*before, fresh])
    numbers = {name: size + len(old) + i for i, name in enumerate(names)}
    facts = {"classes": task.classes | numbers, "class_table": {"size": size, "start": start}}
    return replace(task, extras=extras).with_info(**facts)


def embedding_of(model: nn.Module) -> Target:
    """Returns the patch embedding of a denoiser, by the families' table.

    Raises:
        UnknownNameError: No family has a denoiser of that class.
        DiffScalerError: The model has no such layer.
    """
    family = family_of(type(model).__name__)
    module = resolve(model, family.embed)
    target = None if module is None else as_target(family.embed, module)
    if target is None:
        raise DiffScalerError(
            f"this {type(model).__name__} has no layer {family.embed!r} to embed a control with"
        )
    return target


def _control_affiner(
    target: Target, embedding: str, rank: int | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Returns the tensors of a fresh control affiner, which adds nothing."""
    if embedding not in CONTROL_EMBEDDINGS:
        raise unknown("control embedding", embedding, CONTROL_EMBEDDINGS)
    size = math.prod((target.in_features, *target.kernel))
    if rank is not None and rank < 1:
        raise DiffScalerError(f"control_rank must be at least 1, got {rank}")
    with torch.inference_mode(False):
        if embedding == "affiner":
            rank = min(size if rank is None else rank, size, 2 * target.out_features)
            return init_affiner(
                ("scale", "shift", "subspace"),
                target.out_features,
                target.in_features,
                target.kernel,
                rank,
                generator,
            )
        # D shows U each number of a patch by itself, so U is a whole embedding matrix
        every = torch.eye(size).view(size, target.in_features, *target.kernel)
        return {"down": every, "up": torch.zeros(target.out_features, size)}


def layer_generator(seed: int, layer: str) -> torch.Generator:
    """Returns a layer's own random source: hosts list a model's layers in different orders."""
    digest = hashlib.sha256(f"{seed}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def parts_of(layers: Layers) -> list[str]:
    """Returns the names among `affiner.PARTS` of what any of the layers has."""
    there = {tensor for own in layers.values() for tensor in own}
    return [part for part in PARTS if ("down" if part == "subspace" else part) in there]


def rank_facts(layers: Layers) -> dict[str, int]:
    """Returns the commonest rank as "default", and the layers that have another."""
    own = {n.partition(".")[2]: len(t["down"]) for n, t in layers.items() if "down" in t}
    default = Counter(own.values()).most_common(1)[0][0] if own else 0
    return {"default": default, **{n: rank for n, rank in own.items() if rank != default}}


def flat(layers: Layers) -> dict[str, Tensor]:
    """Returns the tensors of layers as files name them, "<layer>.<part>"."""
    return {f"{layer}.{part}": t for layer, own in layers.items() for part, t in own.items()}


def base_facts(model: nn.Module, targets: Sequence[Target]) -> dict[str, Any]:
    """Returns what a task remembers of its base: family, class, fingerprint of target shapes."""
    try:
        family = family_of(type(model).__name__).name
    except UnknownNameError:
        family = "unknown"
    shapes = {target.name: target.shape for target in targets}
    return {
        "family": family,
        "class": type(model).__name__,
        "fingerprint": fingerprint(shapes),
        "targets": len(shapes),
    }


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """Returns 16 hex digits that change with any name or shape of the targets."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _rank_of(target: Target, rank: int, pattern: Mapping[str, int] | None) -> int:
    wanted = pattern_value(target.name, pattern, rank)
    if wanted < 0:
        raise DiffScalerError(f"rank of {target.name!r} must not be negative, got {wanted}")
    size = target.in_features
    for length in target.kernel:
        size *= length
    return int(min(wanted, size, target.out_features))
