"""Which layers of a model can carry an affiner. Reads foreign models, never changes them.

A layer is recognised by what it offers (`in_features`, `kernel_size`, …), never by its class:
quantised layers and ComfyUI's own are often no `nn.Linear` at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .affiner import ConvGeometry
from .errors import DiffScalerError, MismatchError, shown
from .patterns import compiled

_MLP = r"(ff(_\w+)?|ffn|\w*mlp\w*|feed_forward)"
#: Preset -> regular expression a target's path below its block must contain; None: no condition.
PRESETS: dict[str, str | None] = {
    "blocks": None,
    # a U-Net's list `attentions` holds whole transformer blocks, MLPs included
    "attention": rf"^(?!(.*\.)?{_MLP}(\.|$))(.*\.)?\w*(attn|attention)\w*\.",
    "mlp": rf"(^|\.){_MLP}(\.|$)|^proj_out$",
    "all": None,
}
#: What diffusers adds to a model for an IP-Adapter.
_IP_ADAPTER = re.compile(r"\.processor\.|^encoder_hid_proj\.image_projection_layers\.")
#: Modules whose repeated children are blocks although they are no lists.
_SINGLE_BLOCKS = ("mid_block", "middle_block")


@dataclass(frozen=True)
class Target:
    """One adaptable layer.

    Attributes:
        name: Module path below the model, without PEFT's `base_layer`.
        out_features: C_out.
        in_features: C_in, of all groups together.
        kernel: The convolution's kernel size; empty for a Linear.
        has_bias: Whether the layer has a bias of its own.
    """

    name: str
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    has_bias: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """(C_out, C_in, *kernel)."""
        return (self.out_features, self.in_features, *self.kernel)


def as_target(name: str, module: Any) -> Target | None:
    """Returns the module as a target, or None if it can carry no affiner."""
    if not hasattr(module, "weight"):
        return None
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        return Target(name, module.out_features, module.in_features, (), has_bias)
    kernel = getattr(module, "kernel_size", None)
    if not isinstance(kernel, tuple) or not 1 <= len(kernel) <= 3:
        return None
    channels = getattr(module, "out_channels", None), getattr(module, "in_channels", None)
    if getattr(module, "transposed", False) or not all(isinstance(c, int) for c in channels):
        return None
    return Target(name, module.out_channels, module.in_channels, tuple(kernel), has_bias)


def find_targets(
    model: nn.Module,
    targets: str | Sequence[str] = "blocks",
    *,
    exclude: str | Sequence[str] | None = None,
) -> tuple[Target, ...]:
    """Returns the adaptable layers of a model, in the model's order.

    Args:
        model: Any denoiser.
        targets: A preset ("blocks": every Linear and convolution inside the repeated blocks;
            "attention", "mlp": those of them in attention or MLP; "all": every layer), or a
            regular expression for whole names, or a list of names and name endings.
        exclude: Like `targets` (no presets); what it matches is left out.

    Raises:
        DiffScalerError: Nothing matches; the message lists layers there are.
    """
    everything = list(all_targets(model))
    if isinstance(targets, str) and targets in PRESETS:
        chosen = [t for t in everything if in_preset(model, t.name, targets)]
    else:
        chosen = [t for t in everything if matches(t.name, targets)]
    if exclude is not None:
        chosen = [t for t in chosen if not matches(t.name, exclude)]
    if not chosen:
        sample = ", ".join(t.name for t in everything[:3]) or "none at all"
        raise DiffScalerError(
            f"no layer of {type(model).__name__} matches targets={shown(targets)} "
            f"exclude={shown(exclude)}; "
            f"presets: {', '.join(PRESETS)}; it has {len(everything)} layers, for example {sample}"
        )
    return tuple(chosen)


def all_targets(model: nn.Module) -> Iterator[Target]:
    """Yields every adaptable layer of a model under its plain name.

    PEFT wraps a layer into one with `base_layer`; then the wrapped layer is the target, under the
    name it had before, and PEFT's own small layers are none. Inside `nn.MultiheadAttention` the
    weights are used without calling the layers, so those are none either. Nor are an IP-Adapter's
    own: they come and go with it.
    """
    hidden: list[str] = []
    for path, module in model.named_modules():
        if not path or path.startswith(tuple(hidden)) or _IP_ADAPTER.search(path):
            continue
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            target = as_target(path, base_layer(module))
            hidden.append(path + ".")
        elif hasattr(module, "in_proj_weight"):
            hidden.append(path + ".")
            continue
        else:
            target = as_target(path, module)
        if target is not None:
            yield target


def base_layer(module: Any) -> nn.Module:
    """Returns the layer PEFT wrapped, or the module itself."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer
    return module  # type: ignore[no-any-return]


