"""A ComfyUI model held still while tasks are trained on it: loaded, frozen, differentiable.

ComfyUI loads and runs models in inference mode, whose tensors autograd refuses. All that is done to
a model here is undone when the context ends, also by an error or the stop button; its weights never
change, and are not copied.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import comfy.model_management as management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from ..diffscaler_core.training.frozen import frozen

_FORWARD = "forward"
_RAW = "calculate_denoised"
#: ComfyUI's look at the stop button, in every layer. Half a step cannot be saved, so while a task
#: is trained the button is looked at between steps (see `training_report.py`).
_EVERY_OP = "run_every_op"
#: Where ComfyUI keeps the weights that its dynamic loading left on the device.
_RESIDENT = ("_v_weight", "_v_bias")
_LISTS = (nn.ModuleList, nn.Sequential)


class _KeptNorms(TorchFunctionMode):
    """Gives each norm a copy of its input to remember.

    Many of ComfyUI's blocks add to their input in place after a norm has read it, and autograd
    needs it as it was. (A tensor that the next block would hold anyway is freed for it.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _NORMS and args and args[0].requires_grad:
            args = (args[0].clone(), *args[1:])
        return func(*args, **(kwargs or {}))


_NORMS = {F.layer_norm, F.rms_norm, F.group_norm, torch.layer_norm, torch.rms_norm}
_here = threading.local()  # the backward pass of a GPU runs in a thread of its own


def differentiably(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a model, or a part of one, so that its backward pass finds what it needs."""
    if getattr(_here, "on", False) or not torch.is_grad_enabled():
        return call(*args, **kwargs)
    _here.on = True
    try:
        with _KeptNorms():
            return call(*args, **kwargs)
    finally:
        _here.on = False


def load(patcher: ModelPatcher) -> None:
    """Loads a model where it runs, whole if it fits with room for activations, for autograd."""
    models = [patcher, *patcher.get_nested_additional_models()]
    device = patcher.load_device
    partly = management.vram_state in (
        management.VRAMState.LOW_VRAM,
        management.VRAMState.NO_VRAM,
    )
    whole = not partly and patcher.model_size() * 1.25 < management.get_total_memory(device)
    with torch.inference_mode():  # as ComfyUI does it; otherwise it copies quantised weights
        # Training wants all the memory there is: the others make room.
        management.load_models_gpu(models, memory_required=1e20, force_full_load=whole)
    make_differentiable(patcher.model)


@contextlib.contextmanager
def held(patcher: ModelPatcher, checkpointing: bool) -> Iterator[None]:
    """Holds a model still.

    Args:
        patcher: The model.
        checkpointing: Recompute the blocks' activations in the backward pass.
    """
    base = patcher.model
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        load(patcher)
        patcher.pre_run()
        undo.callback(patcher.cleanup)
        undo.enter_context(_overridden(comfy.ops, _EVERY_OP, lambda: None))
        undo.enter_context(_training_mode())
        undo.enter_context(frozen(base))
        undo.enter_context(_overridden(base.model_sampling, _RAW, lambda _, output, x: output))
        if is_offloaded(patcher):
            for layer in _layers(base):
                undo.enter_context(_recomputed(layer))
        if checkpointing:
            for block in blocks_of(base.diffusion_model):
                undo.enter_context(_recomputed(block))
        yield


def make_differentiable(base: nn.Module) -> None:
    """Gives every weight that was made in inference mode a normal tensor over the same memory."""
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = nn.Parameter(
                    normal_tensor(parameter), requires_grad=False
                )
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = normal_tensor(buffer)
        for name in _RESIDENT:
            weight = module.__dict__.get(name)
            if isinstance(weight, Tensor) and weight.is_inference():
                module.__dict__[name] = normal_tensor(weight)


def normal_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor over the same memory that autograd may save."""
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if is_traceable_wrapper_subclass(data):  # a quantised weight: over its parts' memory
        names, context = data.__tensor_flatten__()
        parts = {name: normal_tensor(getattr(data, name)) for name in names}
        rebuilt = type(data).__tensor_unflatten__(parts, context, data.size(), data.stride())
        return rebuilt  # type: ignore[no-any-return]
    empty = torch.empty(0, dtype=data.dtype, device=data.device)
    where = (data.storage_offset(), data.size(), data.stride())
    return empty.set_(data.untyped_storage(), *where)  # type: ignore[call-overload, no-any-return]


def is_offloaded(patcher: ModelPatcher) -> bool:
    """Says whether some weights are brought to the device layer by layer.

    Autograd must not keep such weights: they would all pile up there, or be overwritten by the next
    layer's. Their layers run once more in the backward pass.
    """
    return patcher.is_dynamic() or bool(getattr(patcher.model, "model_lowvram", False))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks a model is a chain of: the entries of its outermost lists.

    An entry that is itself a sequence stands for its parts: a U-Net calls those one by one.
    """
    found: list[nn.Module] = []
    for child in model.children():
        found += _entries(child) if isinstance(child, _LISTS) else blocks_of(child)
    return [block for block in found if any(True for _ in block.children())]


def _entries(listed: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for entry in listed.children():
        found += _entries(entry) if isinstance(entry, _LISTS) else [entry]
    return found


def _layers(base: nn.Module) -> list[nn.Module]:
    """Returns the layers ComfyUI brings to the device one by one."""
    return [
        module
        for module in base.modules()
        if hasattr(module, "comfy_cast_weights") and not any(True for _ in module.children())
    ]


@contextlib.contextmanager
def _recomputed(module: nn.Module) -> Iterator[None]:
    """Lets a module forget its activations and compute them again in the backward pass.

    It is computed from copies of its inputs, as blocks add to them in place and a second time must
    start from what the first did. (A layer's inputs change after it; those are copied to be kept.)
    """
    inner, is_layer = module.forward, not any(True for _ in module.children())

    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_layer:
            args, kwargs = _copied(args), dict(zip(kwargs, _copied(kwargs.values()), strict=True))
        return inner(*args, **kwargs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        args = _copied(args) if is_layer else args
        return checkpoint(
            differentiably,
            run,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
            **kwargs,
        )

    with _overridden(module, _FORWARD, forward):
        yield


def _copied(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        v.clone() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values
    )


@contextlib.contextmanager
def _overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Lets an object have another method; afterwards it has what it had."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            owner.__dict__[name] = before
        else:
            owner.__dict__.pop(name, None)


@contextlib.contextmanager
def _training_mode() -> Iterator[None]:
    """Tells ComfyUI's models to leave out kernels that have no gradient."""
    before = management.in_training
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before
