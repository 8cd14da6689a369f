"""A model's weights, wherever they are: in memory, as a state dict, in files; read one by one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import DiffScalerError, MismatchError, first_names
from ..foreign import class_of, names_of_original, read_foreign_header
from ..hollow import hollow_model
from ..targets import Target, base_layer, resolve

#: Where a pipeline's folder keeps its denoiser; the first that is there.
_FOLDERS = ("transformer", "unet")
#: Layers whose weight is a matrix and that are no Linear: tables, HiDream's choice of experts.
_TABLE = re.compile(r"(.*\.)?(\w*embedding(s|_table)?|style_embedder|embed_tokens|ff_i\.gate)")
#: Ends of the names of tensors that only quantised weights have beside them.
_QUANTISED = ("weight_scale", "scale_weight", "comfy_quant", "absmax", "quant_map", "scaled_fp8")

#: What `weights_of` reads: a model, a state dict, a file or folder, or another host's `Weights`.
Source = Any


class Weights(Protocol):
    """The tensors of one denoiser, under diffusers' names.

    Attributes:
        title: What messages call it.
        shapes: Name -> shape of every tensor.
        shape_model: A module with its adaptable layers, of its class's name.
    """

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102
    @property
    def shape_model(self) -> nn.Module: ...  # noqa: D102

    def read(self, name: str) -> Tensor:
        """Returns one tensor, wherever it lies."""
        ...


def weights_of(source: Source, component: str | None = None) -> Weights:
    """Returns what gives a model's weights one by one.

    Args:
        source: A model, a state dict, a `.safetensors` file, or a folder: diffusers' of a model, or
            of a whole pipeline; or `Weights` already.
        component: Which model of a pipeline's folder; None: its "transformer" or "unet".

    Raises:
        DiffScalerError: Nothing of the kind, or names that are not diffusers'.
        FileNotFoundError: No such file.
    """
    if isinstance(source, nn.Module):
        return HeldWeights(source)
    if not isinstance(source, (Mapping, str, Path)):
        return source  # type: ignore[no-any-return]  # another host's
    if isinstance(source, Mapping):
        return HeldWeights(dict(source))
    return FileWeights(Path(source), component)


class HeldWeights:
    """The weights of a model or a state dict in memory; nothing is copied.

    Args:
        source: A model (a PEFT layer counts as the layer it wraps), or a state dict.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor]) -> None:
        if isinstance(source, nn.Module):
            self.title, self.shape_model = type(source).__name__, source
            self._tensors: Mapping[str, Tensor] = _plain_state(source)
            self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
        else:
            self._tensors = {n: t for n, t in source.items() if isinstance(t, Tensor)}
            self.shapes = {name: tuple(t.shape) for name, t in self._tensors.items()}
            self.shape_model = _model_of("the state dict", self.shapes)
            self.title = f"a state dict of {type(self.shape_model).__name__}"

    def read(self, name: str) -> Tensor:
        """Returns one tensor."""
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise DiffScalerError(
                f"{name!r} of {self.title} is on the meta device (offloaded, or never loaded): "
                f"give the model's folder instead, or load it without offloading"
            )
        return tensor.detach()


class FileWeights:
    """The weights in safetensors files; each is read when it is asked for.

    Args:
        path: A file, or a folder as `weights_of` takes it.
        component: As in `weights_of`.
    """

    def __init__(self, path: Path, component: str | None = None) -> None:
        files, config = _files_of(path, component)
        self.title = f"{path.name!r}"
        self._where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, entry in read_foreign_header(file).entries.items():
                if name in self._where:
                    raise DiffScalerError(
                        f"{self._where[name].name!r} and {file.name!r} in {str(path)!r} both hold "
                        f"{name!r}, so they are two versions: give one file"
                    )
                self._where[name], self.shapes[name] = file, tuple(entry["shape"])
        class_name = json.loads(config.read_text("utf-8")).get("_class_name") if config else None
        self.shape_model = _model_of(self.title, self.shapes, class_name)

    def read(self, name: str) -> Tensor:
        """Returns one tensor."""
        file = self._where[name]
        try:
            with safe_open(str(file), "pt") as opened:
                return opened.get_tensor(name)  # type: ignore[no-any-return]
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DiffScalerError(f"could not read {name!r} of {file.name!r}: {reason}") from error