def resolve(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the layer of that target name, or None if the model has no such layer."""
    module: Any = model
    for step in name.split("."):
        module = getattr(base_layer(module), step, None)
        if not isinstance(module, nn.Module):
            return None
    return base_layer(module)


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Says whether a target is meant.

    A string is a regular expression for the whole name; a list holds whole names or name endings
    (as in PEFT's `target_modules`).
    """
    if isinstance(patterns, str):
        return compiled(patterns).fullmatch(name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def pattern_value(name: str, table: Mapping[str, Any] | None, default: Any) -> Any:
    """Returns the value of the entry of that name, or of the first whose key matches it.

    A key matches as a regular expression for the whole name, or as its ending.
    """
    if table and name in table:
        return table[name]
    for pattern, value in (table or {}).items():
        if matches(name, [pattern]) or matches(name, pattern):
            return value
    return default


def geometry_of(module: Any) -> ConvGeometry | None:
    """Returns a convolution's geometry, None for a Linear."""
    kernel = getattr(module, "kernel_size", None)
    if kernel is None:
        return None
    border: list[int] = []
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        border = _border(module.padding, kernel, module.dilation)
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return ConvGeometry(tuple(module.stride), padding, tuple(module.dilation), mode, tuple(border))


def bias_of(name: str, module: Any) -> Tensor | None:
    """Returns a layer's own bias as a float32 (or float64) copy, or None; read once, at attach.

    Raises:
        MismatchError: The bias is there but cannot be read (meta device, packed bits).
    """
    bias = getattr(module, "bias", None)
    if bias is None:
        return None
    if bias.is_meta:  # accelerate's sequential offload keeps the values in its own map
        stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if stored is None:
            raise MismatchError(
                f"the bias of {name!r} is on the meta device, so there is nothing to scale around; "
                f"load the model's weights before attaching a task"
            )
        bias = stored["bias"]
    if not bias.dtype.is_floating_point:
        raise MismatchError(
            f"the bias of {name!r} is packed as {bias.dtype}; dequantise the bias to attach here"
        )
    wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
    with torch.inference_mode(False), torch.no_grad():  # training may come later
        copied: Tensor = bias.detach().to(wide, copy=True)
    return copied


def component_of(model: nn.Module) -> str:
    """Returns the name a pipeline gives to such a model: "unet" or "transformer"."""
    return "unet" if "unet" in type(model).__name__.lower() else "transformer"


def in_preset(model: nn.Module, name: str, preset: str) -> bool:
    """Says whether a target is one of a preset's; see `find_targets`."""
    if preset == "all":
        return True
    head, _, rest = name.partition(".")
    child = getattr(base_layer(model), head, None)
    if isinstance(child, nn.ModuleList):
        rest = rest.partition(".")[2]  # without the block's number
    elif head not in _SINGLE_BLOCKS:
        return False
    contains = PRESETS[preset]
    return contains is None or re.search(contains, rest) is not None


def _border(
    padding: tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """Returns F.pad's widths, last dimension first, for a convolution that does not pad zeros."""
    widths: list[int] = []
    for i in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[i] * (kernel[i] - 1)
            widths += [total // 2, total - total // 2]
        else:
            width = 0 if isinstance(padding, str) else padding[i]
            widths += [width, width]
    return widths
