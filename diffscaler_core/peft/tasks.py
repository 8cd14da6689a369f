"""A task file and a PEFT adapter hold the same numbers under two names: from one to the other.

<component>.<module>.scale    ours    base_model.model.<module>.diffscaler_scale    PEFT's
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import PeftType
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..affiner import TENSORS
from ..atomic import write_whole
from ..errors import DiffScalerError, TaskFileError, first_names, reason_of, unknown
from ..file_rules import check_in_memory
from ..folding import weights_of
from ..matching import match_layers
from ..targets import base_layer, component_of
from ..task import Layers, TaskAdapter, flat, parts_of
from .config import DiffScalerConfig
from .layer import DiffScalerLayer
from .model import bare, layers_of
from .registration import NAME, PREFIX

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_ROOT = "base_model.model."
#: Facts that the layers themselves say, or that belong to what PEFT cannot hold.
_OWN_FACTS = (
    *("name", "method", "parts", "activation", "gain", "scale_includes_bias", "ranks", "layers"),
    *("prompts", "control", "classes", "class_table"),
)


def to_task(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    name: str | None = None,
    component: str | None = None,
) -> TaskAdapter:
    """Returns an adapter of PEFT as a task, a copy on the CPU, bit for bit: for `save_task`.

    Args:
        model: A PEFT model, or a model that carries the layers (diffusers' `add_adapter`).
        adapter_name: Which adapter.
        name: The task's name; None: the adapter's.
        component: What a pipeline calls the model; None: by the model's class.

    Raises:
        UnknownNameError: No layer has such an adapter.
        DiffScalerError: The adapter trains whole modules too, which no task holds.
    """
    inside = bare(model)
    carriers = {n: layer for n, layer in _named(inside).items() if adapter_name in layer.r}
    if not carriers:
        known = dict.fromkeys(n for layer in layers_of(inside) for n in layer.r)
        raise unknown("adapter", adapter_name, known)
    config = getattr(inside, "peft_config", {})[adapter_name]
    if config.modules_to_save:
        raise DiffScalerError(
            f"adapter {adapter_name!r} trains {first_names(config.modules_to_save)} as a whole, "
            f"which a task does not hold; keep it in PEFT's format (save_pretrained)"
        )
    component = component or component_of(inside)
    layers = {
        f"{component}.{n}": {
            k: t.detach().to("cpu", copy=True) for k, t in x.tensors(adapter_name).items()
        }
        for n, x in carriers.items()
    }
    return _task(layers, config, name or adapter_name)


def from_task(
    model: nn.Module,
    task: TaskAdapter,
    adapter_name: str = "default",
    *,
    component: str | None = None,
    is_trainable: bool = False,
    inject: bool = False,
) -> nn.Module:
    """Returns a model with a task as an adapter of PEFT: its numbers, in their own dtype.

    Stored prompts stay behind; put them back with `task.replace(layers=to_task(…).layers)`.

    Args:
        model: The task's base, or a PEFT model of it that gets one more adapter.
        task: The task.
        adapter_name: What the adapter is called.
        component: Which of the task's components this model is; needed only if it has several.
        is_trainable: Whether to train it on.
        inject: True: the model itself gets the layers (as by diffusers' `add_adapter`), and is
            returned; False: it is put into a PeftModel.

    Raises:
        MismatchError: The task does not fit; the model is untouched.
        DiffScalerError: A control task, one with classes of its own, or one whose units act by
            noise level: PEFT has no place for them. Or the name is in use.
    """
    inside, component = bare(model), component or _component(model, task)
    if task.extras:
        raise DiffScalerError(
            f"task {task.name!r} holds more than its layers ({first_names(task.extras, 1)}), which "
            f"an adapter of PEFT cannot; use diffscaler_core.attach"
        )
    if task.is_timed:
        raise DiffScalerError(
            f"the hidden units of task {task.name!r} act at different noise levels, and an adapter "
            f"of PEFT is told none; use diffscaler_core.attach, or load_diffscaler"
        )
    if adapter_name in getattr(inside, "peft_config", {}):
        raise DiffScalerError(f"an adapter {adapter_name!r} is there already; delete it first")
    match_layers(inside, {task.name: task}, {task.name: task.component_layers(component)})
    config = config_of(task, component)
    config.inference_mode = not is_trainable
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    elif inject:
        inject_adapter_in_model(config, model, adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name)
    fill(model, task, adapter_name, component)
    return model


def config_of(task: TaskAdapter, component: str | None = None) -> DiffScalerConfig:
    """Returns the configuration of an adapter that has a task's layers, parts and ranks.

    Args:
        task: The task.
        component: Which of its components; None: the only one.
    """
    layers = task.component_layers(component or _component(None, task))
    parts = {name: parts_of({name: tensors}) for name, tensors in layers.items()}
    ranks = {name: len(t["down"]) for name, t in layers.items() if "down" in t}
    common = Counter(map(tuple, parts.values())).most_common(1)[0][0] if parts else ()
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    return DiffScalerConfig(
        r=rank,
        target_modules=list(layers),
        method=str(task.info.get("method", "diffscaler")),
        parts=list(common),
        activation=str(task.info.get("activation", "relu")),
        gain=float(task.info.get("gain", 1.0)),
        scale_includes_bias=bool(task.info.get("scale_includes_bias", False)),
        rank_pattern={re.escape(n): r for n, r in ranks.items() if r != rank},
        parts_pattern={re.escape(n): own for n, own in parts.items() if tuple(own) != common},
        info={key: value for key, value in task.info.items() if key not in _OWN_FACTS},
    )


def fill(
    model: nn.Module, task: TaskAdapter, adapter_name: str, component: str | None = None
) -> None:
    """Puts a task's numbers into an adapter that has its layers already; all or nothing."""
    own = task.component_layers(component or _component(model, task))
    there = {n: layer for n, layer in _named(bare(model)).items() if adapter_name in layer.r}
    if there.keys() != own.keys():
        raise DiffScalerError(
            f"adapter {adapter_name!r} has {len(there)} layers and task {task.name!r} {len(own)}; "
            f"they differ at {first_names(sorted(there.keys() ^ own.keys()))}"
        )
    for name, layer in there.items():
        device = weights_of(base_layer(layer))[0].device
        trained = any(t.requires_grad for t in layer.tensors(adapter_name).values())
        tensors = {n: t.detach().to(device, copy=True) for n, t in own[name].items()}
        layer.put(adapter_name, tensors, layer.facts[adapter_name])
        for tensor in layer.tensors(adapter_name).values():
            tensor.requires_grad_(trained)


def load_folder(
    folder: str | Path, *, name: str | None = None, component: str | None = None
) -> TaskAdapter:
    """Returns the adapter that PEFT's `save_pretrained` wrote, as a task; needs no model.

    Args:
        folder: Where `adapter_config.json` and `adapter_model.safetensors` are.
        name: The task's name; None: the folder's.
        component: As in `to_task`; None: by the class of the base that the adapter was trained on.

    Raises:
        TaskFileError: No such adapter, one of another method, or numbers that cannot be right.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        stored = load((folder / TENSORS_FILE).read_bytes())  # as in `tensor_file.py`
    except FileNotFoundError:
        raise TaskFileError(
            f"{str(folder)!r} has no {TENSORS_FILE}; save the adapter as safetensors"
        ) from None
    except SafetensorError as error:
        raise TaskFileError(
            f"{str(folder / TENSORS_FILE)!r} is broken: {reason_of(error)}"
        ) from error
    kind = str((config.info.get("base") or {}).get("class", ""))
    component = component or ("unet" if "unet" in kind.lower() else "transformer")
    layers: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in stored.items():
        module, _, part = key.removeprefix(_ROOT).replace(".base_layer", "").rpartition(".")
        if not part.startswith(PREFIX) or part.removeprefix(PREFIX) not in TENSORS:
            foreign.append(key)
        layers.setdefault(f"{component}.{module}", {})[part.removeprefix(PREFIX)] = tensor
    if foreign:
        raise TaskFileError(
            f"{str(folder)!r} holds {first_names(foreign)}, which a task does not (modules that "
            f"were trained as a whole, perhaps)"
        )
    task = _task(layers, config, name or folder.resolve().name)
    check_in_memory(str(folder), flat(task.layers), task.info)
    return task


def save_folder(task: TaskAdapter, folder: str | Path, *, component: str | None = None) -> Path:
    """Writes a task as PEFT's own files, for `PeftModel.from_pretrained`; needs no model.

    Args:
        task: The task.
        folder: Where to; is made if it is not there.
        component: Which of its components; None: the only one.

    Raises:
        TaskFileError: The disk refuses.
        DiffScalerError: As in `from_task`.
    """
    folder, component = Path(folder), component or _component(None, task)
    if task.extras:
        raise DiffScalerError(
            f"task {task.name!r} holds more than its layers ({first_names(task.extras, 1)}), which "
            f"an adapter of PEFT cannot"
        )
    config = config_of(task, component)
    config.inference_mode = True
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    tensors = {
        f"{_ROOT}{layer}.{PREFIX}{n}": t.detach().to("cpu", copy=True).contiguous()
        for layer, own in task.component_layers(component).items()
        for n, t in own.items()
    }
    try:
        write_whole(folder / TENSORS_FILE, save(tensors, {"format": "pt"}))
        write_whole(folder / CONFIG_FILE, json.dumps(plain, indent=2, sort_keys=True).encode())
    except OSError as error:
        raise TaskFileError(
            f"could not write {str(folder)!r}: {error.strerror or error}"
        ) from error
    return folder


def _read_config(folder: Path) -> DiffScalerConfig:
    file = folder / CONFIG_FILE
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaskFileError(
            f"{str(folder)!r} has no {CONFIG_FILE}; it is no PEFT adapter"
        ) from None
    except ValueError as error:
        raise TaskFileError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(facts, dict) or facts.get("peft_type") != NAME:
        kind = facts.get("peft_type") if isinstance(facts, dict) else None
        raise TaskFileError(
            f"{str(folder)!r} is an adapter of PEFT's method {kind!r}, not {NAME}; a LoRA goes "
            f"through import first"
        )
    known = DiffScalerConfig.__dataclass_fields__
    config: DiffScalerConfig = DiffScalerConfig(**{k: v for k, v in facts.items() if k in known})
    assert config.peft_type == PeftType(NAME)
    return config


def _task(layers: Layers, config: DiffScalerConfig, name: str) -> TaskAdapter:
    ranks = {n.partition(".")[2]: len(t["down"]) for n, t in layers.items() if "down" in t}
    info = {
        **config.info,
        "name": name,
        "method": config.method,
        "parts": parts_of(layers),
        **config.facts,
        "ranks": {"default": config.r, **{n: r for n, r in ranks.items() if r != config.r}},
        "naming": "diffusers",
    }
    return TaskAdapter(layers, info)


def _named(model: nn.Module) -> dict[str, DiffScalerLayer]:
    """Returns the layers by the names they had before PEFT put anything around them."""
    return {
        path.replace(".base_layer", ""): module
        for path, module in model.named_modules()
        if isinstance(module, DiffScalerLayer)
    }


def _component(model: nn.Module | None, task: TaskAdapter) -> str:
    if len(task.components) == 1:
        return task.components[0]
    if model is None or component_of(bare(model)) not in task.components:
        raise DiffScalerError(
            f"task {task.name!r} adapts {', '.join(task.components) or 'no layer'}; say which of "
            f"its components is meant: component=…"
        )
    return component_of(bare(model))
