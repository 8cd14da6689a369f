"""Choosing ranks: what the gradient at the untouched base says of each layer, in a few batches.

G = dL/dW of a layer is never formed, and no weight is read: of a task whose subspaces are linear,
U has the gradient G Dᵀ while U = 0, and D has Uᵀ G while D = 0. Two passes over the same batches,
with a random D first and then with U an orthonormal basis of what came of it, are the randomised
SVD of Halko, Martinsson and Tropp (arXiv:0909.4061, Algorithms 4.1 and 5.1). So whatever can carry
a task can be asked, convolutions, quantised and offloaded bases among them, and the base stays as
it is.

Half of the pictures find a direction, the other half say what it is worth: along chance, which
always looks like signal to the pictures it came from, they disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..auto_rank import RankChoice, Spectrum, allocate, budget_of
from ..errors import DiffScalerError, first_names
from ..task import TaskAdapter, layer_generator
from .conditioning import Prompts
from .config import TrainingConfig
from .data.batches import Batches, TrainingData
from .denoiser import Denoiser
from .launch import Launch
from .learner import Drawn, Learner, TaskRun

#: Noisy pictures that are looked at, half of them by either half.
LOOKS = 128
#: Largest rank of a layer, and the same as a multiple of the even rank that the budget would pay.
MOST, MOST_OF_EVEN = 64, 8
_BESIDE = 8  # directions sketched beside those wanted (arXiv:0909.4061, section 4.2: 5 or 10)
_FP16 = 2.0**12  # keeps small gradients from vanishing in float16; the worth is relative

Gradients = dict[str, Tensor]


def choose(
    denoiser: Denoiser,
    narrow: TaskAdapter,
    run: TaskRun,
    prompts: tuple[Prompts, Prompts | None],
    config: TrainingConfig,
    launch: Launch | None = None,
) -> RankChoice:
    """Returns ranks for a task's layers: a function of seed, pictures and settings alone.

    Args:
        denoiser: The base, which nothing else is attached to; held still by the caller or not.
        narrow: The task as it would start at rank 1: says which layers have subspaces, and holds
            whatever else the base is to be run with.
        run: Its pictures.
        prompts: What the base is told about them, and about prior pictures.
        config: The run's settings, with `rank_budget`.
        launch: The processes that share the work.

    Raises:
        DiffScalerError: The budget does not suffice, or the gradient is 0 or not finite.
    """
    launch = launch or Launch()
    shapes = {name: own["down"].shape[1:] for name, own in narrow.layers.items() if "down" in own}
    units = {n: narrow.layers[n]["down"][0].numel() + len(narrow.layers[n]["up"]) for n in shapes}
    limits = {n: min(s.numel(), len(narrow.layers[n]["up"])) for n, s in shapes.items()}
    if not units:
        raise DiffScalerError(f"method {config.method!r} has no subspaces to choose ranks for")
    numbers = sum(t.numel() for own in narrow.layers.values() for t in own.values())
    shape_model = denoiser.shape_model or denoiser.model
    budget = budget_of(
        config.rank_budget,
        units=units,
        limits=limits,
        fixed=numbers - sum(units.values()),
        base=sum(p.numel() for p in shape_model.parameters()),
    )
    even = -(-budget // sum(units.values()))
    most = min(MOST, MOST_OF_EVEN * even)
    probe = _probe(narrow, {n: min(most + _BESIDE, limits[n]) for n in units}, config.seed)
    with denoiser.attached({probe.name: probe}) as trainable:
        trainable.requires_grad_(True)
        learners = [
            Learner(replace(run, name=probe.name, data=half, groups=None), trainable, *prompts,
                    config, denoiser.objective, denoiser.device)
            for half in _halves(run.data, config.seed)
        ]  # fmt: skip
        named = trainable.parameters_of(probe.name)
        owners = {n: (named[f"{n}.down"], named[f"{n}.up"]) for n in units}
        sides = [
            _gradients(denoiser, learner, half, {n: up for n, (_, up) in owners.items()}, launch)
            for half, learner in enumerate(learners)
        ]
        for name, (down, up) in owners.items():
            with torch.no_grad():
                # what either half asks for: the sum alone would leave out where they cancel
                both = torch.cat([side[name] for side in sides], dim=1)
                basis = torch.linalg.svd(both, full_matrices=False).U
                up.copy_(basis[:, : up.shape[1]].to(up))
                down.zero_()
        downs = {n: down for n, (down, _) in owners.items()}
        small = [
            _gradients(denoiser, learner, half, downs, launch)
            for half, learner in enumerate(learners)
        ]
    prefix = f"{denoiser.component}."
    spectra = {
        name.removeprefix(prefix): spectrum_of(small[0][name], small[1][name], units[name])
        for name in units
    }
    ranks = allocate(spectra, budget, most)
    if not any(ranks.values()):
        raise DiffScalerError(
            f"no rank could be chosen for task {run.name!r}: the loss does not depend on its "
            f"{len(units)} layers, for example {first_names(spectra, 1)}; give a rank"
        )
    return RankChoice(ranks, spectra, budget, len(run.data))


def spectrum_of(one: Tensor, other: Tensor, cost: int) -> Spectrum:
    """Returns a layer's spectrum from the gradients of two halves of the pictures.

    Unit i is worth σᵢ · (uᵢᵀ G' vᵢ): what a step along a direction that one half of the pictures
    asks for brings the other half, whose gradient is G'; the mean of both ways round. Of all there
    is to gain, Σ σᵢ², that is the share that is confirmed.

    Args:
        one: G of one half, (C_out, C_in·k), or in any orthonormal basis of its columns.
        other: G of the other half, in the same basis.
        cost: Numbers a unit of rank takes.
    """
    one, other = one.double(), other.double()
    gains = torch.zeros(min(one.shape), dtype=torch.float64)
    whole = 0.0
    for mine, others in ((one, other), (other, one)):
        u, sigma, v = torch.linalg.svd(mine, full_matrices=False)
        gains += sigma * torch.einsum("or,oi,ri->r", u, others, v)
        whole += float(sigma.square().sum())
    ordered = gains.clamp(min=0).sort(descending=True).values / 2
    confirmed = float(gains.sum()) / whole if whole else 0.0
    return Spectrum(tuple(ordered.tolist()), cost, min(max(confirmed, 0.0), 1.0))


def _probe(narrow: TaskAdapter, widths: Mapping[str, int], seed: int) -> TaskAdapter:
    """Returns the task with linear subspaces of these widths and nothing else on its layers."""
    layers = {}
    for name, width in widths.items():
        own = narrow.layers[name]
        down = torch.randn(
            width, *own["down"].shape[1:], generator=layer_generator(seed, f"sketch/{name}")
        )
        layers[name] = {"down": down, "up": own["up"].new_zeros(len(own["up"]), width)}
    return narrow.replace(layers=layers).with_info(activation="identity", gain=1.0)


def _halves(data: Batches, seed: int) -> Sequence[Batches]:
    """Returns the pictures in two halves; what cannot be halved (one picture, a stream) twice."""
    if not isinstance(data, TrainingData) or len(data) < 2:
        return data, data
    return data.split(0.5, seed)


def _gradients(
    denoiser: Denoiser,
    learner: Learner,
    half: int,
    wanted: Mapping[str, nn.Parameter],
    launch: Launch,
) -> Gradients:
    """Returns the gradients of some parameters over the batches of one half, (rows, columns)."""
    config = learner.config
    scale = _FP16 if config.precision == "fp16" else 1.0
    learner.clear()
    for drawn in _parts(learner, half, launch, denoiser.device):
        timestep, x_t = denoiser.objective.noisy(drawn.x0, drawn.noise, drawn.t)
        with denoiser.autocast(config.precision):
            output = denoiser(x_t, timestep, learner.condition(drawn))
        weighted, _ = learner.losses(output, drawn)
        (scale * weighted.mean()).backward()
    launch.average_gradients(list(wanted.values()))
    found: Gradients = {}
    for name, parameter in wanted.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not torch.isfinite(grad).all():
            raise DiffScalerError(
                f"no rank could be chosen: the gradient of {name!r} is not finite; give a rank, or "
                f"load the base in float32 or bfloat16"
            )
        found[name] = grad.flatten(1).to("cpu", torch.float64)
    learner.clear()
    return found


def _parts(learner: Learner, half: int, launch: Launch, device: torch.device) -> Iterator[Drawn]:
    """Yields this process's parts of the batches that one half looks at, as `Engine` cuts them."""
    config = learner.config
    batches = -(-LOOKS // (2 * config.batch))
    own = config.batch // launch.processes
    for step in range(half * batches, (half + 1) * batches):
        drawn = learner.draw(step)
        for part in range(config.accumulate):
            first, last = (own * (part + i) // config.accumulate for i in (0, 1))
            start = launch.index + first * launch.processes
            yield drawn.rows(slice(start, last * launch.processes, launch.processes), device)