def check_pair(tuned: Weights, base: Weights) -> None:
    """Refuses two models that are not of one architecture and size.

    Raises:
        MismatchError: One line with both models, the counts and the first names.
    """
    extra, missing = tuned.shapes.keys() - base.shapes.keys(), base.shapes.keys() - tuned.shapes
    wrong = [n for n, shape in base.shapes.items() if tuned.shapes.get(n, shape) != shape]
    classes = [type(weights.shape_model).__name__ for weights in (tuned, base)]
    problems = []
    if classes[0] != classes[1]:
        problems.append(f"they are of other classes, {classes[0]} and {classes[1]}")
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first {first_names(sorted(missing))}")
    if extra:
        problems.append(f"{len(extra)} are too many, first {first_names(sorted(extra))}")
    if wrong:
        shown = [f"{n} {tuned.shapes[n]} for {base.shapes[n]}" for n in wrong]
        problems.append(f"{len(wrong)} have other shapes, first {first_names(shown)}")
    if problems:
        raise MismatchError(
            f"{tuned.title} is no fine-tune of {base.title}: {'; '.join(problems)}; give the model "
            f"it was trained from"
        )


def as_float(title: str, name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor as float32 (or float64) on a device.

    Raises:
        DiffScalerError: It holds packed integers.
    """
    if not tensor.dtype.is_floating_point:
        raise DiffScalerError(
            f"{name!r} of {title} is packed as {str(tensor.dtype).removeprefix('torch.')}, not a "
            f"plain weight: give the model as it was before it was quantised"
        )
    return tensor.to(device, torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's tensors under its layers' own names, without what PEFT wrapped round."""
    state: dict[str, Tensor] = {}
    wrapped: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            wrapped[path] = path
    inside = tuple(path + "." for path in wrapped)
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside):
            state[name] = tensor
    for path in wrapped:
        layer = resolve(model, path)
        for name, tensor in base_layer(layer).state_dict().items():
            state[f"{path}.{name}"] = tensor
    return state


def _model_of(
    title: str, shapes: Mapping[str, tuple[int, ...]], class_name: str | None = None
) -> nn.Module:
    """Returns a hollow model with the layers that a state dict's names and shapes tell of.

    Raises:
        DiffScalerError: Quantised weights, or names that are not diffusers'.
    """
    packed = [name for name in shapes if name.endswith(_QUANTISED)]
    if packed:
        raise DiffScalerError(
            f"{title} is quantised (it holds {first_names(packed, 1)}): give the model as it was "
            f"before, or extract in ComfyUI with DiffScalerExtractTask"
        )
    original = names_of_original(shapes)
    if original and class_name is None:
        raise DiffScalerError(
            f"{title} has the names of {original}, not diffusers': extract in ComfyUI with "
            f"DiffScalerExtractTask, or save it with diffusers' save_pretrained first"
        )
    targets = [t for t in (_target(n, shape, shapes) for n, shape in shapes.items()) if t]
    if not targets:
        raise DiffScalerError(f"{title} holds no weights of a model's layers")
    return hollow_model(class_name or class_of(shapes) or "Unknown", targets)


def _target(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Target | None:
    """Returns the layer whose weight this is; tables are none."""
    layer, _, leaf = name.rpartition(".")
    if leaf != "weight" or not layer or not 2 <= len(shape) <= 5:
        return None
    has_bias = f"{layer}.bias" in shapes
    if len(shape) == 2 and not has_bias and _TABLE.fullmatch(layer):
        return None
    out, width, *kernel = shape
    if width == 1 and math.prod(kernel) > 1:  # one channel each: a convolution of its own for each
        width = out
    return Target(layer, out, width, tuple(kernel), has_bias)


def _files_of(path: Path, component: str | None) -> tuple[list[Path], Path | None]:
    """Returns the files that hold a model's weights, and its config.json if there is one.

    Raises:
        DiffScalerError: A folder without them, or with several versions of them.
        FileNotFoundError: No such file.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(2, "No such file", str(path))
        return [path], None
    if (path / "model_index.json").is_file():
        there = [f for f in ([component] if component else _FOLDERS) if (path / f).is_dir()]
        if not there:
            raise DiffScalerError(f"{str(path)!r} holds no {component or ' or '.join(_FOLDERS)}")
        path = path / there[0]
    config = path / "config.json"
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        parts = json.loads(indices[0].read_text("utf-8")).get("weight_map", {}).values()
        files = [path / Path(part).name for part in sorted(set(parts))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise DiffScalerError(f"{str(path)!r} holds no .safetensors file")
    return files, config if config.is_file() else None
