"""A fine-tuned model minus its base, as a task: scale, shift and an identity subspace per layer.

The weights are read tensor by tensor, so that memory holds the task and a few copies of the largest
layer, however large the models are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..affiner import PARTS
from ..errors import DiffScalerError, unknown
from ..methods import METHODS
from ..targets import Target, all_targets, component_of, find_targets
from ..task import TaskAdapter, base_facts, layer_generator, parts_of
from .low_rank import LowRank, fit_change, squared
from .ranks import Curve, kept_at_ranks, ranks_by_budget, ranks_by_energy
from .report import ExtractionReport, LayerReport, LeftOut
from .weights import Source, Weights, as_float, check_pair, weights_of

#: The largest rank that rank="auto" gives a layer, unless told.
MOST_RANK = 128
#: The share of each layer's change that rank="auto" keeps, unless told.
ENERGY = 0.9


#: Called with (tensors done, of how many, the tensor's name).
OnTensor = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Extraction:
    """A task taken from two models, and what it lost.

    Attributes:
        task: The task.
        report: What it keeps of the change, layer by layer, and what it leaves out.
    """

    task: TaskAdapter
    report: ExtractionReport


class _Layer(NamedTuple):
    """One layer's tensors before and after, flattened to (C_out, columns)."""

    target: Target
    weight: Tensor
    change: Tensor
    shift: Tensor | None
    grouped: bool


@torch.no_grad()
@torch.inference_mode(False)
def extract_task(
    tuned: Source,
    base: Source,
    rank: int | str = 16,
    *,
    name: str = "extracted",
    parts: Sequence[str] = PARTS,
    targets: str | Sequence[str] = "all",
    exclude: str | Sequence[str] | None = None,
    energy: float = ENERGY,
    rank_budget: int | str | None = None,
    most_rank: int = MOST_RANK,
    dtype: torch.dtype = torch.float32,
    component: str | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_tensor: OnTensor | None = None,
) -> Extraction:
    """Returns a task that does to `base` what fine-tuning did, as far as its ranks allow.

    The shift holds a bias's change exactly. Scale and subspace come near the weight's:
    (1 + a) ⊙ W + U D, by least squares and singular values. The activation is identity: relu
    cannot express a linear change but by two hidden units for one, relu(z) − relu(−z).

    Args:
        tuned: The fine-tuned model: a model, a state dict, a `.safetensors` file, or a folder of
            diffusers (a model's or a pipeline's). Names are diffusers'.
        base: What it was trained from, in any of these forms.
        rank: R of every subspace, 0 for none; "auto": by `energy`, or by `rank_budget` if given.
        name: The task's name.
        parts: Names among PARTS; what is not named is not used.
        targets: Which layers, as in `find_targets`.
        exclude: Targets to leave out.
        energy: For "auto": each layer gets the smallest rank that keeps this share of its change.
        rank_budget: For "auto": how many numbers to spend where they keep most: 8 (as many as
            rank 8 everywhere), "0.4%" (of the base's), "1.5M".
        most_rank: For "auto": the largest rank of a layer.
        dtype: Of the task's tensors.
        component: The models' name in a pipeline; None: by their class.
        device: Where to compute.
        seed: Of the randomised decompositions.
        on_tensor: Told of every tensor; may raise to stop.

    Raises:
        MismatchError: The two are not of one architecture and size.
        DiffScalerError: Nothing changed, quantised weights, NaN or Inf, or a setting that cannot be
            meant.
    """
    _check(rank, parts, energy, rank_budget, most_rank)
    after, before = weights_of(tuned, component), weights_of(base, component)
    check_pair(after, before)
    chosen = find_targets(before.shape_model, targets, exclude=exclude)
    component = component or component_of(before.shape_model)
    pair = _Pair(after, before, torch.device(device), seed, "scale" in parts)
    rounds = 2 if rank == "auto" else 1
    progress = _Progress(on_tensor, rounds * len(chosen) + len(before.shapes))
    ranks = {target.name: 0 if "subspace" not in parts else rank for target in chosen}
    lefts: dict[str, Curve] = {}
    if rank == "auto" and "subspace" in parts:
        for target in chosen:
            progress(target.name)
            lefts[target.name] = pair.curve(pair.layer(target), most_rank)
        ranks = dict(ranks_by_energy(lefts, energy))
        if rank_budget is not None:
            size = sum(map(math.prod, before.shapes.values()))
            ranks = dict(ranks_by_budget(lefts, chosen, rank_budget, parts, size))
    layers: dict[str, dict[str, Tensor]] = {}
    reports: list[LayerReport] = []
    curves: dict[str, Curve] = {}
    held: set[str] = set()
    for target in chosen:
        progress(target.name)
        layer = pair.layer(target)
        tensors, found, curve = pair.held(layer, int(ranks[target.name]), parts, dtype)
        if tensors:
            layers[f"{component}.{target.name}"] = tensors
            reports.append(found)
            curves[target.name] = lefts.get(target.name, curve)
            held |= {f"{target.name}.weight"}
            held |= {f"{target.name}.bias"} if "shift" in tensors else set()
    left_out, unchanged = _left_out(pair, held, chosen, progress)
    if not layers:
        raise DiffScalerError(
            f"{after.title} and {before.title} are the same in all {len(chosen)} layers looked at"
            + (f"; {len(left_out)} other tensors differ" if left_out else ": nothing to extract")
        )
    report = ExtractionReport(
        after.title, before.title, tuple(reports), tuple(left_out), unchanged,
        *kept_at_ranks(curves, chosen, layers, component),
    )  # fmt: skip
    used = [target for target in chosen if f"{component}.{target.name}" in layers]
    info = _info(name, layers, rank, report, base_facts(before.shape_model, used))
    return Extraction(TaskAdapter(layers, info), report)


