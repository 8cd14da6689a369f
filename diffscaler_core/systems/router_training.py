"""Training a router: cross entropy on the base's features of noisy pictures, without any expert.

The equation is `posterior.py`'s: a classifier that is told x_t and t, and trained on x_t from the
very noising that the experts train on, has p(k | x_t, t) as its best answer, the sizes of the parts
included. Each picture is looked at in a number of noisings, evenly spread over time; the base runs
once for each, and what is then trained is a few thousand numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..blocks import block_named
from ..errors import DiffScalerError
from ..training.data.batches import TrainingData
from ..training.denoiser import Denoiser
from ..training.objective import noise_band
from ..training.progress import BANDS
from ..training.randomness import generator_for
from ..version import __version__
from .features import BATCH, Untold, noisy_features
from .router import MAX_PARTS, NULL, Router, site_of

#: Steps between looks at the validation pictures.
_EVERY = 25


@dataclass(frozen=True)
class RouterSettings:
    """How a router is trained.

    Attributes:
        block: Name or number of the block it reads; None: the middle one.
        hidden: Units of its hidden layer; 0: a linear map.
        pool: Features are means over pool × pool parts of the picture.
        draws: Noisings of each picture.
        steps: Of AdamW.
        batch: Noisy pictures per step.
        lr: Learning rate, which falls to 0 along a cosine.
        weight_decay: Of AdamW.
        kept_back: Share of the pictures that are validated on.
        seed: Of everything random.
    """

    block: str | int | None = None
    hidden: int = 32
    pool: int = 1
    draws: int = 32
    steps: int = 600
    batch: int = 256
    lr: float = 3e-3
    weight_decay: float = 1e-2
    kept_back: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        least = {"hidden": 0, "pool": 1, "draws": 1, "steps": 1, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise DiffScalerError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.kept_back < 1 or not self.lr > 0 or not self.weight_decay >= 0:
            raise DiffScalerError(
                f"kept_back must lie between 0 and 1, lr above 0 and weight_decay not below; got "
                f"{self.kept_back}, {self.lr} and {self.weight_decay}"
            )


@dataclass(frozen=True, eq=False)
class Noisings:
    """Noisy pictures as a router sees them: M of them.

    Attributes:
        features: (M, F).
        labels: Part, (M,).
        t: Time, 0 to 1, (M,).
        alpha: α, (M,).
        sigma: σ, (M,).
    """

    features: Tensor
    labels: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def rows(self, index: Tensor) -> Noisings:
        """Returns some of them."""
        return Noisings(*(own[index] for own in vars(self).values()))

    def logits(self, router: Router) -> Tensor:
        """Returns what a router says of them, (M, K)."""
        return router(self.features, self.alpha, self.sigma)  # type: ignore[no-any-return]


def noisings_of(
    denoiser: Denoiser,
    parts: Sequence[TrainingData],
    told: Untold,
    block: str,
    *,
    draws: int,
    pool: int = 1,
    seed: int = 0,
    times: Sequence[float] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> Noisings:
    """Returns every picture of every part in a number of noisings, as the base sees them.

    Args:
        denoiser: The base, no task on it, held still by the caller.
        parts: The parts' pictures.
        told: From `features.untold`.
        block: Name of the block that is read.
        draws: Noisings of each picture, evenly spread over time.
        pool: See `RouterSettings`.
        seed: Of times and noise.
        times: Times in place of those: each picture once at each.
        on_picture: Called with (noisy pictures done, in all).
    """
    found: list[tuple[Tensor, ...]] = []
    count = draws if times is None else len(times)
    total, done, turn = count * sum(len(data) for data in parts), 0, 0
    for k, data in enumerate(parts):
        for batch in data.whole(BATCH):
            for draw in range(count):
                generator = generator_for(seed, "router", turn)
                turn += 1
                if times is None:
                    t = (draw + torch.rand(len(batch.x0), generator=generator)) / draws
                else:
                    t = torch.full((len(batch.x0),), float(times[draw]))
                noise = torch.randn(batch.x0.shape, generator=generator)
                timestep, alpha, sigma = denoiser.objective.at(t)
                _, x_t = denoiser.objective.noisy(batch.x0, noise, t)
                seen = noisy_features(denoiser, x_t, timestep, told, [block], pool)[block]
                labels = torch.full((len(t),), k)
                found.append((seen, labels, t, alpha, sigma))
                done += len(t)
                if on_picture is not None:
                    on_picture(done, total)
    return Noisings(*(torch.cat(column) for column in zip(*found, strict=True)))


def train_router(
    denoiser: Denoiser,
    parts: Mapping[str, TrainingData],
    told: Untold,
    settings: RouterSettings | None = None,
    *,
    on_picture: Callable[[int, int], None] | None = None,
) -> Router:
    """Returns a router for these parts; its facts say how good it is on pictures kept back.

    Args:
        denoiser: The base, no task on it.
        parts: Name of an expert -> the pictures it is trained on.
        told: From `features.untold`.
        settings: How.
        on_picture: Called with (noisy pictures the base has seen, in all).

    Raises:
        DiffScalerError: Fewer than two parts, a part of one picture, or a block that is not there.
    """
    settings = settings or RouterSettings()
    if not 2 <= len(parts) <= MAX_PARTS or min(len(data) for data in parts.values()) < 2:
        sizes = ", ".join(f"{name} {len(data)}" for name, data in parts.items())
        raise DiffScalerError(
            f"a router tells 2 to {MAX_PARTS} parts apart, of two or more pictures each; got "
            f"{sizes or 'none'}"
        )
    name = block_named(denoiser.model, settings.block)
    sides = [data.split(settings.kept_back, settings.seed) for data in parts.values()]
    total = settings.draws * sum(len(data) for data in parts.values())
    seen: list[Noisings] = []
    before = 0
    with denoiser.held():
        for side, own in enumerate(zip(*sides, strict=True)):

            def on_part(done: int, of: int, start: int = before) -> None:
                if on_picture is not None:
                    on_picture(start + done, total)

            seen.append(
                noisings_of(
                    denoiser, own, told, name,
                    draws=settings.draws, pool=settings.pool, seed=settings.seed + side,
                    on_picture=on_part,
                )
            )  # fmt: skip
            before += len(seen[-1].labels)
    null = {n: tensor for n, tensor in told(1).items() if n in NULL}
    site = site_of(denoiser.model, name, settings.pool, denoiser.shape_model)
    width = seen[0].features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        router = Router(list(parts), site, width, settings.hidden, null)
    steps = _fit(router, seen[0], seen[1], settings)
    return _with_facts(router, parts, seen[1], settings, steps)


def _fit(router: Router, train: Noisings, kept: Noisings, settings: RouterSettings) -> int:
    """Trains a router to where it was best on the pictures kept back; returns that step."""
    std, mean = torch.std_mean(train.features, 0, correction=0)
    router.mean.copy_(mean)
    router.std.copy_(torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, 1.0))
    router.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        router.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    best, at = float("inf"), 0
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    for step in range(settings.steps):
        generator = generator_for(settings.seed, "router batch", step)
        rows = torch.randint(len(train.labels), (settings.batch,), generator=generator)
        batch = train.rows(rows)
        with torch.enable_grad():
            loss = F.cross_entropy(batch.logits(router), batch.labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        falling.step()
        if (step + 1) % _EVERY == 0 or step + 1 == settings.steps:
            with torch.no_grad():
                now = float(F.cross_entropy(kept.logits(router), kept.labels))
            if now < best:
                best, at = now, step + 1
                state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    router.load_state_dict(state)
    router.eval().requires_grad_(False)
    return at


def _with_facts(
    router: Router,
    parts: Mapping[str, TrainingData],
    kept: Noisings,
    settings: RouterSettings,
    steps: int,
) -> Router:
    logits, bands = kept.logits(router), noise_band(kept.t)
    right = (logits.argmax(1) == kept.labels).double()
    router.facts = {
        "pictures": {name: len(data) for name, data in parts.items()},
        "draws": settings.draws,
        "seed": settings.seed,
        "steps": steps,
        "loss": round(float(F.cross_entropy(logits, kept.labels)), 5),
        "accuracy": round(float(right.mean()), 4),
        "accuracy_by_noise": {
            f"{BANDS[i]:g}-{BANDS[i + 1]:g}": round(float(right[bands == i].mean()), 4)
            for i in range(len(BANDS) - 1)
            if bool((bands == i).any())
        },
        "diffscaler": __version__,
    }
    return router


def accuracy_over(
    denoiser: Denoiser,
    router: Router,
    parts: Sequence[TrainingData],
    told: Untold,
    times: Sequence[float],
    *,
    seed: int = 0,
) -> dict[float, float]:
    """Returns a router's accuracy at each time, on these pictures.

    Args:
        denoiser: The base, no task on it.
        router: The router.
        parts: Pictures of each of its parts, in order.
        told: From `features.untold`.
        times: Times, 0 to 1.
        seed: Of the noise.
    """
    block = router.site.name_in(denoiser.model)
    with denoiser.held(), torch.no_grad():
        seen = noisings_of(
            denoiser, parts, told, block,
            draws=1, pool=router.site.pool, seed=seed, times=times,
        )  # fmt: skip
        right = seen.logits(router).argmax(1) == seen.labels
    return {t: float(right[seen.t == torch.tensor(float(t))].double().mean()) for t in times}
