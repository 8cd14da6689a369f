"""What a task is measured against, by the same engine: full fine-tuning and PEFT's methods.

A baseline changes or wraps the base's own weights, so it is no task: nothing here can be stacked,
mixed in a batch or loaded by a host. It sees the same pictures, noise and times as a task with the
same config, and afterwards the base is bit for bit what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..atomic import write_whole
from ..errors import DiffScalerError, unknown
from ..targets import find_targets
from ..task import TaskAdapter
from .bases.pipelines import as_denoiser
from .conditioning import Prompts
from .config import TrainingConfig
from .data.batches import Batches
from .denoiser import Denoiser, Trainable
from .loop import train_task
from .optimizer import WEIGHTS
from .progress import OnStep

#: PEFT's name for the one adapter of a baseline.
_ADAPTER = "baseline"


class Network(Protocol):
    """Weights on a base that are trained in place of a task's."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        ...

    def take_off(self) -> None:
        """Makes the base what it was, bit for bit."""
        ...


#: (model, names of the layers, settings) -> the network on it; nothing it computes changes yet.
PutOn = Callable[[nn.Module, Sequence[str], Mapping[str, Any]], Network]


@dataclass(frozen=True)
class Baseline:
    """A way to fine-tune that is not ours.

    Attributes:
        put_on: Puts it on a model.
        source: Where it is from.
    """

    put_on: PutOn
    source: str