class _Pair:
    """Two models' weights, read layer by layer."""

    def __init__(
        self, after: Weights, before: Weights, device: torch.device, seed: int, scaled: bool
    ) -> None:
        self.after, self.before, self.device = after, before, device
        self.seed, self.scaled = seed, scaled

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns one tensor before and after, as float32 or float64.

        Raises:
            DiffScalerError: Packed integers, NaN or Inf.
        """
        read = [(side, side.read(name)) for side in (self.before, self.after)]
        old, new = (as_float(side.title, name, tensor, self.device) for side, tensor in read)
        if not bool(torch.isfinite(old).all() & torch.isfinite(new).all()):
            raise DiffScalerError(f"{name!r} holds NaN or Inf; such a model cannot be extracted")
        return old, new

    def layer(self, target: Target) -> _Layer:
        """Returns one layer."""
        old, new = self.both(f"{target.name}.weight")
        grouped = old.ndim > 1 and old.shape[1] != target.in_features
        weight = old.flatten(1)
        return _Layer(target, weight, new.flatten(1) - weight, self._shift(target.name), grouped)

    def _shift(self, name: str) -> Tensor | None:
        """Returns b' − b̂; None if there is no bias, or it did not change."""
        if f"{name}.bias" not in self.before.shapes:
            return None
        old, new = self.both(f"{name}.bias")
        return None if torch.equal(old, new) else new - old

    def fitted(self, layer: _Layer, rank: int, look: int) -> LowRank:
        """Returns scale and subspace of one layer; a grouped convolution gets no subspace."""
        if layer.grouped:
            rank = look = 0
        generator = layer_generator(self.seed, layer.target.name)
        return fit_change(layer.weight, layer.change, rank, look, self.scaled, generator)

    def curve(self, layer: _Layer, most: int) -> Curve:
        """Returns what stays undone at each rank up to `most`."""
        whole = squared(layer.change)
        return Curve(whole, self.fitted(layer, 0, most).left if whole else torch.zeros(1))

    def held(
        self, layer: _Layer, rank: int, parts: Sequence[str], dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], LayerReport, Curve]:
        """Returns what the task holds of one layer, how near that is, and what other ranks do."""
        tensors: dict[str, Tensor] = {}
        moved = squared(layer.change)
        curve = Curve(moved, torch.zeros(1))
        if moved and set(parts) & {"scale", "subspace"}:
            # as far as twice the rank, for advice
            fitted = self.fitted(layer, rank, max(2 * rank, 8) if "subspace" in parts else 0)
            curve = Curve(moved, fitted.left)
            if fitted.scale is not None:
                tensors["scale"] = fitted.scale
            if fitted.down is not None and fitted.up is not None and len(fitted.down):
                kernel = layer.target.kernel
                tensors["down"] = fitted.down.unflatten(1, (-1, *kernel)) if kernel else fitted.down
                tensors["up"] = fitted.up
        if "shift" in parts and layer.shift is not None:
            tensors["shift"] = layer.shift
        tensors = {part: t.to("cpu", dtype).contiguous() for part, t in tensors.items()}
        _check_range(layer.target.name, tensors, dtype)
        rest = squared(layer.change - self._done(layer, tensors)) if moved else 0.0
        weight = squared(layer.weight)
        report = LayerReport(
            layer.target.name,
            math.sqrt(moved / weight) if weight else math.inf,
            math.sqrt(rest / moved) if moved else 0.0,
            len(tensors.get("down", ())),
            "scale" in tensors,
            math.sqrt(squared(tensors["shift"].float())) if "shift" in tensors else 0.0,
            moved,
            sum(t.numel() for t in tensors.values()),
        )
        return tensors, report, curve

    def _done(self, layer: _Layer, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the change that the tensors make, as they are stored."""
        done = torch.zeros_like(layer.weight)
        own = {part: t.to(self.device, layer.weight.dtype) for part, t in tensors.items()}
        if "scale" in own:
            done += own["scale"][:, None] * layer.weight
        if "down" in own:
            done += own["up"] @ own["down"].flatten(1)
        return done


class _Progress:
    """Counts what has been read."""

    def __init__(self, told: OnTensor | None, count: int) -> None:
        self._told, self._count, self._done = told, count, 0

    def __call__(self, name: str) -> None:
        self._done += 1
        if self._told is not None:
            self._told(min(self._done, self._count), self._count, name)


def _left_out(
    pair: _Pair, held: set[str], chosen: Sequence[Target], progress: _Progress
) -> tuple[list[LeftOut], int]:
    """Returns everything else that changed, and how many tensors did not."""
    layers = {target.name for target in all_targets(pair.before.shape_model)}
    own = {target.name for target in chosen}
    left, unchanged = [], 0
    for name in pair.before.shapes:
        if name in held:
            continue
        progress(name)
        layer, _, leaf = name.rpartition(".")
        read = [(side, side.read(name)) for side in (pair.before, pair.after)]
        if torch.equal(*(tensor for _, tensor in read)):
            unchanged += 1
            continue
        old, new = (tensor.float() for _, tensor in read)
        size, moved = math.sqrt(squared(old)), math.sqrt(squared(new - old))
        why = "no layer a task can adapt"
        if layer in layers:
            why = "not among the targets" if layer not in own else f"the parts leave the {leaf} out"
        left.append(LeftOut(name, moved / size if size else math.inf, moved**2, why))
    return left, unchanged


def _info(
    name: str,
    layers: Mapping[str, Mapping[str, Tensor]],
    rank: int | str,
    report: ExtractionReport,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    parts = parts_of(layers)
    # the method whose parts these are; a task of other parts is DiffScaler's with some left out
    method = next(
        (n for n, m in METHODS.items() if list(m.parts) == parts and not m.only), "diffscaler"
    )
    return {
        "name": name,
        "method": method,
        "parts": parts,
        "activation": "identity",
        "gain": 1.0,
        "scale_includes_bias": False,
        "base": dict(base),
        "naming": "diffusers",
        "extracted": {
            "tuned": report.tuned.strip("'"),
            "base": report.base.strip("'"),
            "rank": rank,
            "kept": round(report.kept, 6),
        },
    }


def _check(
    rank: int | str,
    parts: Sequence[str],
    energy: float,
    rank_budget: int | str | None,
    most_rank: int,
) -> None:
    if rank != "auto" and (isinstance(rank, (str, bool)) or rank < 0):
        raise DiffScalerError(f"rank must be a number from 0 or 'auto', got {rank!r}")
    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if not parts:
        raise DiffScalerError(f"a task needs a part; parts: {', '.join(PARTS)}")
    if not 0 < energy <= 1:
        raise DiffScalerError(f"energy is a share above 0 and at most 1, got {energy}")
    if rank_budget is not None and rank != "auto":
        raise DiffScalerError(f"rank_budget {rank_budget!r} needs rank 'auto', got rank {rank}")
    if most_rank < 1:
        raise DiffScalerError(f"most_rank must be at least 1, got {most_rank}")


def _check_range(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise DiffScalerError(
            f"the change of {name!r} is too large for {str(dtype).removeprefix('torch.')}; "
            f"use float32 or bfloat16"
        )