class _Full:
    """The base's own weights, all of them."""

    def __init__(self, model: nn.Module, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._own = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self._before = {name: parameter.detach().clone() for name, parameter in self._own.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._own

    @torch.no_grad()
    def take_off(self) -> None:
        for name, parameter in self._own.items():
            parameter.copy_(self._before[name])
            parameter.grad = None
            parameter.requires_grad_(False)


class _Peft:
    """One of PEFT's tuners, injected into the base's layers."""

    def __init__(self, model: nn.Module, names: Sequence[str], config: Any) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._model = model
        before = {id(parameter) for parameter in model.parameters()}
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
        self._own = {n: p for n, p in model.named_parameters() if id(p) not in before}
        self._layers = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._own

    def take_off(self) -> None:
        for name in self._layers:
            parent, _, child = name.rpartition(".")
            wrapped: Any = self._model.get_submodule(name)
            setattr(self._model.get_submodule(parent), child, wrapped.get_base_layer())
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config


def _peft(kind: str, **fixed: Any) -> PutOn:
    def put_on(model: nn.Module, names: Sequence[str], settings: Mapping[str, Any]) -> Network:
        try:
            import peft
        except ImportError as error:
            raise DiffScalerError(
                "this baseline is PEFT's; run: pip install 'diffscaler[peft]'"
            ) from error
        config = getattr(peft, kind)(**{"target_modules": list(names), **fixed, **settings})
        return _Peft(model, names, config)

    return put_on


#: Each is given the layers that a task of the same config would have.
BASELINES: dict[str, Baseline] = {
    "full": Baseline(_Full, "every weight of the base"),
    "peft_lora": Baseline(_peft("LoraConfig"), "arXiv:2106.09685, by PEFT"),
    "peft_dora": Baseline(_peft("LoraConfig", use_dora=True), "arXiv:2402.09353, by PEFT"),
    "peft_oft": Baseline(_peft("OFTConfig"), "arXiv:2306.07280, by PEFT"),
    "peft_ia3": Baseline(_peft("IA3Config", feedforward_modules=[]), "arXiv:2205.05638, by PEFT"),
}


@dataclass(frozen=True, eq=False)
class TrainedBaseline:
    """What a baseline's training came to.

    Attributes:
        baseline: A name in BASELINES.
        weights: The trained tensors, by name (float32 or as the base's, on the CPU).
        task: What rode along in a task: facts of the training, learned prompts, new classes.
        names: The layers it was given.
        settings: What PEFT was told.
    """

    baseline: str
    weights: Mapping[str, Tensor]
    task: TaskAdapter
    names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained (learned prompts not)."""
        return sum(tensor.numel() for tensor in self.weights.values()) + self.task.num_parameters

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(t.numel() * t.element_size() for t in self.weights.values()) + self.task.nbytes

    @contextlib.contextmanager
    def on(self, denoiser: Denoiser) -> Iterator[None]:
        """Puts the trained weights on the base for as long as the context lasts.

        Args:
            denoiser: The base it was trained on.
        """
        network = BASELINES[self.baseline].put_on(denoiser.model, self.names, self.settings)
        try:
            with torch.no_grad():
                for name, parameter in network.parameters().items():
                    parameter.copy_(self.weights[name])
                    parameter.requires_grad_(False)
            with denoiser.attached({self.task.name: self.task}):
                yield
        finally:
            network.take_off()

    def save(self, path: str | Path) -> Path:
        """Writes the trained tensors: of "full", a checkpoint of the whole model.

        Raises:
            OSError: The disk refuses; what was there before is untouched.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        write_whole(Path(path), save(tensors, {"format": "pt", "baseline": self.baseline}))
        return Path(path)


class _Worn:
    """A network as a `Trainable`, beside a task that has no layers."""

    def __init__(self, carried: Trainable, network: Network) -> None:
        self._carried, self._network = carried, network
        self.weights: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._carried.names

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        own = {WEIGHTS + n: p for n, p in self._network.parameters().items()}
        return {**own, **self._carried.parameters_of(name)}

    def requires_grad_(self, requires_grad: bool = True) -> _Worn:
        for parameter in self._network.parameters().values():
            parameter.requires_grad_(requires_grad)
        self._carried.requires_grad_(requires_grad)
        return self

    def set_groups(self, names: Sequence[str | None] | None) -> None:
        self._carried.set_groups(names)

    def set_control(self, latents: Tensor | None, kept: Tensor | None = None) -> None:
        self._carried.set_control(latents, kept)

    @property
    def is_timed(self) -> bool:
        return self._carried.is_timed

    def set_time(self, log_snr: Tensor) -> None:
        self._carried.set_time(log_snr)

    def task(self, name: str | None = None) -> TaskAdapter:
        # asked for within the running means, so these are what is to be kept
        named = self._network.parameters().items()
        self.weights = {n: p.detach().to("cpu", copy=True) for n, p in named}
        return self._carried.task(name)

    def remove(self) -> None:
        self._carried.remove()
        self._network.take_off()


def train_baseline(
    base: Any,
    data: Batches,
    config: TrainingConfig | None = None,
    *,
    baseline: str = "full",
    settings: Mapping[str, Any] | None = None,
    prompts: Prompts | None = None,
    words: TaskAdapter | None = None,
    validation: Batches | None = None,
    on_step: OnStep | None = None,
) -> TrainedBaseline:
    """Returns a baseline trained as `train_task` trains a task; the base is what it was.

    Args:
        base: As in `train_task`.
        data: As in `train_task`.
        config: As in `train_task`: `lr` is the rate of the baseline's weights, `targets` and
            `exclude` say which layers PEFT is given; `method` and `rank` are not used.
        baseline: A name in BASELINES.
        settings: What PEFT's config is told, such as {"r": 8, "lora_alpha": 8}.
        prompts: As in `train_task`.
        words: As in `train_task`.
        validation: As in `train_task`.
        on_step: As in `train_task`.

    Raises:
        UnknownNameError: No such baseline.
        DivergedError: The loss became NaN or Inf.
        DiffScalerError: As in `train_task`; PEFT is not installed.
    """
    if baseline not in BASELINES:
        raise unknown("baseline", baseline, BASELINES)
    config, settings = config or TrainingConfig(), dict(settings or {})
    denoiser = as_denoiser(base)
    found = find_targets(denoiser.model, config.targets, exclude=config.exclude)
    names = tuple(target.name for target in found)
    worn: list[_Worn] = []

    def attach(tasks: Mapping[str, TaskAdapter]) -> Trainable:
        carried = denoiser.attach(tasks)
        try:
            network = BASELINES[baseline].put_on(denoiser.model, names, settings)
        except BaseException:
            carried.remove()
            raise
        worn.append(_Worn(carried, network))
        return worn[-1]

    wearing = replace(denoiser, attach_tasks=attach)
    task = train_task(
        wearing,
        data,
        replace(config, method="prompts"),
        prompts=prompts,
        words=words,
        validation=validation,
        on_step=on_step,
    )
    return TrainedBaseline(baseline, worn[-1].weights, task, names, settings)
